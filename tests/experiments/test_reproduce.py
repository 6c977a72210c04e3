"""The whole experiment: what it records, what it leaves in the folder, and what an interruption leaves."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from batchnorm.experiments import reproduce as command
from batchnorm.experiments.digits import Digits
from batchnorm.experiments.mnist import Point, Settings
from batchnorm.experiments.record import Recording
from batchnorm.report.metrics import to_json
from batchnorm.report.terminal import Terminal

FILES = {"metrics.json", "figure1.png", "figure1.svg", "report.html"}


class Spoken:
    """A terminal of which everything said can be read."""

    def __init__(self) -> None:
        self._results, self._complaints = io.StringIO(), io.StringIO()
        self.terminal = Terminal(Console(file=self._results), Console(file=self._complaints))

    @property
    def results(self) -> str:
        return self._results.getvalue()

    @property
    def complaints(self) -> str:
        return self._complaints.getvalue()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def point(step: int, plain: float = 0.5, running: float = 0.9, percentiles: object = None) -> Point:
    values = torch.zeros(3, 5) if percentiles is None else torch.as_tensor(percentiles, dtype=torch.float32)
    return Point(step, plain, 0.91, running, 0.92, 0.93, values, values)


def test_every_seed_is_recorded_and_torchs_threads_are_put_back(small_digits: Digits) -> None:
    settings = Settings(steps=2, seed=3, seeds=2)
    recording = Recording(settings, small_digits, "somewhere")
    seen: list[tuple[int, int, int]] = []
    torch.set_num_threads(2)
    command.record(
        settings,
        small_digits,
        recording,
        lambda seed, at: seen.append((seed, at.step, torch.get_num_threads())),
    )
    assert torch.get_num_threads() == 2
    assert seen == [(3, 0, 1), (3, 1, 1), (3, 2, 1), (4, 0, 1), (4, 1, 1), (4, 2, 1)]
    metrics = recording.metrics()
    assert metrics["complete"]
    assert metrics["settings"] == {
        "steps": 2,
        "batch_size": 60,
        "learning_rate": 0.1,
        "weight_std": 0.1,
        "hidden": [100, 100, 100],
        "seeds": [3, 4],
        "threads": 1,
    }
    assert metrics["data"] == {
        "name": "a few digits",
        "source": "somewhere",
        "height": 8,
        "width": 8,
        "train": 150,
        "test": 61,
    }
    assert [(run["seed"], run["complete"], run["steps"]) for run in metrics["runs"]] == [
        (3, True, [0, 1, 2]),
        (4, True, [0, 1, 2]),
    ]


def test_an_error_puts_threads_back_too(small_digits: Digits) -> None:
    def fail(seed: int, at: Point) -> None:
        raise KeyError("on purpose")

    settings = Settings(steps=2)
    torch.set_num_threads(2)
    with pytest.raises(KeyError):
        command.record(settings, small_digits, Recording(settings, small_digits, ""), fail)
    assert torch.get_num_threads() == 2


def test_the_typical_sigmoid_is_the_one_of_middle_travel(small_digits: Digits) -> None:
    recording = Recording(Settings(steps=2), small_digits, "")
    medians = np.array([[0, 0, 0, 0, 0], [5, 1, 3, 2, 4], [5, -1, 0, 0, 0]])
    for step, row in enumerate(medians):
        recording.add(0, point(step, percentiles=np.stack([row - 1.0, row, row + 1.0 + step])))
    metrics = recording.metrics()
    network = metrics["runs"][0]["plain"]
    assert network["unit"] == 2  # travels are 5, 2, 3, 2, 4
    assert network["percentiles"] == {"p15": [-1, 2, -1], "p50": [0, 3, 0], "p85": [1, 5, 3]}
    assert network["travel"] == pytest.approx((5 + 2 + 3 + 2 + 4) / 5)
    assert network["spread_growth"] == pytest.approx(2)


def test_what_diverged_is_recorded_as_null(small_digits: Digits) -> None:
    recording = Recording(Settings(steps=1), small_digits, "")
    recording.add(0, point(0))
    recording.add(0, point(1, percentiles=np.full((3, 5), np.nan)))
    metrics = json.loads(to_json(recording.metrics()))
    network = metrics["runs"][0]["normalized"]
    assert network["percentiles"]["p50"] == [0, None]
    assert network["travel"] is None
    assert network["spread_growth"] is None
    assert metrics["summary"]["travel_normalized"] is None


def test_a_run_in_which_training_diverges_still_gives_its_report(idx_folder: Path, tmp_path: Path) -> None:
    spoken = Spoken()
    settings = Settings(steps=12, learning_rate=1e38)
    assert command.reproduce(settings, str(idx_folder), tmp_path / "out", spoken.terminal) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    run = metrics["runs"][0]
    assert run["plain"]["percentiles"]["p50"][-1] is None
    assert run["plain"]["accuracy"][-1] == 0
    assert [accuracy[-1] for accuracy in run["accuracy_by_statistics"].values()] == [0, 0, 0, 0]
    assert "the median moves by (largest − smallest): without not finite" in spoken.results


def test_the_folder_holds_four_whole_files(idx_folder: Path, tmp_path: Path) -> None:
    spoken = Spoken()
    out = tmp_path / "deep" / "out"
    assert command.reproduce(Settings(steps=10, seeds=2), str(idx_folder), out, spoken.terminal) == 0
    assert names(out) == FILES
    assert json.loads((out / "metrics.json").read_text())["complete"] is True
    assert (out / "figure1.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "</svg>" in (out / "figure1.svg").read_text()
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert spoken.complaints == ""
    lines = spoken.results.splitlines()
    assert lines[0] == f"{idx_folder}: 70 training and 20 test images of 3×2; 10 steps, learning rate 0.1"
    assert sum(line.startswith("seed 1, step ") for line in lines) == 10
    assert lines[-1] == f"Written to {out}: metrics.json, figure1.png, figure1.svg, report.html"


def test_an_interruption_keeps_what_was_recorded(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Recording.add

    def add_and_interrupt(self: Recording, seed: int, at: Point) -> None:
        add(self, seed, at)
        if (seed, at.step) == (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "add", add_and_interrupt)
    spoken = Spoken()
    out = tmp_path / "out"
    assert command.reproduce(Settings(steps=10, seeds=3), str(idx_folder), out, spoken.terminal) == 130
    assert names(out) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["complete"] is False
    assert [(run["seed"], run["complete"], run["steps"][-1]) for run in metrics["runs"]] == [
        (0, True, 10),
        (1, False, 4),
    ]
    assert "<strong>Incomplete.</strong>" in (out / "report.html").read_text()
    assert spoken.complaints == (
        'Interrupted at seed 1, step 4 of 10: what was recorded until then is kept, marked "complete": false.\n'
    )


def test_an_interruption_before_the_first_point_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: str) -> Digits:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", interrupt)
    spoken = Spoken()
    assert command.reproduce(Settings(), "digits", tmp_path, spoken.terminal) == 130
    assert names(tmp_path) == set()
    assert spoken.complaints == "Interrupted before anything was recorded; nothing is written.\n"


def test_a_folder_that_cannot_be_used_is_refused_before_training(tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("in the way")
    spoken = Spoken()
    assert command.reproduce(Settings(), "digits", out, spoken.terminal) == 2
    assert spoken.results == ""
    assert spoken.complaints == (
        f"reproduce: expected a folder to write to, got {out}: File exists. Choose another --out.\n"
    )


def test_a_full_disk_is_reported_after_the_results_were_shown(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    spoken = Spoken()
    out = tmp_path / "out"
    assert command.reproduce(Settings(steps=1), str(idx_folder), out, spoken.terminal) == 1
    assert not out.exists()
    assert "Test accuracy after the last step:" in spoken.results
    assert spoken.complaints == (f"reproduce: the results could not be written to {out}: No space left on device.\n")


@pytest.mark.parametrize(("presses", "kept"), [(1, True), (2, False)])
def test_it_takes_a_second_interruption_to_lose_results_that_are_being_written(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presses: int, kept: bool
) -> None:
    fsync = os.fsync
    calls: list[int] = []

    def interrupt(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) <= presses:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", interrupt)
    spoken = Spoken()
    out = tmp_path / "out"
    assert command.reproduce(Settings(steps=1), str(idx_folder), out, spoken.terminal) == 130
    if kept:
        assert names(out) == FILES
        assert spoken.complaints == "Interrupted at seed 0, step 1 of 1: that was the last, and all is written.\n"
    else:
        assert not out.exists()
        assert spoken.complaints == "Interrupted again while the results were written; nothing is written.\n"


def test_files_are_there_before_results_are_shown(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = Spoken()
    out = tmp_path / "out"
    found: list[set[str]] = []
    monkeypatch.setattr(spoken.terminal, "show", lambda tables, headline: found.append(names(out)))
    assert command.reproduce(Settings(steps=1), str(idx_folder), out, spoken.terminal) == 0
    assert found == [FILES]
