"""Large pages for large outputs.

The C library maps an allocation above 32 MiB anew each time. Writing to it for the first time then faults once per
page of 4 KiB, which takes several times as long as a kernel; with pages of 2 MiB it is a fraction of that. Linux
gives them where it is asked (``MADV_HUGEPAGE``), unless they are switched off for the whole machine. The mapping is
the tensor's own and goes when it is freed, so nothing of this outlives it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

from torch import Tensor

LARGE = 32 << 20
"""Bytes from which an allocation is a mapping of its own."""

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
