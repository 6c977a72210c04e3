"""Compile a kernel at its first use, and keep the machine code on disk.

Numba's cache goes beside the source (``__pycache__``), or to the user's cache folder where that cannot be
written, or to ``NUMBA_CACHE_DIR``. Where none of them can be written, kernels are compiled anew in each
process (some seconds in all) and one warning says so.

Numba looks for changes in the one file that a kernel stands in. Kernels here also depend on the files
beside it, so a digest of all of them is part of each kernel's key.

A file of the cache that was cut off (a full disk, a process that was ended) or holds something else is no reason to
fail: the kernel is compiled anew and the file replaced.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import int64, types
from numba.core.caching import FunctionCache

from batchnorm.kernels.cpu.block import THREAD, THREADS
from batchnorm.kernels.cpu.resident import release_code
from batchnorm.kernels.cpu.scalars import ELEMENTS, INTERNAL, Element
from batchnorm.kernels.cpu.threads import openmp

FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
"""What sums may use: LLVM may reorder them, but NaN and Inf stay what they are."""

OPTIONS = {"nopython": True, "error_model": "numpy"}
"""Of a kernel's entry, and so of the body that is pasted into it: dividing by 0 is no Python error."""

_SIGNATURE = types.void(types.CPointer(types.int64))
_direct = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_lock = threading.Lock()
_warned = False


class Kernel:
    """One kernel for one element type. ``body(block, element)`` is a Numba function, not compiled yet."""

    __slots__ = ("_body", "_compiled", "_name", "address", "alone", "element")

    def __init__(self, name: str, body: Any, element: Element) -> None:
        self._name = name
        self._body = body
        self.element = element
        self._compiled: Any = None  # keeps the machine code alive
        self.address = 0
        self.alone: Callable[[bytes], object] = self._compile_and_run

    def __repr__(self) -> str:
        return f"<kernel {self._name}, {self.element.name}, {'compiled' if self.address else 'not compiled'}>"

    def compile(self) -> int:
        """Compile, or load from the cache on disk, and return the address of the C function."""
        with _lock:
            if not self.address:
                _declare_openmp()
                self._compiled = _compile(_entry(self._name, self._body, self.element))
                self.alone = _direct(self._compiled.address)
                self.address = int(self._compiled.address)
                release_code("libllvmlite")
        return self.address

    def _compile_and_run(self, block: bytes) -> None:
        self.compile()
        self.alone(block)


def kernels(name: str, body: Any) -> dict[str, Kernel]:
    """The kernel for each element type, by the name of the dtype."""
    return {element.name: Kernel(name, body, element) for element in ELEMENTS}


def _template(name: str, digest: str) -> Callable[..., None]:
    def entry(block):  # type: ignore[no-untyped-def]
        name, digest  # noqa: B018  # being in the closure they are in the cache's key
        body(block, element)  # type: ignore[name-defined]  # noqa: F821  # globals of the entry

    return entry


def _entry(name: str, function: Any, kind: Element) -> Callable[..., None]:
    # Numba's key holds the code and the values of the closure. A Numba function has no value that is the
    # same in the
    # next process, so body must be a global name, and each entry has globals of its own.
    template = _template(f"{name}_{kind.name}", _digest())
    scope = {"__builtins__": __builtins__, "__name__": __name__, "body": function, "element": kind}
    entry = FunctionType(template.__code__, scope, f"{name}_{kind.name}", None, template.__closure__)
    entry.__qualname__ = entry.__name__
    entry.__module__ = __name__
    return entry


def _compile(entry: Callable[..., None]) -> Any:
    try:
        return _cached(entry)
    except (OSError, RuntimeError) as reason:
        if isinstance(reason, RuntimeError) and "cannot cache function" not in str(reason):
            raise
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "batchnorm: no folder for compiled kernels can be written, so each process compiles them anew. "
            "Set NUMBA_CACHE_DIR to a folder that can be.",
            stacklevel=2,
        )
    return numba.cfunc(_SIGNATURE, **OPTIONS)(entry)


def _cached(entry: Callable[..., None]) -> Any:
    """From the cache on disk, or compiled and put there. Files that hold something else are replaced."""
    try:
        return numba.cfunc(_SIGNATURE, cache=True, **OPTIONS)(entry)
    except OSError:
        raise
    except Exception as reason:  # a file that was cut off or overwritten can give any
        if "cannot cache function" in str(reason):
            raise
        FunctionCache(entry).flush()
    return numba.cfunc(_SIGNATURE, cache=True, **OPTIONS)(entry)


@lru_cache(maxsize=1)
def _digest() -> str:
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


@lru_cache(maxsize=1)
def _declare_openmp() -> None:
    """Give the linker the two functions by which a kernel learns its thread."""
    library = openmp()
    for symbol in ("omp_get_thread_num", "omp_get_num_threads"):
        address = 0 if library is None else ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        # Without a library the functions are linked but never called: any address will do.
        llvm.add_symbol(f"batchnorm_{symbol}", address or ctypes.cast(_direct(0), ctypes.c_void_p).value)


_thread_num = types.ExternalFunction("batchnorm_omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("batchnorm_omp_get_num_threads", types.int32())


@numba.njit(**INTERNAL)
def my_share(block):  # type: ignore[no-untyped-def]
    """(which thread this is, of how many): see slots THREAD and THREADS."""
    if block[THREADS] == 1:
        return 0, 1
    if block[THREAD] >= 0:
        return block[THREAD], block[THREADS]
    return int64(_thread_num()), int64(_num_threads())
