"""The figures of the summary, against values worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from batchnorm.report.metrics import finite, first_step, summarize, to_json


def test_steps_count_until_the_accuracy_was_first_recorded_and_not_until_it_stayed() -> None:
    assert first_step([0, 5, 9, 12], [0.1, 0.9, 0.3, 0.95], 0.9) == 5
    assert first_step([0, 5], [0.1, 0.2], 0.1) == 0
    assert first_step([0, 5], [0.1, 0.2], 0.21) is None


def test_summary_of_one_run(make_run) -> None:  # type: ignore[no-untyped-def]
    summary = summarize([make_run()])
    assert summary["plain_best"] == {"mean": 0.96, "min": 0.96, "max": 0.96, "std": None}
    assert summary["steps_to_plain_best"] == {
        "level": None,
        "plain": [100],
        "normalized": [10],
        "ratio": [10.0],
    }
    assert summary["steps_to"] == [
        {"level": 0.8, "plain": [10], "normalized": [2], "ratio": [5.0]},
        {"level": 0.9, "plain": [20], "normalized": [4], "ratio": [5.0]},
        {"level": 0.95, "plain": [40], "normalized": [10], "ratio": [4.0]},
    ]
    assert summary["final_plain"]["mean"] == 0.96
    finals = {key: round(spread["mean"], 9) for key, spread in summary["final_normalized"].items()}
    assert finals == {"batch": 0.97, "running": 0.98, "paper": 0.96, "pooled": 0.95}


def test_spread_over_seeds_and_each_seed_against_its_own_best(make_run) -> None:  # type: ignore[no-untyped-def]
    slow = make_run(plain=(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.92, 0.9), seed=1)
    summary = summarize([make_run(), slow])
    assert summary["plain_best"] == pytest.approx({"mean": 0.94, "min": 0.92, "max": 0.96, "std": 0.04 / math.sqrt(2)})
    assert summary["steps_to_plain_best"] == {
        "level": None,
        "plain": [100, 40],
        "normalized": [10, 4],
        "ratio": [10.0, 10.0],
    }
    assert summary["final_plain"]["mean"] == pytest.approx(0.93)


def test_what_is_never_reached_has_no_ratio(make_run) -> None:  # type: ignore[no-untyped-def]
    summary = summarize([make_run(normalized=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))])
    assert summary["steps_to_plain_best"]["normalized"] == [None]
    assert summary["steps_to_plain_best"]["ratio"] == [None]


def test_a_level_held_from_the_start_has_no_ratio(make_run) -> None:  # type: ignore[no-untyped-def]
    summary = summarize([make_run(plain=[0.1] * 8)])
    assert summary["steps_to_plain_best"] == {
        "level": None,
        "plain": [0],
        "normalized": [0],
        "ratio": [None],
    }


def test_one_seed_without_a_finite_figure_leaves_none(make_run) -> None:  # type: ignore[no-untyped-def]
    broken = make_run(seed=1)
    broken["plain"]["travel"] = None
    summary = summarize([make_run(), broken])
    assert summary["travel_plain"] is None
    assert summary["travel_normalized"] == {"mean": 1.25, "min": 1.25, "max": 1.25, "std": 0.0}


def test_json_is_strict_and_comes_back_the_same(make_metrics) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics()
    assert json.loads(to_json(metrics)) == metrics
    metrics["seconds"] = math.nan
    with pytest.raises(ValueError):
        to_json(metrics)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_none(value: float) -> None:
    assert finite(value) is None
    assert finite(0.0) == 0.0
