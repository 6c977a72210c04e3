"""The code of a library leaves memory, and is there again when it is called."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import textwrap

import llvmlite.binding as llvm
import pytest

from batchnorm.kernels.cpu import resident

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells which pages are resident")

LLVM = "libllvmlite"


def test_a_library_works_after_its_code_was_released() -> None:
    def assembly() -> str:
        module = llvm.parse_assembly("define i32 @f(i32 %x) {\n  %y = add i32 %x, 1\n  ret i32 %y\n}")
        module.verify()
        return str(module)

    before = assembly()
    assert resident.release_code(LLVM) > 0
    assert resident.release_code(LLVM) == 0
    assert assembly() == before
    assert resident.release_code(LLVM) > 0


def test_a_step_of_training_leaves_none_of_the_compiler_in_memory() -> None:
    code = """
        import torch, batchnorm as bn
        from batchnorm.kernels.cpu import resident
        bn.BatchNorm1d(4)(torch.randn(8, 4)).sum().backward()
        print(resident.release_code("libllvmlite"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=250, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_library_that_is_not_loaded_is_no_error() -> None:
    assert resident.release_code("libnothing") == 0


def test_code_that_was_changed_stays() -> None:
    private = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[:2] = b"ab"
    start = ctypes.addressof(ctypes.c_char.from_buffer(private))
    assert resident._release(start, start + mmap.PAGESIZE) == 0
    assert private[:2] == b"ab"


def test_without_the_system_s_tables_nothing_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_PAGEMAP", resident._PAGEMAP / "missing")
    assert resident.release_code(LLVM) == 0
