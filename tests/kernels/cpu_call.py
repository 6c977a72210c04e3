"""Call a compiled CPU kernel on tensors of shape (outer, channels, inner), without the users' wrapper."""

from __future__ import annotations

import math
from typing import Any

import torch

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu import outside
from batchnorm.kernels.cpu.threads import launch

_TENSORS = ("x", "dy", "y", "residual", "dx", "dresidual")
_STATISTICS = ("mean", "var", "stats", "running_mean", "running_var", "sums")
_VECTORS = ("weight", "bias", *_STATISTICS, "dweight", "dbias", "mask", "sample_weight", "scratch", "batches")


def pack(
    x: torch.Tensor,
    *,
    threads: int = 1,
    phase: int = 0,
    activation: int = slots.IDENTITY,
    stream: bool = False,
    eps: float = 1e-5,
    factor: float = 0.1,
    slope: float = 0.01,
    count: float = 0.0,
    **operands: torch.Tensor | None,
) -> bytes:
    """The argument block of a call; operands by the names of their slots in lower case."""
    operands = {"x": x, **operands}
    unknown = operands.keys() - {*_TENSORS, *_VECTORS}
    assert not unknown, f"no such slots: {unknown}"

    def address(name: str) -> int:
        tensor = operands.get(name)
        return 0 if tensor is None else tensor.data_ptr()

    def code(*names: str) -> int:
        dtypes = {operands[name].dtype for name in names if operands.get(name) is not None}
        assert len(dtypes) <= 1, f"{names} must share a dtype"
        return slots.CODES[str(dtypes.pop()).removeprefix("torch.")] if dtypes else 0

    strides: list[int] = []
    for name in _TENSORS:
        tensor = operands.get(name)
        assert tensor is None or tensor.shape[2] == 1 or tensor.stride(2) == 1
        strides += (0, 0) if tensor is None else tensor.stride()[:2]
    how = slots.pack_how(
        -1, threads, phase, *x.shape, *strides,
        code("weight", "bias", "dweight", "dbias"), code("mean", "var"), code("running_mean", "running_var"),
        activation, int(stream),
    )  # fmt: skip
    addresses = [address(name) for name in (*_TENSORS, *_VECTORS)]
    return how + slots.pack_what(*addresses, eps, factor, slope, count) + slots.pack_far(0)


def call(family: Any, kernel: str, x: torch.Tensor, *, threads: int = 1, **arguments: Any) -> None:
    """One launch of a family's kernel."""
    chosen = getattr(family, kernel)[str(x.dtype).removeprefix("torch.")]
    launch(chosen, pack(x, threads=threads, **arguments), threads)


def outside_forward(
    x: torch.Tensor, *, split: bool = False, threads: int = 1, y: torch.Tensor | None = None, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, stats) in one launch, or split in phases."""
    family = outside.family(x.shape[0], x.shape[2], "mask" in arguments or "sample_weight" in arguments)
    y = torch.empty_like(x) if y is None else y
    stats = torch.empty(2, x.shape[1], dtype=torch.float64)
    if not split:
        call(family, "FORWARD", x, threads=threads, y=y, stats=stats, **arguments)
        return y, stats
    scratch = torch.empty(outside.scratch(*x.shape), dtype=torch.float64)
    for phase in (1, 2):
        call(family, "FORWARD", x, threads=threads, phase=phase, stats=stats, scratch=scratch, **arguments)
    use = {k: v for k, v in arguments.items() if k not in ("running_mean", "running_var")}
    call(family, "NORMALIZE", x, threads=threads, y=y, mean=stats[0], var=stats[1], **use)
    return y, stats


def outside_backward(
    dy: torch.Tensor, x: torch.Tensor, *, split: bool = False, threads: int = 1, training: bool = True, **arguments: Any
) -> torch.Tensor:
    """dx in one launch, or sums and input apart; dweight, dbias and dresidual are written where given."""
    family = outside.family(x.shape[0], x.shape[2], "mask" in arguments or "sample_weight" in arguments)
    dx = torch.empty_like(x)
    count = float(x.shape[0] * x.shape[2]) if training else math.inf
    if not split:
        arguments.setdefault("count", 0.0 if training else math.inf)
        call(family, "BACKWARD", x, threads=threads, dy=dy, dx=dx, **arguments)
        return dx
    sums = torch.empty(2, x.shape[1], dtype=torch.float64)
    scratch = torch.empty(outside.scratch(*x.shape), dtype=torch.float64)
    first = {k: v for k, v in arguments.items() if k != "dresidual"}
    for phase in (1, 2):
        call(family, "BACKWARD_SUMS", x, threads=threads, phase=phase, dy=dy, sums=sums, scratch=scratch, **first)
    second = {k: v for k, v in arguments.items() if k not in ("dweight", "dbias")}
    call(family, "BACKWARD_INPUT", x, threads=threads, dy=dy, dx=dx, sums=sums, **{"count": count, **second})
    return dx
