"""Plans that are measured on the device: each candidate runs on tensors of its own, best of the medians wins.

The tensors of the caller are never touched, and no running statistics are passed at all. Results are kept in
``$XDG_CACHE_HOME/batchnorm`` (``~/.cache/batchnorm``), one file for each kind of device.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from batchnorm.kernels.contract import Needs
from batchnorm.kernels.gpu.plan import SLAB, Plan, Problem, by_table, cut, measured

ROUNDS = 10


def measure(problem: Problem) -> None:
    """Find the best plan for a problem, in the file or by trying. Not while a graph is captured: nothing changes."""
    module: Any = torch.get_device_module(problem.device)
    if getattr(module, "is_current_stream_capturing", bool)():
        return
    path, key = _file(problem.device), "/".join(map(str, problem[:-1]))
    known = _read(path)
    if key in known:
        measured[problem] = Plan(*known[key])
        return
    with module.device(problem.device), torch.no_grad():
        call = _call(problem)
        times: dict[Plan, float] = {}
        for plan in dict.fromkeys(candidates(problem)):
            measured[problem] = plan
            times[plan] = _time(module, call)
    measured[problem] = min(times, key=times.__getitem__)
    known = _read(path) | {key: measured[problem]}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(known))
    fresh.replace(path)  # whole at any time, whoever else writes


def candidates(problem: Problem) -> Iterator[Plan]:
    """The table's plan and its neighbours."""
    yield by_table(problem)
    if problem.operation in SLAB:
        yield cut(problem, 1, 1, 1)  # not fused: its parts are problems of their own
        return
    for tile in (2048, 4096, 8192, 16384):
        for waves in (1, 2, 4, 8):
            plan = by_table(problem, tile, waves)
            yield from (plan, plan._replace(warps=max(1, plan.warps // 2)))


def _call(problem: Problem) -> Callable[[], Any]:
    """The function of the backend that runs the problem's programs, on tensors made for it."""
    from batchnorm.kernels import gpu

    operation, groups, outer, channels, inner, dtype, device = problem
    shape = (groups * outer, channels, inner) if inner > 1 else (groups * outer, channels)
    x, dy = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    stats = torch.ones((2, channels), dtype=torch.float64, device=device)
    given = (*stats, 1e-5, weight, bias)
    calls: dict[str, Callable[[], Any]] = {
        "moments": lambda: gpu.moments(x),
        "normalize": lambda: gpu.normalize(x, *given),
        "forward": lambda: gpu.forward(x, weight, bias, 1e-5),
        "sums": lambda: gpu.backward_sums(dy, x, *given),
        "input": lambda: gpu.backward_input(dy, x, *given, (stats[0], stats[1]), 2.0),
        "backward": lambda: gpu.backward(
            dy, x, stats, 1e-5, weight, bias, training=True, needs=Needs(True, True, True, False)
        ),
    }
    return calls[operation]


def _time(module: Any, call: Callable[[], Any]) -> float:
    """Milliseconds, the median; compiling and one round of warming up not counted."""
    times = []
    for _ in range(ROUNDS + 2):
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        module.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


@lru_cache(maxsize=64)
def _file(device: torch.device) -> Path:
    name = str(torch.get_device_module(device).get_device_name(device)).replace("/", "-").replace(" ", "_")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm" / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):  # not there yet, or not ours
        return {}
    return found
