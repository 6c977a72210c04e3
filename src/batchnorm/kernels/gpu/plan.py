"""How a tensor is cut into programs, for each operation and shape.

The table is reasoned, not measured: no GPU was at hand when it was written. With ``BATCHNORM_TUNE=1`` in the
environment ``tuning`` measures candidates for each new problem, and what it found takes the table's place. The table
reasons from three things. Loads should be 16 bytes a thread and 128 bytes side by side. Registers decide how many warps
a multiprocessor keeps, and warps how many loads are in flight; the compiler's counts for an H100 are known. A launch
takes as long as the card moves some megabytes.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch

TILE = 16384  # bytes of a tile in a sweep: two loads for each of 512 threads
FUSED = ("forward", "backward")
SLAB = 16384  # most values of a tile that holds all values of its channels: more do not fit into registers
SMALL = 65536  # values of a tensor that a few programs normalize before a second launch would have begun
LINE, SECTOR = 128, 32  # bytes of a line of the second-level cache, and the least that is read from memory
WAVES = 4  # programs a multiprocessor in a sweep
MERGED = 2048  # most triples of float64 that each program of the next launch merges; for more there is a launch
TUNE = os.environ.get("BATCHNORM_TUNE") == "1"


class Problem(NamedTuple):
    """An operation ("forward" and "backward", fused; "moments", "normalize", "sums", "input") on a dense tensor."""

    operation: str
    groups: int
    outer: int  # of one group
    channels: int
    inner: int
    dtype: torch.dtype
    device: torch.device


class Plan(NamedTuple):
    """The tile of a program (powers of two), its warps, the tiles it walks over, and how many programs there are."""

    c_block: int
    o_block: int
    i_block: int
    warps: int
    per_part: int
    parts: int
    blocks: int  # of channels, in all groups
    fused: bool = False  # a tile holds all values of its channels


measured: dict[Problem, Plan] = {}


def find(problem: Problem) -> Plan:
    """The plan for a problem: measured where that was done or is wanted, else by the table."""
    if TUNE and problem not in measured and problem.device.type != "cpu":
        from batchnorm.kernels.gpu import tuning

        tuning.measure(problem)
    return measured.get(problem) or by_table(problem)


@lru_cache(maxsize=4096)
def by_table(problem: Problem, tile_bytes: int = TILE, waves: int = WAVES) -> Plan:
    """The reasoned plan.

    >>> cpu = torch.device("cpu")
    >>> by_table(Problem("forward", 1, 64, 512, 49, torch.bfloat16, cpu))
    Plan(c_block=2, o_block=64, i_block=64, warps=16, per_part=1, parts=1, blocks=256, fused=True)
    >>> by_table(Problem("moments", 1, 802816, 64, 1, torch.bfloat16, cpu))[:3]
    (64, 128, 1)
    """
    operation, groups, outer, channels, inner, dtype, device = problem
    side_by_side, tile = LINE // dtype.itemsize, tile_bytes // dtype.itemsize
    i_block = min(power(inner), tile)
    # Rows shorter than a line: several channels, whose rows lie side by side.
    c_block = min(power(channels), power(-(-side_by_side // inner)))
    if operation in FUSED:
        # One launch, where a tile takes all values of some channels and enough programs are left for the processors.
        values = power(outer) * power(inner)
        c_block = min(c_block, SLAB // values)
        few = 2 * groups * channels < processors(device) * c_block and groups * outer * channels * inner > SMALL
        narrow = c_block * inner * dtype.itemsize < min(SECTOR, channels * inner * dtype.itemsize)
        far = groups * outer * channels * inner >= 2**30
        if c_block == 0 or few or narrow or far:
            return cut(problem, 1, 1, 1)
        return cut(problem, c_block, power(outer), power(inner))._replace(fused=True)
    o_block = min(power(outer), max(1, tile // (c_block * i_block)))
    if groups * channels >= 2 * c_block * processors(device):  # few values a channel: more channels, not fewer warps
        c_block = min(power(channels), c_block * max(1, tile // (c_block * o_block * i_block)))
    return cut(problem, c_block, o_block, i_block, waves)


def cut(problem: Problem, c_block: int, o_block: int, i_block: int, waves: int = WAVES) -> Plan:
    """A plan with these tiles (fewer rows where offsets within a tile would not fit into 32 bits) and enough parts."""
    o_block = min(o_block, max(1, power(2**30 // (problem.channels * problem.inner) + 1) // 2))
    blocks = problem.groups * -(-problem.channels // c_block)
    tiles = -(-problem.outer // o_block) * -(-problem.inner // i_block)
    per_part = -(-tiles // min(tiles, max(1, -(-waves * processors(problem.device) // blocks))))
    warps = min(16, max(1, c_block * o_block * i_block // 512))  # 16 values a thread
    return Plan(c_block, o_block, i_block, warps, per_part, -(-tiles // per_part), blocks)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units, Xe cores) the device has; 1 under the interpreter."""
    if device.type == "cpu":
        return 1
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
