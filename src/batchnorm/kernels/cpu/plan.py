"""What runs for a call: decided once for each combination of shapes, strides, dtypes and options, then kept.

A plan knows the compiled kernels to launch and in which order, how many threads they get, how much working memory
they want, and the first half of their argument block. Finding it again is one look in a dictionary.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import layout
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.cpu import block, inside, inside_few, outside, outside_long, outside_masked, outside_short
from batchnorm.kernels.cpu.compiling import Kernel
from batchnorm.kernels.cpu.pages import LARGE, large_empty
from batchnorm.kernels.cpu.threads import launch, threads_for

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
CODES = {dtype: block.CODES[name] for dtype, name in DTYPES.items()}
ACTIVATIONS = {"identity": block.IDENTITY, "relu": block.RELU, "leaky_relu": block.LEAKY_RELU}

STREAM_FROM = 8 << 20
"""Outputs from so many bytes on are stored around the cache. Measured with a third-level cache of 32 MiB: at 6 MiB who
reads the output next loses more than the kernel gains, at 12 MiB both together gain."""

KEPT = 4096
"""Plans kept at most: shapes that change at every call must not fill the memory."""

PLACES = ("x", "dy", "y", "residual", "dx", "dresidual")
"""The tensors of x's size, in the order in which the argument block holds their strides."""


