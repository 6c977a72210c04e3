"""The lock between test processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.kernels.cpu.compiling import Kernel
from compile_once import alone, compiled_once

pytest.importorskip("fcntl", reason="this system has no file locks")

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from compile_once import alone
with alone(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[3]).write_text("left")
"""


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    lock, note = tmp_path / "lock", tmp_path / "note"
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(lock), str(note)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not note.exists()
        holder.stdin.write("\n")
        holder.stdin.flush()
        with alone(lock):
            assert note.read_text() == "left"
    assert holder.returncode == 0


def test_the_lock_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(lock), str(tmp_path / "note")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with alone(lock):
        pass


def test_a_kernel_is_compiled_under_the_lock_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def compile_nothing(kernel: Kernel) -> int:
        seen.extend(path.name for path in tmp_path.iterdir())
        return 7

    monkeypatch.setattr(Kernel, "compile", compile_nothing)
    from batchnorm.kernels.cpu.scalars import ELEMENTS

    kernel = Kernel("made_up", None, ELEMENTS[0])
    with compiled_once(tmp_path):
        assert kernel.compile() == 7
    assert seen == [f"made_up_{ELEMENTS[0].name}.lock"]
