"""The runner of mutants on a tiny project of its own: a runner that cannot fail would prove nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mutants import MUTANTS, ROOT, main
from mutation import Mutant, TableError, check_table, run

SOURCE = "def add(a: int, b: int) -> int:\n    return a + b\n\n\ndef spare() -> int:\n    return 7\n"
TESTS = """
import subprocess, sys, time
from batchnorm import add, spare

CODE = "from batchnorm import add; assert add(2, 3) == 5"

def test_add():
    assert add(2, 3) == 5

def test_add_in_a_subprocess():
    assert subprocess.run([sys.executable, "-c", CODE]).returncode == 0

def test_that_is_red():
    assert add(2, 3) == 6

def test_that_hangs_on_eight():
    if spare() == 8:
        time.sleep(60)
"""
FILE = "src/batchnorm/__init__.py"


def selection(name: str) -> tuple[str, ...]:
    return (f"tests/test_tiny.py::{name}",)


SIGN = Mutant("sign", FILE, "a + b", "a - b", selection("test_add"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    for name, text in {
        FILE: SOURCE,
        "tests/test_tiny.py": TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def verdicts(mutant: Mutant, root: Path, timeout: float = 60.0) -> list[str]:
    return [outcome.verdict for outcome in run([mutant], root, timeout=timeout)]


def test_a_mutant_that_a_test_notices_is_killed(project: Path) -> None:
    assert verdicts(SIGN, project) == ["green", "killed"]
    assert (project / FILE).read_text(encoding="utf-8") == SOURCE


def test_the_copy_wins_over_the_installed_package_in_subprocesses_too(project: Path) -> None:
    assert verdicts(replace(SIGN, tests=selection("test_add_in_a_subprocess")), project) == [
        "green",
        "killed",
    ]


def test_a_mutant_that_no_test_notices_survives(project: Path) -> None:
    assert verdicts(replace(SIGN, old="return 7", new="return 9"), project) == ["green", "SURVIVED"]


def test_a_mutant_that_cannot_be_imported_is_no_kill(project: Path) -> None:
    assert verdicts(replace(SIGN, old="return 7", new="return ("), project) == [
        "green",
        "ERROR: pytest ended with status 4, which is not a failing test",
    ]


def test_a_selection_that_is_red_before_the_change_proves_nothing(project: Path) -> None:
    assert verdicts(replace(SIGN, tests=selection("test_that_is_red")), project) == [
        "ERROR: red on the unchanged code",
        "ERROR: its tests are red on the unchanged code",
    ]


def test_a_selection_without_a_test_proves_nothing(project: Path) -> None:
    assert verdicts(replace(SIGN, tests=("tests", "-k", "no_such_test")), project) == [
        "ERROR: pytest ended with status 5, which is not a failing test",
        "ERROR: its tests are red on the unchanged code",
    ]


def test_a_mutant_that_hangs_is_stopped_and_no_kill(project: Path) -> None:
    hang = replace(SIGN, old="return 7", new="return 8", tests=selection("test_that_hangs_on_eight"))
    assert verdicts(hang, project, timeout=5.0) == ["green", "ERROR: timed out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "a * b"}, f"sign: expected its old text once in {FILE}, found 0"),
        ({"old": "return"}, f"sign: expected its old text once in {FILE}, found 2"),
        ({"old": ""}, f"sign: expected its old text once in {FILE}, found 0"),
        ({"new": "a + b"}, "sign: expected a new text that differs from the old one, got the same"),
        ({"file": "src/none.py"}, "sign: expected a file at src/none.py, found none"),
        ({"tests": ()}, "sign: expected tests that must go red, got none"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(project: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(TableError) as refused:
        check_table([replace(SIGN, **change)], project)
    assert str(refused.value) == message


def test_two_mutants_of_one_name_are_refused(project: Path) -> None:
    with pytest.raises(TableError) as refused:
        check_table([SIGN, SIGN], project)
    assert str(refused.value) == "sign: expected one mutant of this name, found 2"


def test_the_program_ends_with_what_it_found(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survivor = replace(SIGN, name="spare", old="return 7", new="return 9")
    assert main([], [SIGN], project) == 0
    assert main([], [SIGN, survivor], project) == 1
    printed = capsys.readouterr().out
    assert "1 of 1 mutants killed" in printed
    assert "1 of 2 mutants killed" in printed
    assert "spare      SURVIVED  tests/test_tiny.py::test_add" in printed
    assert main(["--only", "nothing"], [SIGN], project) == 2
    assert main([], [replace(SIGN, old="gone")], project) == 2


def test_the_table_of_the_project_fits_its_code() -> None:
    check_table(MUTANTS, ROOT)
