"""How much memory a training step takes: what is kept for backward, and the highest it gets."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from batchnorm.bench.peers import Unavailable
from batchnorm.bench.results import Memory


def measure(step: Callable[[], object], layer: nn.Module) -> Memory:
    """Both figures for a step that was run before.

    Arguments:
        step: forward and backward
        layer: its parameters and buffers live on their own account and are not counted

    Raises:
        Unavailable: the profiler's record, which goes through a temporary file, cannot be written
    """
    return Memory(kept=kept(step, layer), peak=peak(step))


def kept(step: Callable[[], object], layer: nn.Module) -> int:
    """Bytes that autograd holds from forward to backward, each storage once.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> kept(lambda: x.exp(), nn.Identity())  # the result, from which the derivative follows
    4000
    """
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(storages.values())


def peak(step: Callable[[], object]) -> int:
    """Most bytes allocated by PyTorch at any moment of ``step``, beyond those allocated before.

    Read from the profiler's record of every allocation, which is exact and repeats; a process's resident memory is
    neither. The profiler does not see the pool in which our large outputs live: what is leased there at most is
    added, over what is leased at least, which may say too much, never too little.

    >>> peak(lambda: torch.ones(1000).add(1).sum()) >= 8000
    True
    """
    # Where the module was never imported nothing lives in a pool.
    pages = sys.modules.get("batchnorm.kernels.cpu.pages")
    pool = None if pages is None else pages.pool
    if pool is not None:
        pool.watch()
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in _events(profiler)
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    now = highest = 0
    for *_, change in changes:
        now += change
        highest = max(highest, now)
    return highest if pool is None else highest + pool.highest - pool.lowest


def _events(profiler: profile) -> list[dict[str, Any]]:
    try:
        with tempfile.TemporaryDirectory() as folder, _silent():
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            return events
    except (OSError, ValueError):  # PyTorch leaves out or cuts short what it cannot write, without an error
        raise Unavailable("no temporary folder has room for the profiler's record") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Without the profiler's own remarks, which it writes straight to the standard error's file descriptor."""
    sys.stderr.flush()
    kept_open = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept_open, 2)
        os.close(kept_open)
