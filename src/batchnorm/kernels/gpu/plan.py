"""How a tensor is cut into programs, for each operation and shape.

The table below was reasoned, not measured: no GPU was at hand when it was written. ``tuning.py`` measures candidates
and its findings take the place of the table. What was reasoned from:

- loads of 16 bytes a thread, 128 bytes or more side by side in memory, and tiles of 16 to 32 KiB of registers;
- four programs of eight warps on each processor keep enough loads in flight;
- a launch costs about as much as the card moves in 2 µs, so small tensors take one launch on few programs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

ROW_BYTES = 128
"""Values side by side in memory that a tile should have at least: a line of the second-level cache."""
TILE = 8192
"""Values in a tile of a sweep."""
SLAB = {"forward": 32768, "backward": 16384}
"""Most values of a tile that holds all of its channels' values: registers for one tensor, or for x and dy."""
SMALL = 65536
"""Values of a tensor that few programs normalize in less time than a second launch takes."""
WAVES = 4
"""Programs a processor in a sweep."""
MERGED = 2048
"""Most float64 triples that each program of the next launch merges; above them a launch of its own does it."""
INTERPRETED_PROCESSORS = 1
"""Few under Triton's interpreter, which runs program after program."""


class Problem(NamedTuple):
    """A tensor as the programs see it."""

    operation: str  # "forward" and "backward" (fused), "moments", "normalize", "sums", "input"
    groups: int
    outer: int  # of one group
    channels: int
    inner: int
    dtype: torch.dtype
    device: torch.device


class Plan(NamedTuple):
    """How it is cut."""

    c_block: int
    o_block: int
    i_block: int
    warps: int
    per_part: int  # tiles
    parts: int
    blocks: int  # of channels, in all groups
    fused: bool = False  # a tile holds all values of its channels

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks, self.parts

    @property
    def merges(self) -> bool:
        """Whether the programs of the next launch can merge the parts themselves."""
        return self.parts * self.c_block <= MERGED


def find(problem: Problem) -> Plan:
    """The plan for a problem: measured where ``tuning`` has done so, else by the table."""
    return measured.get(problem) or by_table(problem)


measured: dict[Problem, Plan] = {}


@lru_cache(maxsize=4096)
def by_table(problem: Problem) -> Plan:
    """The reasoned choice.

    >>> cpu = torch.device("cpu")
    >>> by_table(Problem("forward", 1, 64, 512, 49, torch.bfloat16, cpu))[:3]
    (8, 64, 64)
    >>> by_table(Problem("moments", 1, 802816, 64, 1, torch.bfloat16, cpu))[:3]
    (64, 128, 1)
    """
    operation, groups, outer, channels, inner, dtype, device = problem
    if operation in SLAB:
        plan = _fused(problem)
        return plan or cut(problem, 1, 1, 1)
    beside = max(1, ROW_BYTES // dtype.itemsize)
    i_block = min(power(inner), TILE)
    # Short rows: several channels, whose rows lie side by side.
    c_block = min(power(channels), power(-(-beside // inner)) if inner < beside else 1)
    o_block = min(power(outer), max(1, TILE // (c_block * i_block)))
    if c_block * o_block * i_block < TILE:
        # Few values a channel: more channels a program, as long as every processor has one.
        room = TILE // (c_block * o_block * i_block)
        spare = max(1, groups * channels // (c_block * processors(device)))
        c_block = min(power(channels), c_block * min(room, power(spare + 1) // 2))
    return cut(problem, c_block, o_block, i_block)


def _fused(problem: Problem) -> Plan | None:
    """One launch, where all values of some channels fit into a tile and enough programs are left."""
    operation, groups, outer, channels, inner, dtype, device = problem
    values, most = power(outer) * power(inner), SLAB[operation]
    if values > most:
        return None
    beside = max(1, ROW_BYTES // 4 // dtype.itemsize)  # a sector of memory: the least that is read
    c_block = min(power(channels), most // values, power(-(-beside // inner)))
    blocks = groups * -(-channels // c_block)
    if 2 * blocks < processors(device) and groups * outer * channels * inner > SMALL:
        return None
    if c_block * inner < beside <= channels * inner:
        return None  # half of what is read would be thrown away
    while 2 * c_block * values <= most // 4 and c_block < channels and blocks > WAVES * processors(device):
        c_block *= 2
        blocks = groups * -(-channels // c_block)
    return cut(problem, c_block, power(outer), power(inner))._replace(fused=True)


def cut(problem: Problem, c_block: int, o_block: int, i_block: int, waves: int = WAVES) -> Plan:
    """A plan with these tiles, and as many parts as keep the processors busy."""
    _, groups, outer, channels, inner, _, device = problem
    blocks = groups * -(-channels // c_block)
    tiles = -(-outer // o_block) * -(-inner // i_block)
    parts = min(tiles, max(1, -(-waves * processors(device) // blocks)))
    per_part = -(-tiles // parts)
    warps = min(16, max(1, c_block * o_block * i_block // 1024))
    return Plan(c_block, o_block, i_block, warps, per_part, -(-tiles // per_part), blocks)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units, Xe cores) the device has."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
