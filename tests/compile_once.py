"""Several test processes, one compilation: a worker that needs a kernel waits while another one compiles it.

Kernels are cached on disk, so the second worker then loads what the first one compiled. Without the lock both would
compile it at the same time, for most kernels a second or more of a core each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

try:
    import fcntl
except ImportError:  # Windows: both compile, which costs time and nothing else
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system releases if the process dies."""
    if fcntl is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Inside the block, no two processes with the same folder compile the same kernel at the same time."""
    from batchnorm.kernels.cpu.compiling import Kernel

    compile_now = Kernel.compile

    def compile_alone(kernel: Kernel) -> int:
        if kernel.address:
            return kernel.address
        with alone(folder / f"{kernel._name}_{kernel.element.name}.lock"):
            return compile_now(kernel)

    with mock.patch.object(Kernel, "compile", compile_alone):
        yield
