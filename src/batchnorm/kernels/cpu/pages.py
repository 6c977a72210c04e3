"""Memory for large outputs: a pool of blocks in large pages.

The C library returns a large allocation to the system when it is freed (always from 32 MiB on, often below), and maps
the next one anew. The first write to each fresh page faults, and the system clears the page: for a large output that
takes as long as the kernel. So outputs live in blocks that are kept here. When PyTorch frees the last tensor in a
block, the block returns to the pool, and the next output of that size gets the block that was returned last, which is
the one most likely to be in the cache. Blocks ask for pages of 2 MiB (``MADV_HUGEPAGE``), which fault 512 times less
often. What is left of an output after its last whole large page lies in small pages, so that it occupies no more memory
than it needs.

A tensor in a block is like any other: its storage can be resized, moved to shared memory and freed (``lending``).

Idle memory must never make a program run out of memory:

- An idle block is marked (``MADV_FREE``). The system may take its pages when memory gets short, before it swaps or
  kills a process, also where a cgroup limits memory. An output that gets the block before then writes to it as it is.
- Where the process has a limit on its mappings (``RLIMIT_AS``, ``RLIMIT_DATA``) marking does not help, and no block is
  kept.
- At most 384 MiB are idle, and at most a sixteenth of what the process may have (``limits``). The block that has been
  idle longest is dropped first. ``BATCHNORM_IDLE_MIB`` sets another limit; with 0 there is no pool.
- When a block cannot be mapped, all idle blocks are released before the second attempt. If that fails too, PyTorch
  allocates, and raises its own error if it cannot.

Only on Linux, which has these two kinds of advice. Elsewhere PyTorch allocates every output.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, expected
from batchnorm.kernels.cpu import lending, limits

LARGE = 4 << 20
"""Outputs of this many bytes or more come from the pool."""

PAGE = 2 << 20
"""Bytes of a large page."""

MOST_IDLE = 384 << 20
"""Most bytes that may be idle. A training step on the benchmark's largest tensors, with a residual, leaves 312 MiB."""

SHARE_IDLE = 16
"""At most one part in this many of the process's memory may be idle."""


class _Block:
    """A mapping with room for an output of ``size`` bytes, registered in ``mapped`` for as long as it exists.

    The whole pages of that first output are large ones.

    Raises:
        OSError: there is no memory
    """

    __slots__ = ("idle_since", "mapped", "memory", "pages", "start")

    def __init__(self, size: int, mapped: dict[int, int]) -> None:
        self.mapped = mapped
        self.pages = _pages_for(size)
        self.idle_since = 0
        room = (self.pages + 1) * PAGE  # one more, so that ``start`` can be where a large page begins
        self.memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = -ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) % PAGE
        whole = size - size % PAGE
        if whole:
            self.memory.madvise(mmap.MADV_HUGEPAGE, self.start, whole)
        mapped[id(self)] = self.pages * PAGE

    def __del__(self) -> None:
        self.mapped.pop(id(self), None)  # missing if the mapping failed


