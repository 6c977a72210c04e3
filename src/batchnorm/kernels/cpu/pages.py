"""Memory for large outputs: blocks of large pages, used again and again.

The C library gives a large allocation back to the system when it is freed (always from 32 MiB on, often below), and
maps the next one anew. Writing to fresh memory faults once a page, and the system clears each page first: for a large
output that takes as long as the kernel. So an output is a lease of a block that is kept here; the block comes back when
PyTorch frees the last tensor in it, and the next output of that size gets it. Blocks ask for pages of 2 MiB
(``MADV_HUGEPAGE``), which fault 512 times less often.

What lies idle beyond 64 MiB is marked as free for the taking (``MADV_FREE``): the next output can use it as it is, and
the system takes it back as soon as memory gets short. ``BATCHNORM_IDLE_MIB`` says how much may lie idle, 1024 if it is
not set; with 0 there is no pool, and every output is an allocation of PyTorch's own. Only on Linux, where there are
these two advices.

A tensor that lives in a block is like any other, but its storage cannot grow (``resize_`` to more elements).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, expected

LARGE = 4 << 20
"""Bytes from which an output comes from the pool."""

PAGE = 2 << 20
"""Bytes of a large page."""

KEPT = 64 << 20
"""Bytes that lie idle as they are: marking costs as much as a small kernel where other threads have to be told."""


class _Block:
    """Whole large pages, so many."""

    __slots__ = ("memory", "pages", "start")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        size = (pages + 1) * PAGE  # one more, so that it can begin where a large page does
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.start = -ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) % PAGE


class Pool:
    """Blocks, by their size. Every change is one operation that the interpreter does not interrupt, and there are no
    locks: a block may come back at any moment, in any thread, also while another is being taken. Who has taken a block
    out of its queue has it alone.
    """

    def __init__(self, most_idle: int, most_kept: int = KEPT) -> None:
        self.most_idle, self.most_kept = most_idle, most_kept
        self.highest = self.lowest = 0  # bytes leased, the most and the least since ``watch``
        self._leased: dict[int, int] = {}
        self._kept: dict[int, deque[_Block]] = {}  # idle, as they came back
        self._free: dict[int, deque[_Block]] = {}  # idle, and the system may take their memory

    def take(self, size: int) -> _Block:
        """A block of at least so many bytes, one that lay idle if there is one.

        Raises:
            OSError: there is no memory
        """
        pages = _pages_for(size)
        block = _last_of(self._kept, pages) or _last_of(self._free, pages) or _Block(pages)
        self._leased[id(block)] = pages * PAGE
        self.highest = max(self.highest, self.leased())
        return block

    def give(self, block: _Block) -> None:
        """Have a block back. What is too much of it to keep is marked as free, what is too much idle dropped."""
        self._leased.pop(id(block), None)
        self.lowest = min(self.lowest, self.leased())
        self._kept.setdefault(block.pages, deque()).append(block)
        while _bytes_in(self._kept) > self.most_kept:
            large = _first_of(self._kept)
            if large is not None:
                large.memory.madvise(mmap.MADV_FREE)
                self._free.setdefault(large.pages, deque()).append(large)
        while self.idle() > self.most_idle:
            _ = _first_of(self._free) or _first_of(self._kept)

    def watch(self) -> None:
        """From now on ``highest`` and ``lowest`` are those of what is leased."""
        self.highest = self.lowest = self.leased()

    def idle(self) -> int:
        """Bytes that lie idle."""
        return _bytes_in(self._kept) + _bytes_in(self._free)

    def leased(self) -> int:
        """Bytes in which tensors live."""
        return sum(list(self._leased.values()))


def _pages_for(size: int) -> int:
    """How many pages so many bytes get: up to an eighth too many, so that like sizes use the same blocks.

    >>> [_pages_for(mib << 20) for mib in (1, 8, 30, 98, 99)]
    [1, 4, 15, 52, 52]
    """
    pages = -(-size // PAGE)
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step


def _bytes_in(blocks: dict[int, deque[_Block]]) -> int:
    return sum(pages * len(queue) for pages, queue in list(blocks.items())) * PAGE


def _last_of(blocks: dict[int, deque[_Block]], pages: int) -> _Block | None:
    """The block of that size that came last, taken out."""
    try:
        return blocks[pages].pop()
    except (KeyError, IndexError):
        return None


def _first_of(blocks: dict[int, deque[_Block]]) -> _Block | None:
    """The block of the largest size that came first, taken out."""
    for pages in sorted(blocks, reverse=True):
        try:
            return blocks[pages].popleft()
        except IndexError:
            continue
    return None


def _find_pool() -> Pool | None:
    if not (sys.platform.startswith("linux") and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")):
        return None
    mib = os.environ.get("BATCHNORM_IDLE_MIB") or "1024"
    if not mib.isdecimal():
        raise ArgumentError(expected("BATCHNORM_IDLE_MIB", "a whole number of MiB", repr(mib), "Correct or unset it."))
    return Pool(int(mib) << 20) if int(mib) > 0 else None


pool = _find_pool()


class _Lease:
    """A buffer over part of a block, and what PyTorch holds on to while a tensor lives in it."""

    pool: Pool  # where the block came from, and goes back to
    block: _Block

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.pool.give(self.block)


@lru_cache(maxsize=256)
def _lease_of(size: int) -> Any:
    """The ctypes array of this size that is a lease."""
    return type("_Lease", (_Lease, ctypes.Array), {"_type_": ctypes.c_char, "_length_": size})


def large_empty(like: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A new tensor of ``like``'s shape and dtype with these strides, which leave no gaps, in a block of the pool.

    Where there is no pool, or no memory for it, PyTorch allocates it.

    >>> import torch
    >>> large_empty(torch.ones(2, 3), (1, 2)).stride()
    (1, 2)
    """
    if pool is None:
        return torch.empty_strided(like.shape, strides, dtype=like.dtype)
    size = like.numel() * like.element_size()
    try:
        block = pool.take(size)
    except OSError:
        return torch.empty_strided(like.shape, strides, dtype=like.dtype)
    lease = _lease_of(size).from_buffer(block.memory, block.start)
    lease.pool, lease.block = pool, block
    # Not a view of the flat tensor: those that are made without a graph cannot be changed in place under one.
    flat = torch.frombuffer(lease, dtype=like.dtype)
    return torch.empty(0, dtype=like.dtype).set_(flat.untyped_storage(), 0, like.shape, strides)
