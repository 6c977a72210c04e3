"""Figure 1 of the paper, drawn from the metrics of one experiment."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.lines import Line2D

from batchnorm.report.drawing import NORMALIZED, PLAIN, STYLE, grouped_steps, new_figure, saved
from batchnorm.report.metrics import Metrics, Network

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_WIDTH, _HEIGHT = 10.0, 3.7  # inches: the width of a page in landscape
_NETWORKS: dict[str, tuple[str, Any]] = {
    "with batch normalization": (NORMALIZED, "-"),
    "without": (PLAIN, (0, (4, 1.5))),
}

_PERCENTILES: dict[str, tuple[Any, float]] = {
    "85th percentile": ((0, (4, 1.5)), 1.1),
    "median": ("-", 1.6),
    "15th percentile": ((0, (1, 1.2)), 1.1),
}


def figure_1(metrics: Metrics) -> dict[Literal["png", "svg"], bytes]:
    """The three panels of the paper's figure 1, as the bytes of a PNG and of an SVG file.

    (a) Test accuracy over training steps: the mean over the seeds, and a band from the lowest to the highest. The
    dotted line is the best accuracy of the network without normalization; the dots mark where each reaches it.
    (b, c) The 15th, 50th and 85th percentile of the input to a typical sigmoid of the last hidden layer, without
    and with batch normalization, of the first seed and on one scale.

    The axis of the steps is logarithmic. On the paper's linear axis, the whole training of the normalized network would
    fit in the width of the axis line.
    """
    with rc_context(STYLE):
        figure = new_figure(_WIDTH, _HEIGHT)
        accuracy, plain, normalized = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
        plain.sharey(normalized)
        _draw_accuracy(accuracy, metrics)
        run = metrics["runs"][0]
        _draw_percentiles(plain, run["steps"], run["plain"], PLAIN)
        _draw_percentiles(normalized, run["steps"], run["normalized"], NORMALIZED)
        plain.set_title("(b) without batch normalization", loc="left")
        normalized.set_title("(c) with batch normalization", loc="left")
        plain.set_ylabel("input to the sigmoid (no unit)")
        normalized.tick_params(labelleft=False)
        for axes in (accuracy, plain, normalized):
            _draw_steps_axis(axes, metrics["settings"]["steps"])
        _draw_legends(figure)
        return saved(figure)


def _draw_accuracy(axes: Axes, metrics: Metrics) -> None:
    runs = metrics["runs"]
    # An interrupted run is shorter: the mean ends where the shortest run does.
    length = min(len(run["steps"]) for run in runs)
    steps = runs[0]["steps"][:length]
    best = metrics["summary"]["plain_best"]["mean"]
    axes.axhline(100 * best, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)))
    courses = ([run["normalized"] for run in runs], [run["plain"] for run in runs])
    to_best = metrics["summary"]["steps_to_plain_best"]
    reached_by = (to_best["normalized"], to_best["plain"])
    for networks, reaching, (colour, style) in zip(courses, reached_by, _NETWORKS.values(), strict=True):
        curves = np.array([network["accuracy"][:length] for network in networks])
        mean = curves.mean(axis=0)
        axes.plot(steps, 100 * mean, linestyle=style, color=colour, linewidth=1.6)
        if len(curves) > 1:
            axes.fill_between(
                steps, 100 * curves.min(axis=0), 100 * curves.max(axis=0), color=colour, alpha=0.2, linewidth=0
            )
        steps_of_runs = [step for step in reaching if step is not None]
        if len(steps_of_runs) == len(runs):
            # The number in the table. The mean curve crosses the line elsewhere.
            reached = round(fmean(steps_of_runs))
            axes.plot([reached], [100 * best], "o", color=colour, markersize=4.5, zorder=3, clip_on=False)
            axes.annotate(
                f"{reached:,}", (reached, 100 * best), (0, 8), textcoords="offset points", ha="center", color=colour
            )
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("(a) test accuracy", loc="left")


def _draw_percentiles(axes: Axes, steps: Sequence[int], network: Network, colour: str) -> None:
    percentiles = network["percentiles"]
    low, high = _array(percentiles["p15"]), _array(percentiles["p85"])
    axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    for values, (style, width) in zip((high, _array(percentiles["p50"]), low), _PERCENTILES.values(), strict=True):
        axes.plot(steps, values, linestyle=style, color=colour, linewidth=width)


def _draw_legends(figure: Figure) -> None:
    """Below the panels: the networks on the left, the percentiles on the right in grey."""
    networks = [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=label)
        for label, (colour, style) in _NETWORKS.items()
    ]
    percentiles = [
        Line2D([], [], color="0.25", linestyle=style, linewidth=width, label=label)
        for label, (style, width) in _PERCENTILES.items()
    ]
    figure.legend(handles=networks, loc="outside lower left", ncols=2)
    figure.legend(handles=percentiles, loc="outside lower right", ncols=3)


def _draw_steps_axis(axes: Axes, steps: int) -> None:
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # step 0 has no logarithm
    axes.set_xlim(0, steps)
    axes.set_xlabel("training steps (log scale)")
    grouped_steps(axes)


def _array(values: Sequence[float | None]) -> NDArray[np.float64]:
    """With NaN, which leaves a gap in a curve, where nothing finite was recorded."""
    return np.array([np.nan if value is None else value for value in values])
