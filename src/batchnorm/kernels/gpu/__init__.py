"""The GPU kernels: Triton, on CUDA, ROCm and XPU devices.

``contract.Kernel`` documents what each function does, ``programs`` how the kernels work, ``plan`` how a tensor is cut
for them. Nothing here waits for the device, and no memory is taken but by PyTorch's allocator, so that the functions
may run while a CUDA graph is captured, on any stream and on any device.

Triton is imported when a tensor on a GPU comes for the first time. With ``TRITON_INTERPRET=1`` in the environment its
interpreter runs the same programs on the CPU, slowly: to try them, and to test them.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import layout
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import INPUT_ONLY, Groups, Needs, Running, count_of, moments_from
from batchnorm.kernels.gpu import plan as plans
from batchnorm.kernels.gpu.plan import Plan, Problem
from batchnorm.moments import Moments, counted

NAME = "gpu"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda as well
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"identity": 0, "relu": 1, "leaky_relu": 2}


def supports(
    x: Tensor,
    *,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Groups | None = None,
) -> str | None:
    """None where the Triton kernels serve, or why they do not."""
    if x.device.type not in DEVICES and not (INTERPRETED and x.is_cpu):
        return f"runs on a GPU, the input is on {x.device}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.numel() == 0:
        return "nothing to do for an input without values"
    if activation.name not in ACTIVATIONS:
        return f"{activation.name} is not fused here"
    return unavailable() or (None if x.is_cpu else _too_old(x.device, x.dtype))


def no_kernels_on(device: torch.device) -> bool:
    """Whether no tensor on the device can be served, whatever its dtype."""
    return device.type not in DEVICES or unavailable() is not None or _too_old(device, torch.float32) is not None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton cannot be used, or None. Imports it."""
    try:
        _programs()
    except (ImportError, OSError, RuntimeError) as error:  # installed and broken counts
        return f"Triton cannot be imported: {error}"
    return None


