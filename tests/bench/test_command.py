"""``batchnorm bench`` as a user types it."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from batchnorm.__main__ import main
from batchnorm.bench import command
from batchnorm.bench.cases import Case
from batchnorm.bench.measure import Plan
from batchnorm.bench.peers import OURS, PEERS
from batchnorm.bench.results import Report, ResNet
from batchnorm.bench.run import Entry
from batchnorm.bench.show import Screen
from batchnorm.errors import BatchNormError
from bench_rows import off_by_a_tenth

QUICK = Plan(least=0.0, rounds=1, enough=1, budget=0.0)
SMALL = Entry(Case((4, 6, 5, 5)), ("torch", "copy", "clone"), (1,))


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["batchnorm", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_it_measures_the_users_shape_and_leaves_json_and_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    code = bench(
        monkeypatch, "--shape", "4,6,5,5", "--dtype", "bfloat16", "--layout", "channels_last", "--extra", "relu",
        "--peers", "torch,onednn", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "b.json"), "--plot",
        str(tmp_path / "b.png"),
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "[1/3] 4×6×5×5 bfloat16 channels_last forward relu, 1 thread: " in out
    read = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert set(read) == set(get_type_hints(Report))
    assert [row["mode"] for row in read["rows"]] == ["forward", "forward+backward", "inference"]
    assert {row["layout"] for row in read["rows"]} == {"channels_last"}
    assert read["complete"] and read["registry"] == "own"
    assert read["rows"][1]["memory"]["torch"]["kept"] > read["rows"][1]["memory"]["ours"]["kept"]
    assert set(read["machine"]) >= {"processor", "cores", "threads", "versions", "commit"}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "32,0"], "batchnorm: bench: expected sizes of 1 or more, got 32,0. Correct the shape.\n"),
        (
            ["--shape", "4,3", "--layout", "channels_last"],
            "batchnorm: bench: expected 4 or 5 sizes for the layout channels_last, got 4,3. "
            "Take the contiguous layout.\n",
        ),
        (
            ["--threads", "0"],
            'batchnorm: bench: expected threads from 1 to 1024, or "all", got \'0\'. Give e.g. "1,all".\n',
        ),
        (
            ["--peers", "tensorflow"],
            "batchnorm: bench: expected peers among torch, compile, onednn, got 'tensorflow'. Correct the name.\n",
        ),
        (
            ["--plot", "bench.txt"],
            "batchnorm: bench: expected a plot named .png, .svg, .pdf, got 'bench.txt'. Name it e.g. bench.png.\n",
        ),
        (
            ["--plot", "b.png", "--json", "b.png"],
            "batchnorm: bench: expected two files, got b.png for both. Name the JSON otherwise.\n",
        ),
        (["--seconds", "0"], "batchnorm: bench: expected more than 0 seconds for a case, got 0.0. Give e.g. 2.\n"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", message)


def test_a_case_larger_than_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, "--shape", "1000000,1000,1000") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "batchnorm: bench: expected a case that fits into memory, got 1000000×1000×1000, which takes "
    )
    assert said.endswith(". Take a smaller batch.\n")


def test_a_file_that_cannot_be_written_is_known_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "b.json"
    assert bench(monkeypatch, "--json", str(path)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"bench: expected a file that can be written, got {path}: ")
    assert bench(monkeypatch, "--json", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"bench: expected a file that can be written, got {tmp_path}: it is a folder. Choose another one.\n"
    )


def test_a_wrong_result_of_ours_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(PEERS, OURS, off_by_a_tenth(PEERS[OURS]))
    path = tmp_path / "b.json"
    assert command.carry_out([SMALL], QUICK, "own", Screen(quiet=True), json_path=path) == 1
    assert "NO SPEED" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["peers"]["ours"]["median"] is None


def test_networks_that_differ_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    def differs() -> ResNet:
        raise BatchNormError("bench: the losses differ")

    assert command.carry_out([], QUICK, "own", Screen(quiet=True), networks=[differs]) == 1
    assert capsys.readouterr().err == "bench: the losses differ\n"


def test_an_interruption_keeps_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted() -> ResNet:
        raise KeyboardInterrupt

    path = tmp_path / "b.json"
    code = command.carry_out([SMALL], QUICK, "own", Screen(quiet=True), networks=[interrupted], json_path=path)
    assert code == 130
    read = json.loads(path.read_text())
    assert not read["complete"] and len(read["rows"]) == 1
    assert capsys.readouterr().err == "Interrupted: what was measured until here is kept.\n"


def test_cases_for_which_there_is_no_time_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    assert command.carry_out([SMALL], QUICK, "short", Screen(quiet=True), limit=0.0, json_path=path) == 0
    read = json.loads(path.read_text())
    assert read["left_out"] == ["4×6×5×5 float32 contiguous forward+backward"]
    assert not read["complete"] and read["rows"] == []
    assert "Left out for want of time: 1 case, named in the JSON\n" in capsys.readouterr().out


def test_a_json_that_cannot_be_written_loses_neither_the_run_nor_the_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(path: Path, report: Report) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command.results, "write", full)
    monkeypatch.setattr(command, "_SAVE_EVERY", 0.0)  # after each case too
    paths = {"json_path": tmp_path / "b.json", "plot_path": tmp_path / "b.png"}
    assert command.carry_out([SMALL], QUICK, "own", Screen(quiet=True), **paths) == 1
    said = capsys.readouterr()
    line = f"bench: the results could not be written to {tmp_path / 'b.json'}: No space left on device.\n"
    assert said.err == 2 * line
    assert said.out.endswith(f"Written: {tmp_path / 'b.png'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
