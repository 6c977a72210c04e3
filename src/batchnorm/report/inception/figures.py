"""Figures 2 and 4 of the paper, drawn from the metrics of one experiment."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.lines import Line2D

from batchnorm.report.drawing import NORMALIZED, PLAIN, STYLE, grouped_steps, new_figure, saved
from batchnorm.report.inception.metrics import PLAIN as PLAIN_KEY
from batchnorm.report.inception.metrics import Metrics, Run, at_chance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Colour and line of each variant: any two differ in lightness or in the line.
_LINES: dict[str, tuple[str, Any]] = {
    "inception": (PLAIN, "-"),
    "bn-baseline": ("#7FB2DD", "-"),
    "bn-x5": (NORMALIZED, "-"),
    "bn-x30": ("#6A3D9A", (0, (4, 1.5))),
    "bn-x5-sigmoid": ("#2E7D32", (0, (4, 1, 1, 1))),
    "inception-sigmoid": (PLAIN, (0, (1, 1.2))),
}

_LAG_OF = "bn-x5"  # the variant whose running averages are compared with recalibrated statistics
_BELOW = 0.12  # how far below the plain network's best the second panel begins

Bytes = dict[Literal["png", "svg"], bytes]


def figure_2(metrics: Metrics) -> Bytes:
    """Figure 2, as the bytes of a PNG and of an SVG file.

    (a) Validation accuracy over training steps: the mean over the seeds, and a band from the lowest to the highest.
    (b) The same near the plain network's best, which the dotted line marks; the dots are where each network reaches it.
    (c) BN-x5 under running averages and under recalibrated statistics, which differ in the first steps.
    """
    with rc_context(STYLE):
        figure = new_figure(10.0, 3.9)
        whole, near, lag = figure.subplots(1, 3, width_ratios=[1, 1.25, 1])
        drawn = _by_variant(metrics)
        for axes in (whole, near):
            for key, runs in drawn.items():
                _draw_curve(axes, [run["accuracy"] for run in runs], runs[0]["steps"], *_LINES[key])
        whole.set_ylim(0, 100)
        whole.set_title("(a) validation accuracy", loc="left")
        whole.set_ylabel("validation accuracy (%)")
        _draw_best(near, metrics)
        near.set_title("(b) near the plain network's best", loc="left")
        _draw_lag(lag, drawn.get(_LAG_OF, []))
        for axes in (whole, near, lag):
            axes.set_xlim(0, metrics["settings"]["steps"])
            axes.set_xlabel("training steps")
            grouped_steps(axes)
        handles = [
            Line2D([], [], color=_LINES[key][0], linestyle=_LINES[key][1], linewidth=1.6, label=_name(metrics, key))
            for key in drawn
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=6)
        return saved(figure)


def figure_4(metrics: Metrics) -> Bytes:
    """Figure 4, as the bytes of a PNG and of an SVG file.

    Test accuracy of every network (open dots, one a seed; filled: their mean), and of the ensembles of the first two,
    three and more networks of the variant that is combined. Networks at chance are left out.
    """
    with rc_context(STYLE):
        classes = metrics["data"]["classes"]
        rows: list[tuple[str, str, str, list[float]]] = []  # name, colour, marker, accuracies
        for key, runs in _by_variant(metrics).items():
            found = [run["test_accuracy"] for run in runs if run["test_accuracy"] is not None]
            if found and not at_chance(max(found), classes):
                rows.append((_name(metrics, key), _LINES[key][0], "o", found))
        ensemble = metrics["summary"]["ensemble"]
        if ensemble is not None:
            name, colour = _name(metrics, ensemble["variant"]), _LINES[ensemble["variant"]][0]
            rows += [
                (f"ensemble of {count} {name}", colour, "D", [together])
                for count, together in enumerate(ensemble["together"], 1)
                if count > 1
            ]
        figure = new_figure(7.0, 0.9 + 0.36 * max(len(rows), 1))
        axes = figure.subplots()
        for position, (_, colour, marker, values) in enumerate(rows):
            if len(values) > 1:
                axes.plot([100 * v for v in values], [position] * len(values), "o", color=colour, mfc="none", ms=5)
            mean = 100 * fmean(values)
            axes.plot([mean], [position], marker, color=colour, ms=5)
            axes.annotate(f"{mean:.1f}", (mean, position), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.8)
        axes.set_xlabel("test accuracy (%)")
        return saved(figure)


def _by_variant(metrics: Metrics) -> dict[str, list[Run]]:
    """The runs of each variant of the comparison: of the seeds asked for, without the ensemble's further networks."""
    seeds = metrics["settings"]["seeds"]
    found: dict[str, list[Run]] = {}
    for run in metrics["runs"]:
        if run["seed"] in seeds:
            found.setdefault(run["variant"], []).append(run)
    return found


def _draw_curve(axes: Axes, courses: list[list[float]], steps: list[int], colour: str, style: Any) -> None:
    # A run that was cut short is as long as it is: the mean goes as far as all of them do.
    length = min(len(course) for course in courses)
    curves: NDArray[np.float64] = 100 * np.array([course[:length] for course in courses])
    axes.plot(steps[:length], curves.mean(axis=0), linestyle=style, color=colour, linewidth=1.5)
    if len(curves) > 1:
        axes.fill_between(steps[:length], curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _draw_best(axes: Axes, metrics: Metrics) -> None:
    """The plain network's best, and the step at which each network reaches it: means over the seeds."""
    variants = metrics["summary"]["variants"]
    if PLAIN_KEY not in variants:
        return
    best = 100 * variants[PLAIN_KEY]["best"]["mean"]
    highest = 100 * max(row["best"]["max"] for row in variants.values())
    axes.axhline(best, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_ylim(max(0, best - 100 * _BELOW), highest + 1.5)
    dots = []
    for key, row in variants.items():
        steps = [step for step in row["steps_to_plain_best"] if step is not None]
        if len(steps) == len(row["steps_to_plain_best"]):
            dots.append((round(fmean(steps)), _LINES[key][0]))
    for position, (step, colour) in enumerate(sorted(dots)):
        axes.plot([step], [best], "o", color=colour, markersize=4.5, zorder=3, clip_on=False)
        # Alternately above and below, since neighbours would overlap.
        above = position % 2 == 0
        axes.annotate(
            f"{step:,}", (step, best), (0, 9 if above else -15), textcoords="offset points", ha="center", color=colour
        )


def _draw_lag(axes: Axes, runs: list[Run]) -> None:
    axes.set_title("(c) BN-x5, by the statistics", loc="left")
    axes.set_ylim(0, 100)
    recalibrated = [run["recalibrated"] for run in runs if run["recalibrated"] is not None]
    if not recalibrated:
        return
    steps = runs[0]["steps"]
    _draw_curve(axes, recalibrated, steps, "#2B2B2B", (0, (4, 1.5)))
    _draw_curve(axes, [run["accuracy"] for run in runs], steps, *_LINES[_LAG_OF])
    handles = [
        Line2D([], [], color=_LINES[_LAG_OF][0], linewidth=1.6, label="running averages"),
        Line2D([], [], color="#2B2B2B", linestyle=(0, (4, 1.5)), linewidth=1.6, label="recalibrated"),
    ]
    axes.legend(handles=handles, loc="lower right")


def _name(metrics: Metrics, key: str) -> str:
    return next(variant["name"] for variant in metrics["variants"] if variant["key"] == key)
