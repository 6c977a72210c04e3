"""A run survives what it prints to: encodings, closed pipes, full disks, limits, signals, terminals of every kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from commands import BENCH, BENCHMARKS, FILES, REPRODUCE, command, on_a_terminal, small_files_only, start
from idx_files import write_idx_folder

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
unix = pytest.mark.skipif(os.name == "nt", reason="no limits, signals and pseudo-terminals on Windows")
NO_SPACE = "batchnorm: the output could not be written: No space left on device.\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small images, so that a run takes no time; not below the folder of the results."""
    return write_idx_folder(tmp_path / "data")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, "  the median moves by (largest - smallest): without "),
        ({"PYTHONIOENCODING": "cp1252"}, "70 training and 20 test images of 3×2; 10 steps, "),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "70 training and 20 test images of 3x2; 10 steps, ",
        ),
    ],
)
def test_reproduce_says_what_the_stream_can(tmp_path: Path, data: Path, environment: dict[str, str], line: str) -> None:
    done = command([*REPRODUCE, "--data", data, "--out", tmp_path / "out"], env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert line in done.stdout.decode(environment.get("PYTHONIOENCODING", "ascii"))
    assert names(tmp_path / "out") == FILES


@pytest.mark.slow
def test_bench_says_what_the_stream_can(tmp_path: Path) -> None:
    done = command([*BENCH, "--json", tmp_path / "b.json"], env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "[1/3] 4x6x5x5 float32 contiguous forward, 1 thread: " in done.stdout.decode("ascii")
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["complete"]


@pytest.mark.parametrize("what", ["reproduce", "bench"])
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, data: Path, what: str) -> None:
    """As with ``| head -1``."""
    out = tmp_path / "out"
    arguments = {
        "reproduce": [*REPRODUCE, "--data", data, "--out", out],
        "bench": [*BENCH, "--json", out / "b.json"],
    }[what]
    with start(arguments) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        complaints = running.stderr.read()
    assert (running.returncode, complaints) == (0, b"")
    assert names(out) == (FILES if what == "reproduce" else {"b.json"})


@pytest.mark.slow
@full
@pytest.mark.parametrize("what", ["reproduce", "bench"])
def test_a_full_standard_output_is_told_and_files_are_written_all_the_same(
    tmp_path: Path, data: Path, what: str
) -> None:
    out = tmp_path / "out"
    arguments = {
        "reproduce": [*REPRODUCE, "--data", data, "--out", out],
        "bench": [*BENCH, "--json", out / "b.json"],
    }[what]
    with FULL.open("wb") as stream:
        done = command(arguments, stdout=stream)
    assert (done.returncode, done.stderr.decode()) == (1, NO_SPACE)
    assert names(out) == (FILES if what == "reproduce" else {"b.json"})


@pytest.mark.slow
@full
@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("bench", "--help")])
def test_help_and_version_into_a_full_standard_output(arguments: tuple[str, ...]) -> None:
    with FULL.open("wb") as stream:
        done = command(["-m", "batchnorm", *arguments], stdout=stream)
    assert (done.returncode, done.stderr.decode()) == (1, NO_SPACE)


@pytest.mark.slow
@full
def test_the_registrys_list_into_a_full_standard_output_and_into_ascii() -> None:
    with FULL.open("wb") as stream:
        done = command(BENCHMARKS, stdout=stream)
    assert (done.returncode, done.stderr.decode()) == (1, NO_SPACE.replace("batchnorm", "benchmarks", 1))
    done = command(BENCHMARKS, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"resnet50 N=32: 32x64x112x112 float32 contiguous forward\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["standard output", "standard error"])
@unix
def test_a_stream_that_was_closed_before(tmp_path: Path, closed: str) -> None:
    path = tmp_path / "b.json"
    done = command([*BENCH, "--json", path], limit=lambda: os.close(1 if closed == "standard output" else 2))
    assert done.returncode == 0
    assert json.loads(path.read_text(encoding="utf-8"))["complete"]


@pytest.mark.slow
@unix
def test_a_limit_on_the_size_of_files_keeps_the_older_results(tmp_path: Path, data: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "b.json"
    out.mkdir()
    (out / "figure1.png").write_bytes(b"old")
    done = command([*REPRODUCE, "--data", data, "--out", out], limit=small_files_only)
    assert (done.returncode, done.stderr.decode()) == (
        1,
        f"reproduce: the results could not be written to {out}: File too large.\n",
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {"figure1.png": b"old"}

    path.write_bytes(b"old")
    done = command([*BENCH, "--json", path], limit=small_files_only)
    assert (done.returncode, done.stderr.decode()) == (
        1,
        f"bench: the results could not be written to {path}: File too large.\n",
    )
    assert path.read_bytes() == b"old"
    assert (
        "Memory not measured: no temporary folder has room for the profiler's record (1 case)" in done.stdout.decode()
    )
    assert names(tmp_path) == {"b.json", "data", "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [("--data", "nowhere"), ("--data", "x" * 300), ("--data", ""), ("--steps", "0"), ("--steps", str(10**30))],
)
def test_a_request_that_is_refused_leaves_no_folder(tmp_path: Path, wrong: tuple[str, str]) -> None:
    done = command(["-m", "batchnorm", "reproduce", "--out", tmp_path / "out", *wrong])
    complaints = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(complaints)) == (2, b"", 1)
    assert complaints[0].startswith("batchnorm: ")
    assert names(tmp_path) == set()


LONG = ("-m", "batchnorm", "reproduce", "--steps", "100000")


@pytest.mark.slow
@unix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_keeps_what_was_recorded(tmp_path: Path, data: Path, name: str, code: int) -> None:
    ended = on_a_terminal([*LONG, "--data", data, "--out", tmp_path / "out"], send=name, at="seed 0")
    assert ended.code == code, ended.text
    assert ended.text.endswith('what was recorded until then is kept, marked "complete": false.\r\n')
    assert "Traceback" not in ended.text
    assert names(tmp_path / "out") == FILES
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["complete"] is False


@pytest.mark.slow
@unix
@pytest.mark.parametrize(
    ("environment", "columns", "tables"),
    [
        ({"PYTHONIOENCODING": "ascii"}, 100, "| "),
        ({"PYTHONIOENCODING": "cp1252", "NO_COLOR": "1"}, 100, "| "),
        ({}, 100, "─"),
        ({}, 20, ""),
        ({"TERM": "dumb"}, 100, ""),
    ],
)
def test_on_terminals_of_every_kind(
    tmp_path: Path, data: Path, environment: dict[str, str], columns: int, tables: str
) -> None:
    """A bar and tables where they can be drawn, and else lines that lose nothing."""
    ended = on_a_terminal(
        [*REPRODUCE, "--data", data, "--out", tmp_path / "out"], columns=columns, environment=environment
    )
    assert ended.code == 0, ended.text
    assert names(tmp_path / "out") == FILES
    assert "…" not in ended.text and "..." not in ended.text
    if tables:
        assert tables in ended.text and "10/10 test accuracy" in ended.text
    else:
        assert "seed 0, step 10 of 10: test accuracy " in ended.text
        assert "  the median moves by (largest − smallest): without " in ended.text
    if "PYTHONIOENCODING" in environment:
        assert "largest - smallest" in ended.text


@pytest.mark.slow
@unix
def test_bench_on_a_narrow_terminal_gives_lines() -> None:
    ended = on_a_terminal(BENCH, columns=40)
    assert ended.code == 0, ended.text
    assert "\n  own float32 contiguous forward+backward: threads 1; n 1; faster than torch " in ended.text
    assert "…" not in ended.text
