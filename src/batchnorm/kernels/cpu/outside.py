"""Channel outside (NCHW, NCL, NCDHW): which kernels serve a tensor, and the workspace that they need.

The tensor is seen as (outer, channel, inner) with the inner dimension contiguous. ``family(outer, inner)`` is the
module whose FORWARD, MOMENTS, NORMALIZE, BACKWARD, BACKWARD_SUMS and BACKWARD_INPUT serve it: dicts from the dtype's
name to a kernel. When to split a launch in phases is told in outside_long; masked
kernels are never split.
"""

from __future__ import annotations

from types import ModuleType

from batchnorm.kernels.cpu import outside_long, outside_masked, outside_short
from batchnorm.kernels.cpu.outside_rows import CHUNK, chunk_count
from batchnorm.kernels.cpu.outside_runs import LONGEST, samples_in_chunk


def family(outer: int, inner: int, masked: bool = False) -> ModuleType:
    """The kernels for rows of this length in a batch of this size; masked: with a mask or sample weights."""
    if masked:
        return outside_masked
    return outside_short if 0 < inner <= LONGEST and outer >= 4 else outside_long


def scratch(outer: int, channels: int, inner: int) -> int:
    """How many float64 values SCRATCH holds when a launch is split in phases."""
    short = family(outer, inner) is outside_short
    chunks = -(-outer // samples_in_chunk(inner)) if short else chunk_count(outer, inner)
    return 2 * channels * int(chunks)


def in_phases(outer: int, channels: int, inner: int, threads: int) -> bool:
    """Whether a launch is better split: too few channels to keep all threads busy, and much to do."""
    rounds = -(-channels // threads)
    return threads > 1 and rounds * threads > 1.25 * channels and outer * channels * inner >= 8 * CHUNK * threads
