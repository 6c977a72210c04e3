"""What section 4.2's experiment leaves behind: the keys of its ``metrics.json``, and what is computed from them.

An accuracy is a fraction from 0 to 1. Lists of one run all have the length of its ``steps``. A value that is not finite
is ``null``. Figures 2, 3 and 4 are those of the paper, arXiv 1502.03167.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypedDict

from batchnorm.report.metrics import Spread, Versions, first_step, spread

SCHEMA = 1
EXPERIMENT = "inception"

PLAIN = "inception"
ENSEMBLE_OF = "bn-x5"

NEIGHBOURS = 1
"""An evaluation is averaged with so many before and after it: one alone swings by one or two points."""


class Settings(TypedDict):
    """What was asked for."""

    steps: int
    batch_size: int
    seeds: list[int]
    ensemble: int  # number of networks that answer together
    width: float
    size: int | None  # as given to --size
    scale: str
    learning_rate: float  # of the plain network, after a sweep
    decay: float
    sweep: bool
    device: str
    processes: int


class Data(TypedDict):
    """What it was run on."""

    name: str
    source: str | None  # as given to --data
    channels: int
    height: int  # of an image, in pixels
    width: int
    classes: int
    train: int  # number of images
    validation: int
    test: int


class Variant(TypedDict):
    """One network of the comparison."""

    key: str
    name: str
    sentence: str  # the paper's
    parameters: int
    recipe: dict[str, Any]  # its settings, all of them


class Change(TypedDict):
    """One change of section 4.2.1."""

    setting: str
    sentence: str  # the paper's
    paper: list[float | bool]  # before and after
    used: list[float | bool]
    why: str


class Run(TypedDict):
    """One network of one seed."""

    variant: str
    seed: int
    complete: bool  # False: stopped before the last step
    seconds: float
    cpu_seconds: float  # of all threads of the process
    steps: list[int]  # training steps done when a value was recorded; the first is 0
    loss: list[float | None]  # mean cross-entropy of the training mini-batches since the last point
    accuracy: list[float]  # on the validation images; with batch normalization under running averages
    recalibrated: list[float] | None  # the same under recalibrated statistics
    test_accuracy: float | None  # after the last step
    test_recalibrated: float | None


class SweepRow(TypedDict):
    """The plain network at one learning rate and decay."""

    learning_rate: float
    decay: float
    best: float  # validation accuracy, averaged over neighbouring evaluations
    best_step: int
    final: float
    complete: bool


class Reached(TypedDict):
    """A variant beside the plain network, over the seeds."""

    best: Spread  # highest validation accuracy, averaged over neighbouring evaluations
    best_step: list[int]  # where that is, one entry a seed
    steps_to_plain_best: list[int | None]  # until the plain network's best of the same seed; None: never
    ratio: list[float | None]  # the plain network's steps to its best over these
    test_accuracy: Spread | None
    test_recalibrated: Spread | None


class Ensemble(TypedDict):
    """Figure 4: networks that answer together, by the mean of their class probabilities."""

    variant: str
    seeds: list[int]
    single: list[float]  # test accuracy of each
    together: list[float]  # of the first one, the first two, and so on


class Summary(TypedDict):
    """Figures 3 and 4."""

    variants: dict[str, Reached]  # keys: of the variants that every seed begun has trained
    ensemble: Ensemble | None


class Metrics(TypedDict):
    """All of ``metrics.json``."""

    schema: int
    experiment: str
    complete: bool  # False: interrupted; what is here was recorded before that
    started: str  # UTC, ISO 8601
    seconds: float  # of this sitting; --resume begins another
    cpu_seconds: float  # of all networks, all sittings together
    settings: Settings
    data: Data
    versions: Versions
    variants: list[Variant]
    changes: list[Change]
    sweep: list[SweepRow] | None
    runs: list[Run]
    summary: Summary


def smoothed(accuracy: Sequence[float]) -> list[float]:
    """Each value averaged with its neighbours, as far as there are any.

    >>> smoothed([0.0, 0.3, 0.9, 0.9])
    [0.15, 0.4, 0.7, 0.9]
    """
    return [round(fmean(accuracy[max(k - NEIGHBOURS, 0) : k + NEIGHBOURS + 1]), 12) for k in range(len(accuracy))]


def best_of(steps: Sequence[int], accuracy: Sequence[float]) -> tuple[float, int]:
    """The highest of the smoothed values, and the first step that has it."""
    smooth = smoothed(accuracy)
    best = max(smooth)
    return best, steps[smooth.index(best)]


def at_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy is hardly above that of a guess.

    >>> at_chance(0.11, classes=10), at_chance(0.3, classes=10)
    (True, False)
    """
    return accuracy < 1.2 / classes


def summarize(runs: Sequence[Run], ensemble: Ensemble | None) -> Summary:
    """Figures 3 and 4, from the seeds whose plain network was trained to its end."""
    plain = {run["seed"]: run for run in runs if run["variant"] == PLAIN and run["complete"]}
    variants: dict[str, Reached] = {}
    for key in dict.fromkeys(run["variant"] for run in runs):
        compared = [run for run in runs if run["variant"] == key and run["complete"] and run["seed"] in plain]
        if compared:
            variants[key] = _reached(compared, [plain[run["seed"]] for run in compared])
    return Summary(variants=variants, ensemble=ensemble)


def _reached(runs: Sequence[Run], plain: Sequence[Run]) -> Reached:
    best = [best_of(run["steps"], run["accuracy"]) for run in runs]
    level = [best_of(run["steps"], run["accuracy"]) for run in plain]
    to_level = [
        first_step(run["steps"], smoothed(run["accuracy"]), wanted)
        for run, (wanted, _) in zip(runs, level, strict=True)
    ]
    return Reached(
        best=spread([value for value, _ in best]),
        best_step=[step for _, step in best],
        steps_to_plain_best=to_level,
        ratio=[slow / fast if fast else None for (_, slow), fast in zip(level, to_level, strict=True)],
        test_accuracy=_tested([run["test_accuracy"] for run in runs]),
        test_recalibrated=_tested([run["test_recalibrated"] for run in runs]),
    )


def _tested(values: Sequence[float | None]) -> Spread | None:
    present = [value for value in values if value is not None]
    return spread(present) if present else None
