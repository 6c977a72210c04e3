"""Figure 1: its panels, its scales, and that it can be drawn from whatever was recorded."""

from __future__ import annotations

import re
import struct

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from batchnorm.report import drawing as module
from batchnorm.report.figure import figure_1


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, to look into; they are not rendered, which takes most of the time."""
    figures: list[Figure] = []

    def keep(figure: Figure, kind: str) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(module, "_saved", keep)
    return figures


def test_both_files_are_whole(make_metrics) -> None:  # type: ignore[no-untyped-def]
    files = figure_1(make_metrics())
    width, height = struct.unpack(">II", files["png"][16:24])
    assert files["png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert (width, height) == (3000, 1110)  # 10 × 3.7 inches at 300 dots an inch
    svg = files["svg"].decode()
    assert svg.rstrip().endswith("</svg>")
    assert not re.search(r"<image|href=\"(?!#)", svg)


def test_three_panels_with_labelled_axes_and_one_scale_in_b_and_c(make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    figure_1(make_metrics())
    accuracy, plain, normalized = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == [
        "(a) test accuracy",
        "(b) without batch normalization",
        "(c) with batch normalization",
    ]
    assert accuracy.get_ylabel() == "test accuracy (%)"
    assert plain.get_ylabel() == "input to the sigmoid (no unit)"
    assert all(axes.get_xlabel() == "training steps (log scale)" for axes in drawn[0].axes)
    assert plain.get_ylim() == normalized.get_ylim()
    labels = [text.get_text() for legend in drawn[0].legends for text in legend.get_texts()]
    assert labels == ["with batch normalization", "without", "85th percentile", "median", "15th percentile"]


def test_curves_are_what_was_recorded(make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics()
    figure_1(metrics)
    accuracy, plain, normalized = drawn[0].axes
    run = metrics["runs"][0]
    curves = [line for line in accuracy.lines if len(line.get_xdata()) == 8]
    assert [list(line.get_ydata()) for line in curves] == [
        pytest.approx([100 * value for value in run[key]["accuracy"]]) for key in ("normalized", "plain")
    ]
    for axes, key in ((plain, "plain"), (normalized, "normalized")):
        percentiles = run[key]["percentiles"]
        assert [list(line.get_ydata()) for line in axes.lines] == [
            percentiles["p85"],
            percentiles["p50"],
            percentiles["p15"],
        ]
    assert [text.get_text() for text in accuracy.texts] == ["10", "100"]


def test_curves_can_be_told_apart_without_colour(make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    figure_1(make_metrics())
    for axes in drawn[0].axes:
        styles = [line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 8]
        widths = [line._unscaled_dash_pattern for line in axes.lines if len(line.get_xdata()) == 8]
        assert len(set(map(str, zip(styles, widths, strict=True)))) == len(styles)


def test_the_same_metrics_give_the_same_bytes(make_metrics) -> None:  # type: ignore[no-untyped-def]
    assert figure_1(make_metrics()) == figure_1(make_metrics())


def test_matplotlibs_settings_are_put_back(make_metrics) -> None:  # type: ignore[no-untyped-def]
    before = dict(mpl.rcParams)
    figure_1(make_metrics())
    assert dict(mpl.rcParams) == before


def test_several_seeds_show_their_mean_and_a_band(make_run, make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    figure_1(make_metrics(make_run(), make_run(plain=[0.3] * 8, seed=1)))
    accuracy = drawn[0].axes[0]
    (mean,) = (line for line in accuracy.lines if len(line.get_xdata()) == 8 and line.get_linestyle() == "--")
    assert mean.get_ydata()[-1] == pytest.approx(63)
    assert len(accuracy.collections) == 2


def test_the_marked_steps_are_the_tables(make_run, make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    slow = make_run(plain=(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.92, 0.9), seed=1)
    never = make_run(normalized=[0.2] * 8, seed=2)
    figure_1(make_metrics(make_run(), slow))
    figure_1(make_metrics(make_run(), slow, never))
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["7", "70"]
    assert [text.get_text() for text in drawn[2].axes[0].texts] == ["80"]


@pytest.mark.parametrize("points", [1, 3])
def test_an_interrupted_run_is_drawn_as_far_as_it_went(make_run, make_metrics, points: int) -> None:  # type: ignore[no-untyped-def]
    short = make_run(plain=[0.1] * points, normalized=[0.2] * points, seed=1)
    figure_1(make_metrics(make_run(), short))
    figure_1(make_metrics(short))


def test_what_was_not_finite_leaves_a_gap(make_run, make_metrics, drawn) -> None:  # type: ignore[no-untyped-def]
    run = make_run()
    run["plain"]["percentiles"]["p50"][4:] = [None] * 4
    figure_1(make_metrics(run))
    assert [value == value for value in drawn[0].axes[1].lines[1].get_ydata()] == [True] * 4 + [False] * 4


def test_nothing_finite_at_all(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    run = make_run()
    for key in ("p15", "p50", "p85"):
        run["plain"]["percentiles"][key] = [None] * 8
        run["normalized"]["percentiles"][key] = [None] * 8
    figure_1(make_metrics(run))
