"""Progress and results of an experiment, on a terminal or as plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.report.metrics import Metrics
from batchnorm.report.table import Table, headline, tables

# Called with the seed, the step reached and both test accuracies.
OnProgress = Callable[[int, int, float, float], None]

_LINES_A_RUN = 10
_NARROWEST = 70  # columns: the bar with its figures
_WIDEST = 10_000  # columns, to ask how many a table needs at least


class Terminal:
    """The output of an experiment: results and progress on one console, errors on another.

    Args:
        results: usually standard output.
        complaints: usually standard error.
        quiet: plain lines even on a terminal. A terminal that is narrow or cannot move its cursor always gets them.
    """

    def __init__(self, results: Console, complaints: Console, *, quiet: bool = False) -> None:
        self._results = results
        self._complaints = complaints
        self.plain = quiet or not results.is_terminal or results.is_dumb_terminal or results.width < _NARROWEST

    def progress(self, steps: int, seeds: int) -> AbstractContextManager[OnProgress]:
        """Progress of ``seeds`` runs of ``steps`` steps: a bar, or a few lines for each run."""
        return self._lines(steps) if self.plain else self._bar(steps, seeds)

    def show(self, metrics: Metrics) -> None:
        """The headline and the tables."""
        for table in tables(metrics):
            if self.plain:
                self.say("\n".join(table.lines()))
            else:
                print_table(self._results, table)
        self.say(headline(metrics))

    def say(self, text: str) -> None:
        """Print a line among the results, without markup or wrapping."""
        self._results.print(Text(text), soft_wrap=True)

    def complain(self, text: str) -> None:
        """Print a line among the errors."""
        self._complaints.print(Text(text), soft_wrap=True)

    @contextmanager
    def _bar(self, steps: int, seeds: int) -> Iterator[OnProgress]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("test accuracy [bold]{task.fields[normalized]}[/] with, {task.fields[without]} without"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._results, expand=True) as bar:
            task = bar.add_task("training", total=steps * seeds, normalized="–", without="–")
            begun: list[int] = []

            def update(seed: int, step: int, plain: float, normalized: float) -> None:
                if seed not in begun:
                    begun.append(seed)
                bar.update(
                    task,
                    description=f"seed {seed}",
                    completed=(len(begun) - 1) * steps + step,
                    normalized=f"{100 * normalized:.1f} %",
                    without=f"{100 * plain:.1f} %",
                )

            yield update

    @contextmanager
    def _lines(self, steps: int) -> Iterator[OnProgress]:
        due: dict[int, int] = {}  # the next step of each seed for which a line is printed

        def update(seed: int, step: int, plain: float, normalized: float) -> None:
            apart = max(steps // _LINES_A_RUN, 1)
            if step >= due.setdefault(seed, apart) or step == steps:
                due[seed] = (step // apart + 1) * apart
                self.say(
                    f"seed {seed}, step {step:,} of {steps:,}: test accuracy {100 * normalized:.1f} % with, "
                    f"{100 * plain:.1f} % without"
                )

        yield update


def print_table(console: Console, table: Table) -> None:
    """Print it in columns, or as lines if the console is too narrow."""
    drawn = RichTable(title=Text(table.caption), title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for position, head in enumerate(table.heads):
        drawn.add_column(Text(head), justify="right" if position else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    needed = console.measure(drawn, options=console.options.update(width=_WIDEST)).minimum
    console.print(
        drawn if needed <= console.width else Text("\n".join(table.lines())), soft_wrap=needed > console.width
    )
