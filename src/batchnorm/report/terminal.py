"""Progress and results of an experiment on a terminal, or as plain lines where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.report.table import Table

# Called with a run's name, the step that it has reached, and what to say of it.
OnProgress = Callable[[str, int, str], None]

_LINES_A_RUN = 10
_NARROWEST = 70  # columns: the bar with its figures
_WIDEST = 10_000  # columns, to ask how many a table needs at least


class Terminal:
    """Where an experiment prints: progress and results on one console, complaints on another.

    Args:
        results: usually standard output.
        complaints: usually standard error.
        quiet: plain lines even on a terminal. A terminal that is narrow or cannot move its cursor always gets them.
    """

    def __init__(self, results: Console, complaints: Console, *, quiet: bool = False) -> None:
        self._results = results
        self._complaints = complaints
        self.plain = quiet or not results.is_terminal or results.is_dumb_terminal or results.width < _NARROWEST

    def progress(self, steps: int, runs: int) -> AbstractContextManager[OnProgress]:
        """A bar, or some lines a run, for ``runs`` runs of ``steps`` steps, one after the other or side by side."""
        return self._lines(steps) if self.plain else self._bar(steps, runs)

    def show(self, tables: Iterable[Table], headline: str) -> None:
        """The tables and the result in words."""
        for table in tables:
            if self.plain:
                self.say("\n".join(table.lines()))
            else:
                print_table(self._results, table)
        self.say(headline)

    def say(self, text: str) -> None:
        """Print a line among the results, without markup or wrapping."""
        self._results.print(Text(text), soft_wrap=True)

    def complain(self, text: str) -> None:
        """Print a line among the errors."""
        self._complaints.print(Text(text), soft_wrap=True)

    @contextmanager
    def _bar(self, steps: int, runs: int) -> Iterator[OnProgress]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._results, expand=True) as bar:
            task = bar.add_task("training", total=steps * runs, words="")
            reached: dict[str, int] = {}

            def update(run: str, step: int, words: str) -> None:
                reached[run] = step
                bar.update(task, description=run, completed=sum(reached.values()), words=words)

            yield update

    @contextmanager
    def _lines(self, steps: int) -> Iterator[OnProgress]:
        due: dict[str, int] = {}  # the next step of each run that is worth a line

        def update(run: str, step: int, words: str) -> None:
            apart = max(steps // _LINES_A_RUN, 1)
            if step >= due.setdefault(run, apart) or step == steps:
                due[run] = (step // apart + 1) * apart
                self.say(f"{run}, step {step:,} of {steps:,}: {words}")

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