class Plan(NamedTuple):
    """The launches of one call."""

    launches: tuple[tuple[Kernel, bytes], ...]  # each with the first half of its argument block
    threads: int
    scratch: int  # float64 values of working memory
    channels: int
    pair: Tensor  # a float64 tensor (2, channels), to make others like it
    seen: layout.Layout
    large: tuple[int, ...] | None  # strides of an output that comes from the pool of large pages, or None
    copied: tuple[str, ...]  # the tensors that kernels cannot read as they lie in memory
    like_x: bool  # whether outputs have the strides of x

    def run(self, what: bytes) -> bool:
        """Launch. Whether there were numbers too large for the vectors' arithmetic (see ``block``, slot FAR)."""
        far = _told.far
        far.value = 0
        what += _told.address
        for kernel, how in self.launches:
            launch(kernel, how + what, self.threads)
        return far.value != 0

    def output(self, x: Tensor) -> Tensor:
        """A new tensor like ``x`` for the kernels to write."""
        if self.large is not None:
            return large_empty(x, self.large)
        return torch.empty_like(x) if self.like_x else self.seen.empty(x)

    def readable(self, name: str, t: Tensor) -> Tensor:
        """``t``, or a copy that the kernels can read."""
        return self.seen.empty(t).copy_(t) if name in self.copied else t

    def positions(self, t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask or weight that all channels share, as kernels read it: (outer, inner), without gaps."""
        return None if t is None else self.seen.view(t)[:, 0].to(dtype).contiguous()


class _Told(threading.local):
    """Where the kernels that a thread launches raise FAR."""

    def __init__(self) -> None:
        self.far = ctypes.c_int64()
        self.address = block.pack_far(ctypes.addressof(self.far))


_told = _Told()


def told() -> tuple[ctypes.c_int64, bytes]:
    """This thread's FAR, lowered, and its address as a kernel's block holds it."""
    _told.far.value = 0
    return _told.far, _told.address


def find(
    operation: str,
    x: Tensor,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    written: tuple[str, ...] = (),
    activation: Activation = IDENTITY,
    parameter: Tensor | None = None,
    statistic: torch.dtype = torch.float64,
    running: Tensor | None = None,
    masked: bool = False,
    threads: int | None = None,
) -> Plan:
    """The plan of ``operation`` (a kernel's name) on ``x``.

    Arguments:
        dy, y, residual: the other tensors of x's size that are there already
        written: the names of those that will be made like x and written, as in PLACES
        parameter: weight or bias, for their dtype
        statistic: dtype of the mean and variance that are read
        running: a running statistic, for its dtype
        masked: whether there is a mask or a sample weight
        threads: how many run it; None: as many as the tensor is worth
    """
    if threads is None:
        threads = threads_for(x.numel())
    key = (
        operation, x.shape, x.stride(), x.dtype, threads, written, activation.name, statistic, masked,
        None if dy is None else dy.stride(), None if y is None else y.stride(),
        None if residual is None else residual.stride(), None if parameter is None else parameter.dtype,
        None if running is None else running.dtype,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        given = {"dy": dy, "y": y, "residual": residual}
        found = _make(operation, x, given, written, activation, parameter, statistic, running, masked, threads)
        if len(_plans) >= KEPT:
            _plans.clear()
        _plans[key] = found
    return found


_plans: dict[Hashable, Plan] = {}


def _make(
    operation: str,
    x: Tensor,
    given: dict[str, Tensor | None],
    written: tuple[str, ...],
    activation: Activation,
    parameter: Tensor | None,
    statistic: torch.dtype,
    running: Tensor | None,
    masked: bool,
    threads: int,
) -> Plan:
    seen = layout.of(x)
    outer, channels, inner = (_product(x.shape, dims) for dims in (seen.outer, (1,), seen.inner))
    by_channel = inner > 1
    made = seen.empty(x)
    like_x = _steps(seen, made, by_channel)
    assert like_x is not None
    steps: dict[str, tuple[int, int]] = dict.fromkeys(written, like_x)
    copied = []
    for name, t in {"x": x, **given}.items():
        if t is None:
            continue
        own = _steps(seen, t, by_channel)
        if own is None:
            copied.append(name)
        steps[name] = own or like_x
    family = outside.family(outer, inner, masked) if by_channel else inside
    few = operation in ("FORWARD", "BACKWARD") and not by_channel and not masked and inside_few.serves(outer, channels)
    if few:
        family = inside_few
    split = by_channel and not masked and outside.in_phases(outer, channels, inner, threads)
    if by_channel:
        scratch = outside.scratch(outer, channels, inner) if split else 0
    else:
        scratch = 0 if few else inside.scratch(outer, inner, channels, 8 if x.dtype == torch.float64 else 4, threads)
    name, bytes_out = DTYPES[x.dtype], made.numel() * made.element_size()
    how = (
        outer, channels, inner,
        *(step for place in PLACES for step in steps.get(place, (0, 0))),
        CODES[torch.float32 if parameter is None else parameter.dtype], CODES[statistic],
        CODES[torch.float32 if running is None else running.dtype],
        ACTIVATIONS[activation.name], int(bytes_out >= STREAM_FROM),
    )  # fmt: skip
    launches = []
    for kernel, phase in _order(operation, split, () if by_channel or few else inside.phases(threads)):
        if by_channel and kernel == "BACKWARD_EVAL":
            kernel = "BACKWARD"  # tells the two apart by COUNT
        compiled = getattr(family, kernel)[name]
        launches.append((compiled, block.pack_how(-1, threads, phase, *how)))
    large = made.stride() if bytes_out >= LARGE else None
    return Plan(
        tuple(launches),
        threads,
        scratch,
        channels,
        _pair(channels),
        seen,
        large,
        tuple(copied),
        made.stride() == x.stride(),
    )


@lru_cache(maxsize=256)
def _pair(channels: int) -> Tensor:
    return torch.empty((2, channels), dtype=torch.float64, device="cpu")


def _order(operation: str, split: bool, phases: tuple[int, ...]) -> list[tuple[str, int]]:
    """Kernels and their PHASE, in order."""
    if split:
        # Too few channels to go round: the parts of all channels are shared out, measured, merged and then used.
        in_parts = {
            "FORWARD": [("FORWARD", 1), ("FORWARD", 2), ("NORMALIZE", 0)],
            "MOMENTS": [("MOMENTS", 1), ("MOMENTS", 2)],
            "BACKWARD": [("BACKWARD_SUMS", 1), ("BACKWARD_SUMS", 2), ("BACKWARD_INPUT", 0)],
            "BACKWARD_EVAL": [("BACKWARD_SUMS", 1), ("BACKWARD_SUMS", 2), ("BACKWARD_INPUT", 0)],
            "BACKWARD_SUMS": [("BACKWARD_SUMS", 1), ("BACKWARD_SUMS", 2)],
        }
        return in_parts.get(operation, [(operation, 0)])
    if operation in ("NORMALIZE", "BACKWARD_INPUT"):
        return [(operation, 0)]
    return [(operation, phase) for phase in phases or (0,)]


def _steps(seen: layout.Layout, t: Tensor, by_channel: bool) -> tuple[int, int] | None:
    """The two strides that the kernels step by, or None where ``t`` does not lie so that they can."""
    strides = t.stride()
    outer = layout.merged_stride(seen.shape, strides, seen.outer)
    inner = layout.merged_stride(seen.shape, strides, seen.inner)
    if outer is None or inner is None:
        return None
    channel = strides[1] if seen.shape[1] > 1 else 1
    if by_channel:
        return (outer, channel) if inner == 1 else None
    return (outer, 0) if channel == 1 else None


def compile_all(dtype: torch.dtype, masked: bool) -> int:
    """Compile, or load from the cache, every kernel for this dtype; how many there are."""
    families = [inside, inside_few, outside_long, outside_short] + [outside_masked] * masked
    found = [
        kernels[DTYPES[dtype]]
        for family in families
        for name, kernels in vars(family).items()
        if name.isupper() and isinstance(kernels, dict)
    ]
    for kernel in found:
        kernel.compile()
    return len(found)


def _product(shape: torch.Size, dims: tuple[int, ...]) -> int:
    result = 1
    for d in dims:
        result *= shape[d]
    return result