class Pool:
    """Blocks by their size.

    There are no locks. A block may be returned at any moment, in any thread, also while another one is being taken, so
    every change is one operation that the interpreter does not interrupt. Popping a block from its queue gives
    exclusive ownership. A block that is dropped on the way, for example by Ctrl-C, is unmapped like any object without
    references.
    """

    def __init__(self, most_idle: int, fields: lending.Fields) -> None:
        self.most_idle = most_idle
        self.watched = False
        self.highest = self.lowest = 0  # most and least bytes leased since ``watch``
        self._fields = fields
        self._mapped: dict[int, int] = {}  # bytes of every block, idle or not
        self._idle: dict[int, deque[_Block]] = {}  # by pages; the block returned last is on the right
        self._clock = itertools.count()

    def lend(self, size: int, dtype: torch.dtype) -> Tensor | None:
        """A flat tensor of ``size`` bytes in an idle block, or in a new one; None if there is no memory."""
        try:
            block = self._take(size)
        except OSError:
            return None
        loan = _loan_of(size).from_buffer(block.memory, block.start)
        loan.pool, loan.block = self, block
        if self.watched:
            self.highest = max(self.highest, self.leased())
        return lending.tensor_over(loan, dtype, self._fields)

    def _take(self, size: int) -> _Block:
        try:
            return self._idle[_pages_for(size)].pop()
        except (KeyError, IndexError):  # no block of that size is idle
            pass
        try:
            return _Block(size, self._mapped)
        except OSError:
            self.release()
            return _Block(size, self._mapped)

    def give(self, block: _Block) -> None:
        """Return a block whose last tensor was freed."""
        if self.watched:
            self.lowest = min(self.lowest, self.leased() - block.pages * PAGE)
        if limits.address_space_is_limited():
            self.release()
            return
        block.memory.madvise(mmap.MADV_FREE)
        block.idle_since = next(self._clock)
        self._idle.setdefault(block.pages, deque()).append(block)
        while self.idle() > self.most_idle:
            self._drop_longest_idle()

    def release(self) -> None:
        """Unmap all idle blocks."""
        self._idle.clear()

    def watch(self) -> None:
        """Record the most and the least bytes leased from now on, in ``highest`` and ``lowest``."""
        self.watched = True
        self.highest = self.lowest = self.leased()

    def idle(self) -> int:
        """Bytes of all idle blocks."""
        return sum(pages * len(queue) for pages, queue in list(self._idle.items())) * PAGE

    def leased(self) -> int:
        """Bytes of all blocks that hold a tensor."""
        return sum(list(self._mapped.values())) - self.idle()

    def _drop_longest_idle(self) -> None:
        # A queue may be empty, and another thread may empty one at any moment.
        oldest, least = None, 0
        for queue in list(self._idle.values()):
            with suppress(IndexError):
                since = queue[0].idle_since
                if oldest is None or since < least:
                    oldest, least = queue, since
        with suppress(IndexError):
            if oldest is not None:
                oldest.popleft()


def _pages_for(size: int) -> int:
    """Pages of a block for ``size`` bytes: up to an eighth more than needed, so that similar sizes share blocks.

    >>> [_pages_for(mib << 20) for mib in (1, 8, 30, 98, 99)]
    [1, 4, 15, 52, 52]
    """
    pages = -(-size // PAGE)
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step


class _Loan:
    """A buffer over part of a block, held by the PyTorch storage that uses it; returns the block when it is freed."""

    pool: Pool  # that the block belongs to
    block: _Block

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.pool.give(self.block)


@lru_cache(maxsize=256)
def _loan_of(size: int) -> Any:
    """The class of loans of ``size`` bytes: a ctypes array."""
    return type("_Loan", (_Loan, ctypes.Array), {"_type_": ctypes.c_char, "_length_": size})


def _find_pool() -> Pool | None:
    mib = os.environ.get("BATCHNORM_IDLE_MIB", "")
    if mib and not mib.isdecimal():
        raise ArgumentError(expected("BATCHNORM_IDLE_MIB", "a whole number of MiB", repr(mib), "Correct or unset it."))
    most_idle = int(mib) << 20 if mib else _default_most_idle()
    fields = lending.find()
    return Pool(most_idle, fields) if most_idle > 0 and fields is not None and _system_takes_advice() else None


def _system_takes_advice() -> bool:
    if not (sys.platform.startswith("linux") and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")):
        return False
    try:
        _Block(PAGE, {}).memory.madvise(mmap.MADV_FREE)
    except OSError:  # a system that was built without one of them
        return False
    return True


def _default_most_idle() -> int:
    memory = limits.memory()
    return MOST_IDLE if memory is None else min(MOST_IDLE, memory // SHARE_IDLE)


pool = _find_pool()


def large_empty(like: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A new tensor of ``like``'s shape and dtype with these dense strides, in a block of the pool.

    PyTorch allocates it where there is no pool, or no memory for a block.

    >>> import torch
    >>> large_empty(torch.ones(2, 3), (1, 2)).stride()
    (1, 2)
    """
    flat = None if pool is None else pool.lend(like.numel() * like.element_size(), like.dtype)
    if flat is None:
        return torch.empty_strided(like.shape, strides, dtype=like.dtype, device="cpu")
    # In place: a view that was made without a graph cannot be changed in place inside one.
    return flat.as_strided_(like.shape, strides)
