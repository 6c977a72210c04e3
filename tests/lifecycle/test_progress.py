"""Progress is shown where it was asked for, and only there."""

from __future__ import annotations

import builtins
import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.lifecycle import progress


class Clock:
    """Each look at it is a second later."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def model() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.Tanh(), nn.BatchNorm1d(2), nn.Tanh(), nn.BatchNorm1d(2))


BATCHES = [torch.randn(8, 2) for _ in range(4)]


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    bn.recalibrate(model(), BATCHES)
    assert capsys.readouterr() == ("", "")


def test_a_line_on_standard_error_says_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "time", Clock(30.0))
    bn.recalibrate(model(), BATCHES, progress=True)
    assert capsys.readouterr() == (
        "",
        "\rrecalibrate: 25 %, 1 min 30 s left\rrecalibrate: 50 %, 1 min 0 s left \rrecalibrate: 75 %, 30 s left     "
        "\rrecalibrate: 100 %, 0 s left\n",
    )


def test_without_a_length_batches_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    bn.recalibrate(model(), iter(BATCHES[:2]), progress=True)
    assert capsys.readouterr().err == "\rrecalibrate: 1 batch\rrecalibrate: 2 batches\n"


def test_lines_do_not_come_faster_than_one_can_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "time", Clock(0.001))
    bn.recalibrate(model(), BATCHES * 20, progress=True)
    assert capsys.readouterr().err.count("\r") == 2


def test_after_an_error_the_line_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        bn.recalibrate(model(), [BATCHES[0], torch.randn(8, 5)], progress=True)
    assert capsys.readouterr().err.endswith("left\n")


def test_a_function_is_told_the_work_done_and_the_work_there_is() -> None:
    told: list[tuple[float, float | None]] = []
    report = bn.recalibrate(model(), BATCHES, progress=lambda *work: told.append(work))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    bn.recalibrate(model(), iter(BATCHES), max_batches=2, progress=lambda *work: told.append(work))
    assert told == [(1, None), (2, None)]
    told.clear()
    report = bn.recalibrate(model(), BATCHES, order="sequential", progress=lambda *work: told.append(work))
    # Three passes: whole, and up to the second and the third of three layers.
    assert report.passes == 3
    assert len(told) == 12
    assert [total for _, total in told] == pytest.approx([4 + 4 * 2 / 3 + 4] * 12)
    done = [work for work, _ in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(told[-1][1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_rich_draws_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm-256color")
    bn.recalibrate(model(), BATCHES, progress=True)
    assert "recalibrate" in shown.getvalue()
    assert "100%" in shown.getvalue()
    assert "0:00:00" in shown.getvalue()


def test_a_terminal_without_rich_gets_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, load = Terminal(), builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    bn.recalibrate(model(), BATCHES, progress=True)
    assert shown.getvalue().endswith("\rrecalibrate: 100 %, 0 s left\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text
