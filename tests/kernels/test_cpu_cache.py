"""How compiled kernels are kept on disk, and what happens where they cannot be."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

import batchnorm
from batchnorm.kernels.cpu import compiling, outside
from kernels.cpu_process import in_a_new_process


def test_a_second_process_takes_kernels_from_the_cache(tmp_path: Path) -> None:
    """From a folder that was not there: it is made, and nothing is said about it."""
    code = """
        kernel = outside.family(4, 300).MOMENTS["float32"]
        assert repr(kernel).endswith("not compiled>")
        measure()
        print(kernel._compiled.cache_hits)
    """
    folder = str(tmp_path / "not" / "there")
    first, second = (in_a_new_process(code, NUMBA_CACHE_DIR=folder) for _ in range(2))
    assert (first.stdout, second.stdout) == ("0\n", "1\n"), first.stderr + second.stderr
    assert (first.stderr, second.stderr) == ("", "")


BROKEN = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "cut off at the end": lambda whole: whole[:-1],
    "garbage": lambda whole: bytes(range(255, 0, -1)) * 20,
    "a pickle of something else": lambda whole: pickle.dumps({"something": "else"}),
    "two pickles of something else": lambda whole: pickle.dumps(numba.__version__) + pickle.dumps(42),
    "a pickle of a tuple": lambda whole: pickle.dumps(("a", "b", 3)),
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled kernel of ``measure()``."""
    folder = tmp_path_factory.mktemp("cached")
    done = in_a_new_process("measure()", NUMBA_CACHE_DIR=str(folder))
    assert (done.stdout, done.stderr) == ("", "")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_broken_file_of_the_cache_is_replaced(ending: str, how: str, cached: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(cached, folder)
    (file,) = folder.rglob(f"*.{ending}")
    whole = file.read_bytes()
    broken = BROKEN[how](whole)
    file.write_bytes(broken)
    code = """
        measure()
        print(outside.family(4, 300).MOMENTS["float32"]._compiled.cache_hits)
    """
    first, second = (in_a_new_process(code, NUMBA_CACHE_DIR=str(folder)) for _ in range(2))
    assert (first.stdout, second.stdout) == ("0\n", "1\n"), first.stderr + second.stderr
    assert (first.stderr, second.stderr) == ("", "")
    assert len(list(folder.rglob("*.nb?"))) == 2
    assert file.read_bytes() != broken


def test_counting_what_a_call_needs_compiles_nothing() -> None:
    """It runs in each process before the first kernel is taken from the cache."""
    code = """
        from numba.core import event
        from batchnorm.kernels.cpu import inside
        with event.install_recorder("numba:compile") as compiled:
            inside.scratch(10000, 1, 6, 4, 1)
            outside.scratch(40, 6, 3000), outside.scratch(40, 6, 49), outside.in_phases(40, 6, 3000, 2)
        print(len(compiled.buffer))
    """
    done = in_a_new_process(code)
    assert done.stdout == "0\n", done.stderr


@pytest.fixture
def installed() -> Iterator[Path]:
    """A copy of the package, without compiled kernels, in a folder that every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        source = Path(batchnorm.__file__).parent
        shutil.copytree(source, root / "batchnorm", ignore=shutil.ignore_patterns("__pycache__"))
        yield root


@pytest.mark.parametrize("blocked_by", ["files in their place", "permissions"])
def test_without_a_folder_that_can_be_written_kernels_work_and_one_warning_says_so(
    blocked_by: str, installed: Path
) -> None:
    """Neither ``__pycache__`` beside the package nor the user's cache folder."""
    kernels, home = installed / "batchnorm" / "kernels" / "cpu", installed / "home"
    if blocked_by == "permissions":
        home.mkdir()
        kernels.chmod(0o555)
        home.chmod(0o555)
    else:
        home.write_text("")
        (kernels / "__pycache__").write_text("")
    code = f"""
        import warnings
        from permissions import obey_permissions
        if {blocked_by == "permissions"} and not obey_permissions():
            sys.exit("permissions do not count")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measure()
            measure(20)
        print(outside.__file__)
        print([str(w.message) for w in caught])
    """
    elsewhere = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "LOCALAPPDATA": str(home), "NUMBA_CACHE_DIR": ""}
    done = in_a_new_process(code, PYTHONPATH=str(installed), **elsewhere)
    if done.stderr == "permissions do not count\n":
        pytest.skip("permissions do not stop this user, who cannot give that privilege up")
    message = (
        "batchnorm: no folder for compiled kernels can be written, so each process compiles them anew. "
        "Set NUMBA_CACHE_DIR to a folder that can be."
    )
    assert done.stdout == f"{kernels / 'outside.py'}\n[{message!r}]\n", done.stderr


def test_kernels_of_one_file_change_when_another_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of all sources is in the key of the cache."""
    kernel = outside.family(4, 5000).FORWARD["float32"]
    before = [cell.cell_contents for cell in compiling._entry("name", kernel._body, kernel.element).__closure__ or ()]
    monkeypatch.setattr(compiling, "_digest", lambda: "another")
    after = [cell.cell_contents for cell in compiling._entry("name", kernel._body, kernel.element).__closure__ or ()]
    assert before != after
