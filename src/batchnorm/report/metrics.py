"""What an experiment leaves behind: the keys of ``metrics.json``, and what can be computed from them.

An accuracy is a fraction from 0 to 1. Lists of one run all have the length of its ``steps``. A value that is not
finite (a network whose training diverged) is ``null``. The paper is arXiv 1502.03167; section 4.1, figure 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypedDict

SCHEMA = 1

# Ways to get the statistics with which a trained, normalized network is evaluated; see AccuracyByStatistics.
STATISTICS = ("batch", "running", "paper", "pooled")

LEVELS = (0.8, 0.9, 0.95)


class Settings(TypedDict):
    """What was asked for."""

    steps: int  # training steps, one mini-batch each
    batch_size: int  # examples in a mini-batch
    learning_rate: float
    weight_std: float  # standard deviation of the Gaussian initial weights; biases start at 0
    hidden: list[int]  # width of each hidden layer
    seeds: list[int]  # one run each
    threads: int


class Data(TypedDict):
    """What it was run on."""

    name: str
    source: str  # as given to --data
    height: int  # of an image, in pixels
    width: int
    train: int  # number of images
    test: int


class Versions(TypedDict):
    """With what it was run."""

    batchnorm: str
    torch: str
    numpy: str
    python: str
    machine: str  # operating system and processor


class Percentiles(TypedDict):
    """Percentiles over the test set of the input to one sigmoid of the last hidden layer, step by step."""

    p15: list[float | None]
    p50: list[float | None]
    p85: list[float | None]


class Network(TypedDict):
    """One network's course."""

    accuracy: list[float]  # on the test set; with batch normalization under running averages
    unit: int  # the typical sigmoid of the last hidden layer: of median travel among all of them
    percentiles: Percentiles  # of that sigmoid's input
    travel: float | None  # how far the 50th percentile moves, largest minus smallest; mean over the layer's sigmoids
    spread_growth: float | None  # largest over smallest p85 - p15; geometric mean over the layer's sigmoids


class AccuracyByStatistics(TypedDict):
    """Test accuracy of the normalized network, by the statistics it is evaluated with."""

    batch: list[float]  # of the test mini-batches themselves
    running: list[float]  # running averages, as .eval() uses them
    paper: list[float]  # Algorithm 2 as printed: m/(m-1) times the mean of the batches' variances
    pooled: list[float]  # Algorithm 2 over merged moments: exact for the images seen


class Run(TypedDict):
    """Both networks, trained from the same weights on the same mini-batches."""

    seed: int
    complete: bool  # False: stopped before the last step
    seconds: float
    steps: list[int]  # training steps done when a value was recorded; the first is 0
    plain: Network
    normalized: Network
    accuracy_by_statistics: AccuracyByStatistics


class Spread(TypedDict):
    """One figure over all seeds."""

    mean: float
    min: float
    max: float
    std: float | None  # sample standard deviation; None for one seed


class Steps(TypedDict):
    """Steps until an accuracy was first recorded, one entry a seed; None where it never was."""

    level: float | None  # the accuracy; None: the best of the plain network, different for each seed
    plain: list[int | None]
    normalized: list[int | None]
    ratio: list[float | None]  # plain / normalized


class Summary(TypedDict):
    """The table of the report."""

    plain_best: Spread  # best accuracy of the network without normalization
    steps_to_plain_best: Steps
    steps_to: list[Steps]  # for each of LEVELS
    final_plain: Spread
    final_normalized: dict[str, Spread]  # keys: STATISTICS
    travel_plain: Spread | None
    travel_normalized: Spread | None
    spread_growth_plain: Spread | None
    spread_growth_normalized: Spread | None


class Metrics(TypedDict):
    """All of ``metrics.json``."""

    schema: int
    complete: bool  # False: interrupted; what is here was recorded before that
    started: str  # UTC, ISO 8601
    seconds: float
    settings: Settings
    data: Data
    versions: Versions
    runs: list[Run]  # one a seed
    summary: Summary


def summarize(runs: Sequence[Run]) -> Summary:
    """The figures of the table, from at least one run."""
    best = [max(run["plain"]["accuracy"]) for run in runs]
    return Summary(
        plain_best=spread(best),
        steps_to_plain_best=_steps(runs, None, best),
        steps_to=[_steps(runs, level, [level] * len(runs)) for level in LEVELS],
        final_plain=spread([run["plain"]["accuracy"][-1] for run in runs]),
        final_normalized={
            "batch": spread([run["accuracy_by_statistics"]["batch"][-1] for run in runs]),
            "running": spread([run["accuracy_by_statistics"]["running"][-1] for run in runs]),
            "paper": spread([run["accuracy_by_statistics"]["paper"][-1] for run in runs]),
            "pooled": spread([run["accuracy_by_statistics"]["pooled"][-1] for run in runs]),
        },
        travel_plain=_spread_or_none([run["plain"]["travel"] for run in runs]),
        travel_normalized=_spread_or_none([run["normalized"]["travel"] for run in runs]),
        spread_growth_plain=_spread_or_none([run["plain"]["spread_growth"] for run in runs]),
        spread_growth_normalized=_spread_or_none([run["normalized"]["spread_growth"] for run in runs]),
    )


def first_step(steps: Sequence[int], accuracy: Sequence[float], level: float) -> int | None:
    """The first recorded step at which ``accuracy`` is at least ``level``.

    >>> first_step([0, 10, 20], [0.1, 0.8, 0.9], 0.8)
    10
    >>> first_step([0, 10, 20], [0.1, 0.8, 0.9], 0.95) is None
    True
    """
    return next((step for step, value in zip(steps, accuracy, strict=True) if value >= level), None)


def to_json(metrics: Mapping[str, Any]) -> str:
    """The text of ``metrics.json``: strict JSON, so a NaN that slipped through is an error and not a broken file."""
    return json.dumps(metrics, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def finite(value: float) -> float | None:
    """``value``, or None where it is infinite or not a number: JSON has no word for those."""
    return value if math.isfinite(value) else None


def _steps(runs: Sequence[Run], level: float | None, levels: Sequence[float]) -> Steps:
    plain = [
        first_step(run["steps"], run["plain"]["accuracy"], wanted) for run, wanted in zip(runs, levels, strict=True)
    ]
    normalized = [
        first_step(run["steps"], run["normalized"]["accuracy"], wanted)
        for run, wanted in zip(runs, levels, strict=True)
    ]
    return Steps(
        level=level,
        plain=plain,
        normalized=normalized,
        ratio=[slow / fast if slow and fast else None for slow, fast in zip(plain, normalized, strict=True)],
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean, range and sample standard deviation of one figure over the seeds."""
    return Spread(
        mean=fmean(values),
        min=min(values),
        max=max(values),
        std=stdev(values) if len(values) > 1 else None,
    )


def _spread_or_none(values: Sequence[float | None]) -> Spread | None:
    present = [value for value in values if value is not None]
    return spread(present) if len(present) == len(values) else None
