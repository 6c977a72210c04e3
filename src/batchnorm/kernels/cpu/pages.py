"""Large pages for large outputs.

The C library gives large allocations back to the system when they are freed and maps them anew each time. Writing to
fresh memory faults once per page of 4 KiB, which for a large output takes several times as long as a kernel; with
pages of 2 MiB it is a fraction of that. Linux gives them where it is asked (``MADV_HUGEPAGE``), unless they are
switched off for the whole machine.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

from torch import Tensor

LARGE = 8 << 20
"""Bytes from which it is worth a system call."""

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def prefer_large(fresh: Tensor) -> Tensor:
    """Ask for large pages for a dense tensor that was just allocated and is not written yet. Gives the tensor.

    >>> import torch
    >>> prefer_large(torch.empty(3)).shape
    torch.Size([3])
    """
    size = fresh.numel() * fresh.element_size()
    if size > LARGE and _madvise is not None:
        start = fresh.data_ptr()
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(first, last - first, _ADVICE)  # advice: where it is not taken, pages are small as ever
    return fresh


def _find_madvise() -> Any:
    if not sys.platform.startswith("linux") or _ADVICE is None:
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found


_madvise = _find_madvise()
