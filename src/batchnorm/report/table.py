"""The figures of an experiment as rows of text, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from batchnorm.report.metrics import Metrics, Spread, Steps

# Below this accuracy the network without normalization has hardly learned, and a ratio of steps means little.
_LEARNED = 0.5

STATISTICS_LABELS = {
    "running": "with, running averages (.eval())",
    "batch": "with, statistics of the test mini-batches",
    "paper": "with, Algorithm 2 as printed",
    "pooled": "with, Algorithm 2 with pooled moments",
}


@dataclass(frozen=True)
class Table:
    """A caption, the heads of the columns, and the rows, each as long as the heads."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Without columns: each row says what its figures are. Empty cells are left out.

        >>> Table("Sizes", ("file", "bytes", "lines"), [("a", "12", ""), ("b", "9", "1")]).lines()
        ['Sizes:', '  a: bytes 12', '  b: bytes 9; lines 1']
        """
        found = [f"{self.caption}:"]
        for name, *cells in self.rows:
            named = (f"{head} {cell}" for head, cell in zip(self.heads[1:], cells, strict=True) if cell)
            found.append(f"  {name}: {'; '.join(named)}")
        return found


def tables(metrics: Metrics) -> tuple[Table, ...]:
    """Steps to an accuracy, final accuracies, and how steady the inputs to the sigmoids are."""
    summary = metrics["summary"]
    several = len(metrics["runs"]) > 1
    best = f"{accuracy(summary['plain_best'])}, the best without"
    return (
        Table(
            "Training steps to reach a test accuracy" + (", mean (lowest to highest)" if several else ""),
            ("test accuracy", "without", "with", "times sooner"),
            (
                *((f"{100 * (row['level'] or 0):.0f} %", *_steps_row(row)) for row in summary["steps_to"]),
                (best, *_steps_row(summary["steps_to_plain_best"])),
            ),
        ),
        Table(
            "Test accuracy after the last step"
            + (", mean ± standard deviation (lowest to highest)" if several else ""),
            ("batch normalization, evaluated with", "test accuracy"),
            (
                ("without", accuracy(summary["final_plain"])),
                *((label, accuracy(summary["final_normalized"][key])) for key, label in STATISTICS_LABELS.items()),
            ),
        ),
        Table(
            "Inputs to the 100 sigmoids of the last hidden layer over training, mean over them",
            ("", "without", "with"),
            (
                (
                    "the median moves by (largest − smallest)",
                    _number(summary["travel_plain"]),
                    _number(summary["travel_normalized"]),
                ),
                (
                    "the 15th to 85th percentile widens (widest ÷ narrowest)",
                    _number(summary["spread_growth_plain"], "×"),
                    _number(summary["spread_growth_normalized"], "×"),
                ),
            ),
        ),
    )


def headline(metrics: Metrics) -> str:
    """The result in a sentence or two."""
    summary = metrics["summary"]
    reached = summary["steps_to_plain_best"]
    runs = len(metrics["runs"])
    best = f"{100 * summary['plain_best']['mean']:.1f} %"
    average = f" on average over {runs} runs" if runs > 1 else ""
    without = f"{_mean_steps(reached['plain'])}{average}"
    text = f"Without batch normalization the best test accuracy is {best}, at step {without}"
    missed = reached["normalized"].count(None)
    ratios = _present(reached["ratio"])
    if missed == runs:
        text += f"; with it that is not reached in {_last_step(metrics):,} steps."
    elif missed:
        text += f"; with it that is reached in {runs - missed} of {runs} runs."
    else:
        text += f"; with it that is reached at step {_mean_steps(reached['normalized'])}"
        # One best value that came late by chance makes one ratio and the mean huge, so the range is shown too.
        sooner = f"{min(ratios):.3g} to {max(ratios):.3g}" if len(ratios) > 1 else "".join(f"{r:.3g}" for r in ratios)
        text += f", {sooner} times sooner." if ratios else "."
    if summary["plain_best"]["mean"] < _LEARNED:
        text += " The network without it has hardly begun to learn by then: more steps say more."
    return text


def accuracy(spread: Spread) -> str:
    """In per cent, with the spread over seeds where there are several.

    >>> accuracy(Spread(mean=0.96875, min=0.96875, max=0.96875, std=None))
    '96.9 %'
    >>> accuracy(Spread(mean=0.9705, min=0.965, max=0.976, std=0.0078))
    '97.0 ± 0.8 % (96.5 to 97.6)'
    """
    mean, lowest, highest = (100 * spread[key] for key in ("mean", "min", "max"))
    if spread["std"] is None:
        return f"{mean:.1f} %"
    return f"{mean:.1f} ± {100 * spread['std']:.1f} % ({lowest:.1f} to {highest:.1f})"


def _steps_row(row: Steps) -> tuple[str, str, str]:
    return over_seeds(row["plain"], "d"), over_seeds(row["normalized"], "d"), over_seeds(row["ratio"], "r")


def over_seeds(values: Sequence[float | None], kind: str) -> str:
    """Steps or ratios over seeds; what was never reached is said, and not left out of a mean without a word."""
    present = _present(values)
    if not present:
        return "–" if kind == "r" else "not reached"
    form = "{:,.0f}" if kind == "d" else "{:,.3g}"
    text = form.format(fmean(present))
    if len(present) > 1:
        text += f" ({form.format(min(present))} to {form.format(max(present))})"
    if len(present) < len(values):
        text += f", in {len(present)} of {len(values)} runs"
    return text


def _number(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return "not finite"
    text = f"{spread['mean']:.3g}{unit}"
    if spread["std"] is not None:
        text += f" ({spread['min']:.3g} to {spread['max']:.3g})"
    return text


def _mean_steps(values: Sequence[int | None]) -> str:
    return f"{fmean(_present(values)):,.0f}"


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _last_step(metrics: Metrics) -> int:
    return min(run["steps"][-1] for run in metrics["runs"])
