"""Run a compiled kernel on PyTorch's own threads.

PyTorch's thread pool is that of the OpenMP library it is linked with. ``GOMP_parallel(function, data,
threads, 0)`` of that library calls ``function(data)`` on every thread of the pool: one foreign call of
about a microsecond, no second pool whose threads would fight with PyTorch's for the cores, and
``torch.set_num_threads`` is honoured. ctypes releases the interpreter lock while it runs.

Where PyTorch has no such library (Windows), a pool of Python threads does the same, each calling the kernel
through ctypes, which costs some tens of microseconds more. It is not Numba's own pool: its default layer
ends the process when two Python threads call it at once.

In a forked child everything runs on one thread: the pool's threads do not exist there, and libgomp would
wait for them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from batchnorm.kernels.cpu.compiling import Kernel

ALONE_BELOW = 48 * 1024
"""Tensors with fewer elements run on one thread: waking the pool costs as much as it would save."""

_forked = False


def threads_for(elements: int) -> int:
    """How many threads a tensor with this many elements is worth, now.

    >>> threads_for(6000)
    1
    """
    if elements < ALONE_BELOW or _forked:
        return 1
    return torch.get_num_threads()


def launch(kernel: Kernel, block: bytes, threads: int) -> None:
    """Run the kernel on the block with at most this many threads and return when all are done.

    ``threads`` must be the number packed in the block's slot THREADS, and slot THREAD must be -1. A pool
    may hand out
    fewer threads than asked for (nested regions, ``OMP_DYNAMIC``); kernels ask for the true number
    themselves.
    """
    address = kernel.address or kernel.compile()
    if threads == 1:
        kernel.alone(block)
    elif _parallel is not None:
        _parallel(address, block, threads, 0)
    else:
        _run_in_python_threads(kernel, block, threads)


@lru_cache(maxsize=1)
def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch is linked with, or None where it cannot run our kernels.

    Names looked up through libtorch_cpu resolve in its own dependencies, whatever the library is called and
    however
    many other OpenMP libraries (scikit-learn's, Numba's) the process has loaded.
    """
    if sys.platform == "win32" or not torch.backends.openmp.is_available():
        return None
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        found = ctypes.CDLL(str(library))
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
            getattr(found, name)
    except (OSError, AttributeError):
        return None
    return found


def explain() -> str:
    """One line for people: which threads run the kernels, and how many."""
    if _forked:
        return "one thread (this process is a forked child)"
    pool = (
        "PyTorch's OpenMP pool"
        if _parallel is not None
        else "a pool of Python threads (PyTorch has no OpenMP pool to call)"
    )
    return f"{pool}, {torch.get_num_threads()} thread(s); one below {ALONE_BELOW} elements"


def _find_parallel() -> Any:
    library = openmp()
    if library is None:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_parallel = _find_parallel()


# Where there is no OpenMP pool to call

_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pack_thread = struct.Struct("q").pack


def _run_in_python_threads(kernel: Kernel, block: bytes, threads: int) -> None:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="batchnorm")
        pool = _pool
    rest = block[8:]
    others = [pool.submit(kernel.alone, _pack_thread(thread) + rest) for thread in range(1, threads)]
    kernel.alone(_pack_thread(0) + rest)
    for other in others:
        other.result()


def _after_fork_in_child() -> None:
    global _forked, _pool, _pool_lock
    _forked = True
    _pool = None
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
