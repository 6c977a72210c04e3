"""Merge the statistics of groups, and let the running statistics follow: ``Moments.pooled`` and ``Running.update``."""

from __future__ import annotations

import struct
from typing import Any, Final

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from batchnorm.kernels.contract import Running
from batchnorm.kernels.cpu.compiling import Kernel
from batchnorm.kernels.cpu.scalars import FLOAT32, INTERNAL, slot_float
from batchnorm.kernels.cpu.threads import launch

GROUPS: Final = 2
CHANNELS: Final = 3
STATS: Final = 4
"""float64 (groups, 2, channels): mean and biased variance."""
COUNTS: Final = 5
"""float64 (groups, channels)."""
WORK: Final = 6
"""float64 (3, channels): the merged count, mean and m2 are left there."""
MEAN: Final = 7
VAR: Final = 8
IS_DOUBLE: Final = 9
"""Whether MEAN and VAR are float64; else float32."""
BATCHES: Final = 10
FACTOR: Final = 11

_pack = struct.Struct("11qd").pack


def _pointer_to(name: str, value: types.Type, word: ir.Type) -> Any:
    @intrinsic
    def at(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], word.as_pointer())

        return types.CPointer(value)(types.int64), code

    at.__name__ = name
    return at


_doubles = _pointer_to("doubles", types.float64, ir.DoubleType())
_floats = _pointer_to("floats", types.float32, ir.FloatType())
_words = _pointer_to("words", types.int64, ir.IntType(64))


@njit(**INTERNAL)
def _merge(block, element):  # type: ignore[no-untyped-def]
    groups, channels = block[GROUPS], block[CHANNELS]
    stats, counts, work = _doubles(block[STATS]), _doubles(block[COUNTS]), _doubles(block[WORK])
    for i in range(3 * channels):
        work[i] = 0.0
    # About the first group's mean: groups with equal means then merge to exactly that mean.
    for g in range(groups):
        for c in range(channels):
            n = counts[g * channels + c]
            work[c] += n
            if n > 0:
                work[channels + c] += n * (stats[2 * g * channels + c] - stats[c])
    for c in range(channels):
        work[channels + c] = stats[c] + work[channels + c] / work[c]
    for g in range(groups):
        for c in range(channels):
            n = counts[g * channels + c]
            if n > 0:
                apart = stats[2 * g * channels + c] - work[channels + c]
                work[2 * channels + c] += n * (stats[(2 * g + 1) * channels + c] + apart * apart)
    factor = slot_float(block, FACTOR)
    for c in range(channels):
        mean, var = work[channels + c], work[2 * channels + c] / (work[c] - 1)
        if block[IS_DOUBLE] != 0:
            _follow(_doubles(block[MEAN]), c, mean, factor)
            _follow(_doubles(block[VAR]), c, var, factor)
        else:
            _follow(_floats(block[MEAN]), c, mean, factor)
            _follow(_floats(block[VAR]), c, var, factor)
    if block[BATCHES] != 0:
        _words(block[BATCHES])[0] += 1


@njit(**INTERNAL)
def _follow(r, c, value, factor):  # type: ignore[no-untyped-def]
    # Not by the formula with a factor of 1: a NaN in r would survive it.
    r[c] = value if factor == 1 else r[c] * (1 - factor) + value * factor


MERGE = Kernel("POOL", _merge, FLOAT32)


def follow(running: Running, stats: Tensor, counts: Tensor) -> bool:
    """Update running statistics by the groups' merged moments; False, with nothing done, where that is not for here.

    Arguments:
        stats: mean and biased variance, float64 (groups, 2, channels), without gaps
        counts: values a channel, float64 (groups, channels), without gaps
    """
    mean, var, factor, batches = running
    if isinstance(factor, Tensor) or mean.dtype != var.dtype or mean.dtype not in (torch.float32, torch.float64):
        return False
    if not (mean.is_contiguous() and var.is_contiguous()):
        return False
    if batches is not None and (batches.dtype != torch.int64 or not batches.is_cpu):
        return False
    groups, _, channels = stats.shape
    work = torch.empty((3, channels), dtype=torch.float64, device="cpu")
    packed = _pack(
        -1, 1, groups, channels, stats.data_ptr(), counts.data_ptr(), work.data_ptr(), mean.data_ptr(), var.data_ptr(),
        int(mean.dtype == torch.float64), 0 if batches is None else batches.data_ptr(), factor,
    )  # fmt: skip
    launch(MERGE, packed, 1)
    return True
