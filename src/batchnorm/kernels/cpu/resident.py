"""Pages of a library that are not needed for now.

LLVM is needed to compile a kernel or to load it from the cache, which touches 50 to 70 MiB of its code, and not again
until the next kernel. Its pages come from a file, so the system could take them back at any time, but until it does
they count as resident memory of this process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

_PAGEMAP = Path("/proc/self/pagemap")
_MAPS = Path("/proc/self/maps")
_PAGE = mmap.PAGESIZE

# Bits of an entry of pagemap, see Documentation/admin-guide/mm/pagemap.rst of Linux.
_PRESENT = np.uint64(1 << 63)
_OF_A_FILE = np.uint64(1 << 61)

_DONTNEED = 4  # MADV_DONTNEED of Linux


def release_code(library: str) -> int:
    """Release the code of a library that this process has loaded; returns the bytes that were resident.

    The pages stay in the system's page cache, and return with the next call into the library. Only pages that are as
    they are in the file are released: code that a debugger or a relocation has changed stays.

    Arguments:
        library: the file's name, or the beginning of it
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return sum(_release(start, end) for start, end in _code_of(library))
    except OSError:  # no /proc
        return 0


@lru_cache(maxsize=8)
def _code_of(library: str) -> tuple[tuple[int, int], ...]:
    """First and last address of each mapping of the library's code. A library that was loaded stays where it is."""
    found = []
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("r-x") and Path(fields[5]).name.startswith(library):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, end))
    return tuple(found)


def _release(start: int, end: int) -> int:
    with _PAGEMAP.open("rb") as file:
        file.seek(start // _PAGE * 8)
        pages = np.frombuffer(file.read((end - start) // _PAGE * 8), dtype=np.uint64)
    present = pages & _PRESENT != 0
    if (present & (pages & _OF_A_FILE == 0)).any() or not present.any():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return int(present.sum()) * _PAGE if madvise(start, end - start, _DONTNEED) == 0 else 0
