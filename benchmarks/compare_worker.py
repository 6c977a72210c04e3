"""The process in which ``benchmarks.compare`` measures one checkout: it answers JSON lines with JSON lines.

Run as a file, with the checkout's own package on the path. Only public names of ``batchnorm`` are used, so that two
checkouts with different benchmark code can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

import batchnorm as bn

FIRST_STEP = ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
"""Channels and size of the layers of ResNet-50 behind its first."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def prepared(case: Mapping[str, Any]) -> Callable[[], object]:
    """What is timed: one call of a layer as a user calls it."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    shape = case["shape"]

    def tensor() -> torch.Tensor:
        t = torch.randn(shape, generator=generator).to(dtype)
        return t.to(memory_format=torch.channels_last) if case["layout"] == "channels_last" and len(shape) == 4 else t

    layer = bn.BatchNorm(shape[1], activation="relu" if "relu" in case["tail"] else None)
    x, dy = tensor(), tensor()
    residual = tensor() if "residual" in case["tail"] else None
    if case["mode"] == "inference":
        layer.eval()
    if case["mode"] != "forward + backward":

        def forward() -> object:
            with torch.no_grad():
                return layer(x, residual=residual)

        return forward
    x.requires_grad_()
    leaves = [x, *layer.parameters()] + ([residual.requires_grad_()] if residual is not None else [])

    def both() -> object:
        return torch.autograd.grad(layer(x, residual=residual), leaves, dy)

    return both


def timed(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Median seconds of a call, over about ``seconds`` in all."""
    start = clock()
    call()
    number = max(1, min(1000, int(seconds / 10 / max(clock() - start, 1e-7))))
    taken = []
    end = clock() + seconds
    while not taken or clock() < end:
        start = clock()
        for _ in range(number):
            call()
        taken.append((clock() - start) / number)
    return median(taken)


def first_step() -> float:
    """CPU seconds of the first forward and backward of the kinds of layers that ResNet-50 has."""
    start = time.process_time()
    for channels, size in FIRST_STEP:
        for fused in (False, True):
            layer = bn.BatchNorm2d(channels, activation="relu" if fused else None)
            x = torch.randn(2, channels, size, size, requires_grad=True)
            layer(x, residual=x if fused else None).sum().backward()
    return time.process_time() - start


def main() -> None:
    print(json.dumps({"package": bn.__file__, "torch": torch.__version__}), flush=True)
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("first_step"):
            answer = first_step()
        else:
            torch.set_num_threads(asked["threads"])
            name = json.dumps(asked["case"], sort_keys=True)
            if name not in calls:
                calls.clear()  # one case at a time in memory
                calls[name] = prepared(asked["case"])
                for _ in range(3):
                    calls[name]()
            answer = timed(calls[name], asked["seconds"], CLOCKS[asked["clock"]])
        print(json.dumps({"seconds": answer}), flush=True)


if __name__ == "__main__":
    main()
