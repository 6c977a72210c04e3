"""Memory for large outputs: blocks of large pages that are used again and again.

The C library gives a large allocation back to the system when it is freed (always from 32 MiB on, often below) and maps
the next one anew. Writing to fresh memory faults once a page, and the system clears each page first: for a large output
that takes as long as the kernel. So outputs live in blocks that are kept here. When PyTorch frees the last tensor in a
block, the block comes back, and the next output of that size gets it. Blocks ask for pages of 2 MiB
(``MADV_HUGEPAGE``), which fault 512 times less often.

A tensor in a block is like any other: its storage can be resized, moved to shared memory and freed (``lending``).

What lies idle must never be the reason that a program runs out of memory:

- An idle block is marked (``MADV_FREE``). The system may take its pages when memory gets short, before it swaps
  or ends a process, also where a cgroup limits memory. An output that gets the block before that writes to it as it is.
- Where the process has a limit on its mappings (``RLIMIT_AS``, ``RLIMIT_DATA``) marks do not help, and nothing is kept.
- At most 384 MiB lie idle, and at most a sixteenth of what the process may have (``limits``). The block that has been
  idle longest goes first. ``BATCHNORM_IDLE_MIB`` sets another limit; with 0 there is no pool.
- When a block cannot be mapped, all that lies idle is given back before the second attempt. If that fails too, PyTorch
  allocates, and raises its own error where it cannot.

Only on Linux, which has these two kinds of advice. Elsewhere every output is an allocation of PyTorch's own.
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
"""Bytes from which an output comes from the pool."""

PAGE = 2 << 20
"""Bytes of a large page."""

MOST_IDLE = 384 << 20
"""Bytes that may lie idle: a training step on the largest tensors of the benchmark, with a residual, leaves 312 MiB."""

SHARE_IDLE = 16
"""At most one part in so many of the process's memory lies idle."""


class _Block:
    """A mapping of ``pages`` large pages, which counts as mapped in ``mapped`` for as long as it exists.

    Raises:
        OSError: there is no memory
    """

    __slots__ = ("idle_since", "mapped", "memory", "pages", "start")

    def __init__(self, pages: int, mapped: dict[int, int]) -> None:
        self.mapped = mapped
        self.pages = pages
        self.idle_since = 0
        size = (pages + 1) * PAGE  # one more, so that ``start`` can be where a large page begins
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.start = -ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) % PAGE
        mapped[id(self)] = pages * PAGE

    def __del__(self) -> None:
        self.mapped.pop(id(self), None)  # not there where the mapping failed


class Pool:
    """Blocks by their size.

    Every change is one operation that the interpreter does not interrupt, and there are no locks: a block may come back
    at any moment, in any thread, also while another is being taken. Whoever has taken a block out of its queue has it
    alone. A block that is dropped on the way, as by Ctrl-C, is unmapped like any object that nobody holds.
    """

    def __init__(self, most_idle: int, fields: lending.Fields) -> None:
        self.most_idle = most_idle
        self.watched = False
        self.highest = self.lowest = 0  # bytes in which tensors live, the most and the least since ``watch``
        self._fields = fields
        self._mapped: dict[int, int] = {}  # bytes of every block, idle or not
        self._idle: dict[int, deque[_Block]] = {}  # by pages; in each queue the last to come back is on the right
        self._clock = itertools.count()

    def lend(self, size: int, dtype: torch.dtype) -> Tensor | None:
        """A flat tensor of ``size`` bytes in a block, an idle one if there is one; None where there is no memory."""
        try:
            block = self._take(_pages_for(size))
        except OSError:
            return None
        loan = _loan_of(size).from_buffer(block.memory, block.start)
        loan.pool, loan.block = self, block
        if self.watched:
            self.highest = max(self.highest, self.leased())
        return lending.tensor_over(loan, dtype, self._fields)

    def _take(self, pages: int) -> _Block:
        try:
            return self._idle[pages].pop()
        except (KeyError, IndexError):  # none of that size lies idle
            pass
        try:
            return _Block(pages, self._mapped)
        except OSError:
            self.release()
            return _Block(pages, self._mapped)

    def give(self, block: _Block) -> None:
        """Take a block back from the tensor that lived in it."""
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
        """Give all that lies idle back to the system."""
        self._idle.clear()

    def watch(self) -> None:
        """Keep the most and the least bytes that are leased from now on, in ``highest`` and ``lowest``."""
        self.watched = True
        self.highest = self.lowest = self.leased()

    def idle(self) -> int:
        """Bytes that lie idle."""
        return sum(pages * len(queue) for pages, queue in list(self._idle.items())) * PAGE

    def leased(self) -> int:
        """Bytes in which tensors live."""
        return sum(list(self._mapped.values())) - self.idle()

    def _drop_longest_idle(self) -> None:
        # Queues may be empty, and another thread may empty one at any moment.
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
    """Pages of a block for ``size`` bytes: up to an eighth more than needed, so that like sizes share blocks.

    >>> [_pages_for(mib << 20) for mib in (1, 8, 30, 98, 99)]
    [1, 4, 15, 52, 52]
    """
    pages = -(-size // PAGE)
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step


class _Loan:
    """A buffer over part of a block, which PyTorch holds for as long as a storage lives there."""

    pool: Pool  # where the block came from and goes back to
    block: _Block

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.pool.give(self.block)


@lru_cache(maxsize=256)
def _loan_of(size: int) -> Any:
    """The ctypes array of ``size`` bytes that is a loan."""
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
        _Block(1, {}).memory.madvise(mmap.MADV_FREE)
    except OSError:  # a kernel that was built without one of them
        return False
    return True


def _default_most_idle() -> int:
    memory = limits.memory()
    return MOST_IDLE if memory is None else min(MOST_IDLE, memory // SHARE_IDLE)


pool = _find_pool()


def large_empty(like: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A new tensor of ``like``'s shape and dtype with these strides, which leave no gaps, in a block of the pool.

    Where there is no pool, or no memory for it, PyTorch allocates it.

    >>> import torch
    >>> large_empty(torch.ones(2, 3), (1, 2)).stride()
    (1, 2)
    """
    flat = None if pool is None else pool.lend(like.numel() * like.element_size(), like.dtype)
    if flat is None:
        return torch.empty_strided(like.shape, strides, dtype=like.dtype, device="cpu")
    # In place, since a view that is made without a graph cannot be changed in place under one.
    return flat.as_strided_(like.shape, strides)
