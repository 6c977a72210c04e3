"""What stands in the table: the mean, the worst case, and all that was lost, wrong or skipped."""

from __future__ import annotations

from typing import Any

import pytest

from batchnorm.bench import results, show
from batchnorm.bench.results import ResNet, Row, Step
from batchnorm.bench.show import Screen
from bench_rows import failed, row


def shown(capsys: pytest.CaptureFixture[str], rows: list[Row], **others: Any) -> str:
    report = {"rows": rows, "groups": results.groups(rows), "resnet50": [], "left_out": [], **others}
    show.show(Screen(quiet=True), report)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_mean_and_worst_case_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row((1, 2), 1.0, 8.0, 0.5), row((3, 4), 1.0, 0.5, 0.25), row((5, 6), 1.0, 2.0, 1.0)]
    text = shown(capsys, rows)
    assert (
        "  net float32 contiguous forward: threads 1; n 3; faster than torch 2.00× (0.50× at 3×4); "
        "÷ copy 2.00 (4.00 at 3×4)\n" in text
    )
    assert "3 cases measured, 1 lost.\n" in text


def test_the_same_stands_in_the_table_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    screen = Screen()
    screen.plain = False
    rows = [row((1, 2), 1.0, 8.0, 0.5), row((3, 4), 1.0, 2.0, 0.25)]
    show.show(screen, {"rows": rows, "groups": results.groups(rows), "resnet50": [], "left_out": []})  # type: ignore[arg-type, typeddict-item]
    text = capsys.readouterr().out
    assert "4.00× (2.00× at 3×4)" in text
    assert "faster than torch" in text


def test_losing_cases_stay_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, [row((3, 4), 1.0, 0.5, 0.25)])
    assert "  3×4 float32 contiguous forward, 1 thread: ours ÷ the fastest 2.00\n" in text
    assert show.row_line(row((3, 4), 1.0, 0.5, 0.25)).endswith("LOST by 2.00×")


def test_a_wrong_result_is_shown_and_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    bad = row((3, 4), 1.0, 1.0, 1.0, peers={"ours": failed("wrong", "dx is off by 1")}, times_faster={}, times_copy={})
    assert show.row_line(bad) == ("3×4 float32 contiguous forward, 1 thread: NO SPEED, cpu is wrong: dx is off by 1")
    text = shown(capsys, [bad])
    assert "  3×4 float32 contiguous forward, 1 thread: peer batchnorm; error dx is off by 1\n" in text
    assert "n 1, 1 WRONG" in text
    assert "0 cases measured, none lost. In 1 case our own result was wrong.\n" in text


def test_who_was_skipped_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    absent = row((1, 2), 1.0, 1.0, 1.0)
    absent["peers"]["compile"] = failed("skipped", "no C++ compiler")
    assert "torch.compile skipped: no C++ compiler (1 case)\n" in shown(capsys, [absent])


def test_cases_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, [row((1, 2), 1.0, 1.0, 1.0)], left_out=["a", "b"])
    assert "Left out for want of time: 2 cases, named in the JSON\n" in text


def test_memory_is_shown_against_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    used = {"ours": {"kept": 1 << 20, "peak": 3 << 20}, "torch": {"kept": 2 << 20, "peak": 4 << 20}}
    text = shown(capsys, [row((1, 2), 1.0, 1.0, 1.0, memory=used)])
    assert "1×2 float32 contiguous forward, 1 thread: kept for backward 0.50 (1.0 MiB); peak 0.75 (3.0 MiB)\n" in text


def test_resnets_share_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    step = Step(median=1.25, p10=1.2, p90=1.3, share=0.2, share_p10=0.19, share_p90=0.21, backend="cpu")
    network = ResNet(
        batch=16,
        size=112,
        dtype="float32",
        layout="contiguous",
        threads=2,
        rounds=5,
        without=1.0,
        steps={"fused": step},
    )
    text = shown(capsys, [], resnet50=[network])
    assert (
        "batchnorm, fused with ReLU and residual (cpu): step 1.25 s; of it batch normalization 20.0 % (19.0 to 21.0)"
        in text
    )


def test_a_row_as_it_is_measured() -> None:
    line = show.row_line(row((32, 64), 2e-3, 6e-3, 1e-3, extra="relu", threads=2))
    assert line == (
        "32×64 float32 contiguous forward relu, 2 threads: 2.00 ms (cpu), torch 3.00×, as long as 2.00 copies"
    )