@lru_cache(maxsize=64)
def _too_old(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    least, found = ((8, 0) if dtype == torch.bfloat16 else (7, 0)), torch.cuda.get_device_capability(device)
    return None if found >= least else f"{dtype} needs compute capability {least[0]}.{least[1]}, {device} has {found}"


def moments(
    x: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None, groups: Groups | None = None
) -> Moments:
    seen = _Seen.of(x, groups)
    _, weights, per_channel = seen.places(mask, sample_weight)
    found = _moments(seen, seen.dense(x), weights, per_channel, 1).view(3, *seen.statistics)
    return Moments(found[0], found[1], found[2])


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, *,
    residual: Tensor | None = None, activation: Activation = IDENTITY, mask: Tensor | None = None,
    out: Tensor | None = None, groups: Groups | None = None,
) -> Tensor:  # fmt: skip
    seen = _Seen.of(x, groups)
    places, _, per_channel = seen.places(mask, None)
    y = out if out is not None and out.is_contiguous(memory_format=seen.format) else seen.empty(x)
    _launch(
        "normalize_program", seen.plan("normalize"), seen, seen.dense(x), seen.dense(residual), places, None, y,
        seen.each(weight), seen.each(bias), _statistic(mean), _statistic(var), None, None, None, None,
        numbers=(0, eps, activation.negative_slope, 0.0), PER_CHANNEL=per_channel,
        ACTIVATION=ACTIVATIONS[activation.name], PARTS=1, FUSED=False,
    )  # fmt: skip
    return y if out is None or y is out else out.copy_(y)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None,
    activation: Activation = IDENTITY, mask: Tensor | None = None, sample_weight: Tensor | None = None,
    running: Running | None = None, groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    seen = _Seen.of(x, groups)
    places, weights, per_channel = seen.places(mask, sample_weight)
    y, stats, dense = seen.empty(x), _empty(x, 2, *seen.statistics), seen.dense(x)
    written: tuple[Tensor | None, ...] = (None, None, None)
    factor = 0.0
    if running is not None and _in_place(running, x.device):
        written, factor = (running.mean, running.var, running.batches), float(running.factor)
    p, partial, parts = seen.plan("forward"), None, 0
    if not p.fused:
        p = seen.plan("normalize")
        partial = _moments(seen, dense, weights, per_channel, plans.MERGED // p.c_block)
        parts = partial.shape[1]
    _launch(
        "normalize_program", p, seen, dense, seen.dense(residual), places, weights, y,
        seen.each(weight), seen.each(bias), stats[0], stats[1], partial, *written,
        numbers=(parts, eps, activation.negative_slope, factor),
        PER_CHANNEL=per_channel, ACTIVATION=ACTIVATIONS[activation.name], PARTS=plans.power(parts), FUSED=p.fused,
    )  # fmt: skip
    if written[0] is not None:
        _changed(written)
    elif running is not None:
        running.update(moments_from(stats, count_of(x, mask, sample_weight)))
    return y, stats


def backward_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, *,
    residual: Tensor | None = None, y: Tensor | None = None, activation: Activation = IDENTITY,
    mask: Tensor | None = None, groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    back = _Back(dy, x, y, residual, mask, None, mean, var, eps, weight, bias, activation, groups)
    found = back.sums().sum(1).view(3, *back.seen.statistics)
    return found[0], found[1]


def backward_input(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    sums: tuple[Tensor, Tensor] | None, count: Tensor | float, *, residual: Tensor | None = None,
    y: Tensor | None = None, activation: Activation = IDENTITY, mask: Tensor | None = None,
    sample_weight: Tensor | None = None, needs: Needs = INPUT_ONLY, groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    back = _Back(dy, x, y, residual, mask, sample_weight, mean, var, eps, weight, bias, activation, groups)
    partial = None
    if sums is not None:
        partial = _empty(x, 3, 1, back.seen.stride)
        for row, value in zip(partial.view(3, *back.seen.statistics), (*sums, count), strict=True):
            row.copy_(value) if isinstance(value, Tensor) else row.fill_(value)
    dx, dresidual = (back.seen.empty(x) if needed else None for needed in (needs.x, needs.residual))
    if needs.x or needs.residual:
        back.gradients(back.seen.plan("input"), partial, dx, dresidual, None, None, training=sums is not None)
    return dx, dresidual


def backward(
    dy: Tensor, x: Tensor, stats: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, *, training: bool,
    residual: Tensor | None = None, y: Tensor | None = None, activation: Activation = IDENTITY,
    mask: Tensor | None = None, sample_weight: Tensor | None = None, needs: Needs, groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    back = _Back(dy, x, y, residual, mask, sample_weight, stats[0], stats[1], eps, weight, bias, activation, groups)
    seen = back.seen
    # Without activation and mask dz is dy itself: the residual's gradient needs no memory of its own.
    passed_on = needs.residual and activation.name == "identity" and mask is None
    dx = seen.empty(x) if needs.x else None
    dresidual = seen.empty(x) if needs.residual and not passed_on else None
    dweight, dbias = (
        None
        if t is None or not needed
        else _empty(x, *seen.statistics, dtype=t.dtype if groups is None else torch.float64)
        for t, needed in ((weight, needs.weight), (bias, needs.bias))
    )
    by_sums = dweight is not None or dbias is not None
    p, partial = seen.plan("backward"), None
    if not (p.fused and training):
        p = seen.plan("input")
        if dx is None and dresidual is None:
            p = p._replace(parts=1, per_part=0)  # one program for each channel's parameters, and nothing to walk over
        if by_sums or (training and dx is not None):
            partial = back.sums()
            if partial.shape[1] * p.c_block > plans.MERGED:
                partial = partial.sum(1, keepdim=True)
    if dx is not None or dresidual is not None or by_sums:
        back.gradients(p, partial, dx, dresidual, dweight, dbias, training=training)
    if groups is not None:
        dweight = None if dweight is None or weight is None else dweight.sum(0).to(weight.dtype)
        dbias = None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight, dbias, dy if passed_on else dresidual


class _Seen(NamedTuple):
    """The input as the programs see it: dense, (groups·outer, channels, inner)."""

    shape: torch.Size
    format: torch.memory_format
    statistics: tuple[int, ...]  # the shape of one value a channel: (channels,), or (groups, channels)
    outer: int  # of one group
    last: int  # of the last group
    channels: int
    inner: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor, groups: Groups | None = None) -> _Seen:
        memory_format, samples, channels = layout.format_of(x), x.shape[0], x.shape[1]
        inner = x.numel() // channels // samples
        if channels == 1 and groups is None:
            samples, inner = 1, inner * samples
        rows, inner = (inner, 1) if channels > 1 and memory_format is not torch.contiguous_format else (1, inner)
        sizes = [samples] if groups is None else groups.sizes(samples)
        shape = (channels,) if groups is None else (groups.number, channels)
        return _Seen(
            x.shape, memory_format, shape, sizes[0] * rows, sizes[-1] * rows, channels, inner, x.dtype, x.device
        )  # fmt: skip

    @property
    def stride(self) -> int:
        """Channels of all groups: the length of a row of results."""
        return prod(self.statistics)

    def each(self, t: Tensor | None) -> Tensor | None:
        """A parameter, one value for each channel of each group."""
        return t if t is None else t.expand(self.statistics).contiguous()

    def plan(self, operation: str) -> Plan:
        groups, rows = self.stride // self.channels, max(self.outer, self.last)
        return plans.find(Problem(operation, groups, rows, self.channels, self.inner, self.dtype, self.device))

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=self.format)

    def dense(self, t: Any) -> Any:
        """A tensor of the input's size without gaps, in the order of results; copied only where it is not so."""
        return t if t is None else t.contiguous(memory_format=self.format)

    def places(self, mask: Tensor | None, sample_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
        """Mask and weights (0 where absent) as the programs read them, and whether channels have their own."""
        if mask is None and sample_weight is None:
            return None, None, False
        weights = None if sample_weight is None else counted(mask, sample_weight)
        per_channel = self.channels > 1 and any(t is not None and t.shape[1] > 1 for t in (mask, weights))
        shape = self.shape if per_channel else (self.shape[0], 1, *self.shape[2:])
        if mask is not None:
            mask = mask.expand(shape).contiguous(memory_format=self.format).view(torch.uint8)
        if weights is not None:
            weights = weights.to(torch.float32).expand(shape).contiguous(memory_format=self.format)
        return mask, mask if weights is None else weights, per_channel


class _Back:
    """What all programs of a backward are given."""

    def __init__(
        self, dy: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, mask: Tensor | None,
        sample_weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None,
        bias: Tensor | None, activation: Activation, groups: Groups | None,
    ) -> None:  # fmt: skip
        self.seen = seen = _Seen.of(x, groups)
        if activation.name == "identity":
            y = residual = None
        elif y is not None:
            residual = None
        places, weights, per_channel = seen.places(mask, sample_weight)
        self.x = x
        self.tensors = (
            *(seen.dense(t) for t in (dy, x, y, residual)), places, weights, seen.each(weight), seen.each(bias),
            _statistic(mean), _statistic(var),
        )  # fmt: skip
        self.numbers = eps, activation.negative_slope
        self.options = {"PER_CHANNEL": per_channel, "ACTIVATION": ACTIVATIONS[activation.name]}

    def sums(self) -> Tensor:
        """Σdz, Σdz·x̂ and the count of each part, (3, parts, channels)."""
        p = self.seen.plan("sums")
        partial = _empty(self.x, 3, p.parts, self.seen.stride)
        _launch("sums_program", p, self.seen, *self.tensors, partial, numbers=self.numbers, **self.options)
        return partial

    def gradients(
        self, p: Plan, partial: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, dweight: Tensor | None,
        dbias: Tensor | None, *, training: bool,
    ) -> None:  # fmt: skip
        parts = 0 if partial is None else partial.shape[1]
        _launch(
            "input_program", p, self.seen, *self.tensors, partial, dx, dresidual, dweight, dbias,
            numbers=(parts, *self.numbers), PARTS=plans.power(parts), FUSED=p.fused, TRAINING=training,
            **self.options,
        )  # fmt: skip


def _moments(seen: _Seen, x: Tensor, weights: Tensor | None, per_channel: bool, most: int) -> Tensor:
    """Count, mean and M2 of at most ``most`` parts, (3, parts, channels)."""
    p = seen.plan("moments")
    partial = _empty(x, 3, p.parts, seen.stride)
    _launch("moments_program", p, seen, x, weights, partial, numbers=(), PER_CHANNEL=per_channel)
    if p.parts <= most:
        return partial
    merged, width = _empty(x, 3, 1, seen.stride), plans.power(p.parts)
    c_block = max(1, plans.MERGED // width)
    with _on(x.device):
        _programs().merge_program[-(-seen.stride // c_block),](
            partial, merged, p.parts, seen.stride, C_BLOCK=c_block, PARTS=width, num_warps=4
        )  # fmt: skip
    return merged


def _launch(
    program: str, p: Plan, seen: _Seen, *pointers: Tensor | None, numbers: tuple[float, ...], **options: Any
) -> None:  # fmt: skip
    """Launch a program over the tiles of a plan, on the input's device and its current stream."""
    # What the sizes that loads depend on are multiples of, up to 16: the compiler makes loads as wide as that allows.
    c_unit, i_unit = (gcd(seen.channels, 16), 1) if seen.inner == 1 else (1, gcd(seen.inner, 16))
    sizes = seen.outer, seen.last, seen.channels // c_unit, seen.inner // i_unit, seen.stride, p.per_part
    with _on(seen.device):
        getattr(_programs(), program)[p.blocks, p.parts](
            *pointers, *sizes, *numbers, **options, C_UNIT=c_unit, I_UNIT=i_unit, C_BLOCK=p.c_block,
            O_BLOCK=p.o_block, I_BLOCK=p.i_block, num_warps=p.warps,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _programs() -> Any:
    return import_module("batchnorm.kernels.gpu.programs")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter computes with NumPy, which warns of what a GPU does silently
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def _empty(x: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _statistic(t: Tensor) -> Tensor:
    """Mean or variance as the programs read it: float32 or float64, no gaps."""
    return (t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float64)).contiguous()


def _in_place(running: Running, device: torch.device) -> bool:
    """Whether the programs can update these running statistics themselves."""
    if isinstance(running.factor, Tensor):
        return False
    for t in (running.mean, running.var):
        if t.dtype not in (torch.float32, torch.float64) or not t.is_contiguous() or t.device != device:
            return False
    return running.batches is None or (running.batches.dtype == torch.int64 and running.batches.device == device)


def _changed(written: tuple[Tensor | None, ...]) -> None:
    """Tell autograd what was written by address, so that a graph that keeps it raises as it should."""
    try:  # noqa: SIM105  (a context manager costs as much again)
        torch._C._increment_version(tuple(t for t in written if t is not None))
    except RuntimeError:  # inference tensors have no version, and no graph keeps them
        pass
