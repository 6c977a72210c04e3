"""The rows of a benchmark as one figure: time as a multiple of a copy, every peer on a line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from batchnorm.bench.peers import OURS, TITLES
from batchnorm.bench.results import Row, name_of
from batchnorm.errors import ArgumentError, expected
from batchnorm.report.files import write_whole

KINDS = (".png", ".svg", ".pdf")
_MARKS = {  # shape and colour, so that either is enough
    OURS: ("o", "#0B4F8A"),
    "torch": ("s", "#C44E00"),
    "compile": ("D", "#6A3D9A"),
    "onednn": ("^", "#2B7A3D"),
    "flax": ("v", "#7F7F7F"),
}
_ROWS = 120  # a figure of more is no longer read


def check(path: Path) -> None:
    """
    Raises:
        ArgumentError: the file's name says no kind of picture that can be drawn
    """
    if path.suffix.lower() not in KINDS:
        todo = "Name it e.g. bench.png."
        raise ArgumentError(expected("bench", f"a plot named {', '.join(KINDS)}", repr(path.name), todo))


def draw(path: Path, rows: Sequence[Row], machine: str) -> int:
    """Draw the rows that have a speed and a copy to be held against, at most the first 120.

    Returns:
        how many were drawn; where there are none nothing is written

    Raises:
        OSError: the file cannot be written
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    shown = [row for row in rows if OURS in row["times_copy"]][:_ROWS]
    if not shown:
        return 0
    with rc_context({"font.family": ["DejaVu Sans"], "font.size": 9, "svg.hashsalt": "batchnorm"}):
        figure = Figure(figsize=(9, 1.6 + 0.28 * len(shown)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, row in enumerate(shown):
            ratios = [row["times_copy"][peer] for peer in _MARKS if peer in row["times_copy"]]
            axes.plot([min(ratios), max(ratios)], [place, place], color="0.8", linewidth=1, zorder=1)
            for peer, (marker, colour) in _MARKS.items():
                if peer in row["times_copy"]:
                    axes.plot(row["times_copy"][peer], place, marker, color=colour, markersize=5.5, zorder=2)
        axes.axvline(1.0, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.set_xlabel("time, as a multiple of a copy of the input (log scale); medians")
        axes.set_yticks(
            range(len(shown)), [name_of(row).replace(f" {row['mode']}", f"\n{row['mode']}") for row in shown]
        )
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.suptitle(machine.replace("; ", "\n"), fontsize=7.5, x=0.01, ha="left", color="0.35")
        present = [peer for peer in _MARKS if any(peer in row["times_copy"] for row in shown)]
        handles = [
            Line2D([], [], marker=_MARKS[peer][0], color=_MARKS[peer][1], linestyle="none", label=TITLES[peer])
            for peer in present
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=200)
    write_whole(path.parent, {path.name: buffer.getvalue()})
    return len(shown)
