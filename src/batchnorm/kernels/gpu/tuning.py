"""Plans that are measured on the device, on tensors of their own: no tensor of the caller, no running statistics.

Results are kept in ``$XDG_CACHE_HOME/batchnorm`` (``~/.cache/batchnorm``), one file for each kind of device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from batchnorm.kernels.contract import Needs
from batchnorm.kernels.gpu.plan import FUSED, Plan, Problem, by_table, cut, measured

ROUNDS = 12


def measure(problem: Problem) -> None:
    """Find the best plan for a problem, in the file or by trying. Not for groups, nor while a graph is captured."""
    module: Any = torch.get_device_module(problem.device)
    if problem.groups > 1 or getattr(module, "is_current_stream_capturing", bool)():
        return
    name = str(module.get_device_name(problem.device)).replace("/", "-").replace(" ", "_")
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm" / f"{name}.json"
    key = "/".join(map(str, problem[:-1]))
    if key not in read(path):
        times: dict[Plan, float] = {}
        with module.device(problem.device), torch.no_grad():
            call = _call(problem)
            for plan in dict.fromkeys(candidates(problem)):
                measured[problem] = plan
                times[plan] = median(_time(module, call) for _ in range(ROUNDS))
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(read(path) | {key: min(times, key=times.__getitem__)}))
        fresh.replace(path)  # whole at any time, whoever else writes
    measured[problem] = Plan(*read(path)[key])


def candidates(problem: Problem) -> Iterator[Plan]:
    """The table's plan and its neighbours."""
    yield by_table(problem)
    if problem.operation in FUSED:
        yield cut(problem, 1, 1, 1)  # not fused: the sweeps are problems of their own
        return
    for tile in (4096, 8192, 16384, 32768):
        for waves in (1, 2, 4, 8):
            plan = by_table(problem, tile, waves)
            yield from (plan, plan._replace(warps=max(1, plan.warps // 2)))


def read(path: Path) -> dict[str, Any]:
    """The plans in a file; none where there is no such file or it is not ours."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _call(problem: Problem) -> Callable[[], Any]:
    """The function of the backend that runs the problem's programs, on tensors made for it."""
    from batchnorm.kernels import gpu

    operation, groups, outer, channels, inner, dtype, device = problem
    x = torch.randn((groups * outer, channels, inner), dtype=dtype, device=device)
    dy, weight = torch.randn_like(x), torch.ones(channels, device=device)
    stats = torch.ones((2, channels), dtype=torch.float64, device=device)
    mean, var = stats
    given, needs = (mean, var, 1e-5, weight, weight), Needs(True, True, True, False)
    calls: dict[str, Callable[[], Any]] = {
        "moments": lambda: gpu.moments(x),
        "normalize": lambda: gpu.normalize(x, *given),
        "forward": lambda: gpu.forward(x, weight, weight, 1e-5),
        "sums": lambda: gpu.backward_sums(dy, x, *given),
        "input": lambda: gpu.backward_input(dy, x, *given, (mean, var), 2.0),
        "backward": lambda: gpu.backward(dy, x, stats, 1e-5, weight, weight, training=True, needs=needs),
    }
    return calls[operation]


def _time(module: Any, call: Callable[[], Any]) -> float:
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    module.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed
