"""What is said on a terminal, and what where there is none."""

from __future__ import annotations

import io

from rich.console import Console

from batchnorm.report.table import Table, headline, tables
from batchnorm.report.terminal import Terminal, print_table


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=110, legacy_windows=False, color_system=None), file


def test_lines_ten_a_run_and_one_at_the_end() -> None:
    results, said = console(terminal=False)
    with Terminal(results, results).progress(95, 2) as update:
        for seed in (4, 5):
            for step in range(96):
                update(f"seed {seed}", step, f"test accuracy {step:.1f} % with, 10.0 % without")
    lines = said.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:11]] == [
        *(f"seed 4, step {step} of 95" for step in range(9, 96, 9)),
        "seed 4, step 95 of 95",
    ]
    assert lines[0] == "seed 4, step 9 of 95: test accuracy 9.0 % with, 10.0 % without"
    assert len(lines) == 22


def test_a_wide_gap_between_points_gives_one_line() -> None:
    results, said = console(terminal=False)
    with Terminal(results, results).progress(100, 1) as update:
        for step in (0, 5, 35, 36, 41, 100):
            update("seed 0", step, "learning")
    steps = [line.split()[3] for line in said.getvalue().splitlines()]
    assert steps == ["35", "41", "100"]


def test_a_terminal_gets_a_bar_with_what_is_said_of_the_run() -> None:
    results, said = console(terminal=True)
    with Terminal(results, results).progress(100, 2) as update:
        update("seed 0", 100, "[test accuracy] 75.0 %")
        update("seed 1", 40, "[test accuracy] 87.5 %")
    assert "140/200 [test accuracy] 87.5 %" in said.getvalue()


def test_runs_side_by_side_share_the_bar() -> None:
    results, said = console(terminal=True)
    with Terminal(results, results).progress(100, 2) as update:
        update("one", 30, "")
        update("other", 20, "")
        update("one", 50, "")
    assert "70/200" in said.getvalue()


def test_results_on_a_terminal_are_tables(make_metrics) -> None:  # type: ignore[no-untyped-def]
    results, said = console(terminal=True)
    metrics = make_metrics()
    Terminal(results, results).show(tables(metrics), headline(metrics))
    text = said.getvalue()
    assert "Training steps to reach a test accuracy" in text
    assert "─" in text
    assert text.rstrip().endswith("with it that is reached at step 10, 10 times sooner.")


def test_results_elsewhere_or_in_quiet_are_lines(make_metrics) -> None:  # type: ignore[no-untyped-def]
    elsewhere, said = console(terminal=False)
    metrics = make_metrics()
    Terminal(elsewhere, elsewhere).show(tables(metrics), headline(metrics))
    assert said.getvalue().splitlines()[:6] == [
        "Training steps to reach a test accuracy:",
        "  80 %: without 10; with 2; times sooner 5",
        "  90 %: without 20; with 4; times sooner 5",
        "  95 %: without 40; with 10; times sooner 4",
        "  96.0 %, the best without: without 100; with 10; times sooner 10",
        "Test accuracy after the last step:",
    ]
    terminal, quietly = console(terminal=True)
    Terminal(terminal, terminal, quiet=True).show(tables(metrics), headline(metrics))
    assert quietly.getvalue() == said.getvalue()


def test_lines_are_neither_wrapped_nor_read_as_markup() -> None:
    results, said = console(terminal=False)
    complaints, complained = console(terminal=False)
    terminal = Terminal(results, complaints)
    terminal.say("[bold]" + "x" * 200)
    terminal.complain("[red]" + "y " * 100)
    assert said.getvalue() == "[bold]" + "x" * 200 + "\n"
    assert complained.getvalue() == "[red]" + "y " * 100 + "\n"


def test_a_table_wider_than_the_terminal_is_given_as_lines() -> None:
    table = Table("Sizes", ("file", "bytes"), [("a" * 30, "1")])
    for width, text in ((60, "─"), (30, f"Sizes:\n  {'a' * 30}: bytes 1\n")):
        file = io.StringIO()
        print_table(Console(file=file, force_terminal=True, width=width, color_system=None), table)
        assert text in file.getvalue()
        assert "…" not in file.getvalue()
