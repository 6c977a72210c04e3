"""The runner of mutants: break a copy of the code in one known way and demand that named tests go red.

A mutant is killed only by failing tests (pytest's exit status 1). Tests that pass mean it survived; anything
else, such as a broken import, no test selected or a time-out, is an error of the table, never a kill. Each
distinct selection of tests must first be green on an unchanged copy.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COPIED = ("src", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")
MADE = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache", "results")
GREEN, RED = 0, 1


class TableError(Exception):
    """A mutant that cannot be made: its text is not where the table says, or not exactly once."""


@dataclass(frozen=True)
class Mutant:
    """One known way to break the code.

    `file` is relative to the root; `old` must occur in it exactly once and is replaced by `new`; `tests` is
    what pytest is given and must go red (paths, node ids, or options such as "-k", "merge").
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant (or, with `name` "unchanged", of a selection on the unchanged copy)."""

    name: str
    verdict: str  # "green", "killed", "SURVIVED" or "ERROR: why"
    tests: tuple[str, ...]
    output: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in ("green", "killed")


def mutated(text: str, mutant: Mutant) -> str:
    """`text` with the mutant's one replacement made."""
    count = text.count(mutant.old) if mutant.old else 0
    if count != 1:
        raise TableError(f"{mutant.name}: expected its old text once in {mutant.file}, found {count}")
    if mutant.old == mutant.new:
        raise TableError(f"{mutant.name}: expected a new text that differs from the old one, got the same")
    return text.replace(mutant.old, mutant.new)


def run(
    mutants: Sequence[Mutant],
    root: Path,
    *,
    package: str = "batchnorm",
    jobs: int = 2,
    timeout: float = 300.0,
) -> list[Outcome]:
    """Outcomes of the unchanged code, one a distinct selection, then of each mutant, in the table's order.

    Mutants whose selection is not green on the unchanged code are not run: they are reported as errors.
    """
    check_table(mutants, root)
    selections = list(dict.fromkeys(mutant.tests for mutant in mutants))
    with ThreadPoolExecutor(jobs) as pool:
        clean = list(pool.map(lambda tests: trial(None, tests, root, package, timeout), selections))
        green = {outcome.tests for outcome in clean if outcome.good}

        def one(mutant: Mutant) -> Outcome:
            if mutant.tests not in green:
                return Outcome(mutant.name, "ERROR: its tests are red on the unchanged code", mutant.tests)
            return trial(mutant, mutant.tests, root, package, timeout)

        return clean + list(pool.map(one, mutants))


def check_table(mutants: Sequence[Mutant], root: Path) -> None:
    """Raise TableError for the first mutant that cannot be made, before any time is spent."""
    names = [mutant.name for mutant in mutants]
    for name in names:
        if names.count(name) > 1:
            raise TableError(f"{name}: expected one mutant of this name, found {names.count(name)}")
    for mutant in mutants:
        path = root / mutant.file
        if not path.is_file():
            raise TableError(f"{mutant.name}: expected a file at {mutant.file}, found none")
        if not mutant.tests:
            raise TableError(f"{mutant.name}: expected tests that must go red, got none")
        mutated(path.read_text(encoding="utf-8"), mutant)


def trial(mutant: Mutant | None, tests: tuple[str, ...], root: Path, package: str, timeout: float) -> Outcome:
    """Run `tests` in a fresh copy of the repository, broken by `mutant` or, for None, as it is."""
    name = mutant.name if mutant else "unchanged"
    with tempfile.TemporaryDirectory(prefix="mutant-") as made:
        copy = Path(made) / "repository"
        copy_repository(root, copy)
        if mutant:
            target = copy / mutant.file
            target.write_text(mutated(target.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        environment = environment_of(copy)
        origin = origin_of(package, copy, environment)
        if not origin.is_relative_to(copy.resolve()):
            return Outcome(name, f"ERROR: the tests would import {origin}, not the copy", tests)
        status, output = pytest_status(tests, copy, environment, timeout)
    return Outcome(name, verdict_of(status, unchanged=mutant is None), tests, output)


def verdict_of(status: int | None, *, unchanged: bool) -> str:
    """pytest's exit status (None: timed out) in words."""
    if status is None:
        return "ERROR: timed out"
    if status == GREEN:
        return "green" if unchanged else "SURVIVED"
    if status == RED:
        return "ERROR: red on the unchanged code" if unchanged else "killed"
    return f"ERROR: pytest ended with status {status}, which is not a failing test"


def copy_repository(root: Path, copy: Path) -> None:
    copy.mkdir(parents=True)
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=MADE)
        elif source.is_file():
            shutil.copy2(source, copy / name)


def environment_of(copy: Path) -> dict[str, str]:
    """The environment in which the copy's src wins over an installed package, subprocesses of tests included.

    Compiled kernels are cached inside the copy: a shared cache may hold code compiled from the unbroken text,
    since Numba looks at the file of the outermost function alone.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(copy / "src")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["NUMBA_CACHE_DIR"] = str(copy / ".cache" / "numba")
    environment["XDG_CACHE_HOME"] = str(copy / ".cache")
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def origin_of(package: str, copy: Path, environment: dict[str, str]) -> Path:
    """The file from which Python would import `package` in this environment."""
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}).origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip()).resolve()


def pytest_status(
    tests: tuple[str, ...], copy: Path, environment: dict[str, str], timeout: float
) -> tuple[int | None, str]:
    """pytest's exit status, None after a time-out, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as stopped:
        # The tests may have started processes of their own: end the whole session that was begun here.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(stopped, subprocess.TimeoutExpired):
            return None, ""
        raise
    return process.returncode, output[-2000:]


def table(outcomes: Sequence[Outcome]) -> str:
    """One line an outcome: name, verdict, tests."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    return "\n".join(f"{o.name:<{width}}  {o.verdict:<9} {' '.join(o.tests)}" for o in outcomes)
