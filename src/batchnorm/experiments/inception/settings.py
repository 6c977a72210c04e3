"""What a run of section 4.2 is asked for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.errors import ArgumentError, expected
from batchnorm.experiments.inception.variants import BASES, Base, Scale

_LARGEST_SEED = 2**32 - 1
_MOST_STEPS = 10**9
_MOST_SEEDS = 1000
_MOST_PIXELS = 10_000
_WIDEST = 16.0

FULL = {"steps": 1600, "seeds": 3, "ensemble": 3}
QUICK = {"steps": 500, "seeds": 1, "ensemble": 2}

POINTS = 20
"""Evaluations of a network, evenly apart; one more before the first step."""


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        steps: training steps of each network.
        seeds: number of runs of every variant, with seeds ``seed``, ``seed + 1`` and so on.
        seed: of the first run; it fixes weights, mini-batches and all that is drawn at random.
        ensemble: number of BN-x5 networks that answer together; those beyond ``seeds`` are trained for it alone.
        batch_size: images of a mini-batch; the paper's 32.
        width: factor of the network's channels; 1 is the paper's.
        size: pixels of an image's side; None: as the images are. 224 is the paper's.
        scale: "small" or "paper": which values section 4.2.1's settings have, see ``variants``.
        learning_rate: of the plain network; None: that of the scale.
        decay: the factor by which it falls over all steps; None: that of the scale.
        sweep: try rates and decays for the plain network first, and go on with the best.
        device: "cpu", "cuda" or another of torch's.
        processes: networks trained at the same time, each on one thread.

    Raises:
        ArgumentError: a value with which nothing can be trained.
    """

    steps: int = FULL["steps"]
    seeds: int = FULL["seeds"]
    seed: int = 0
    ensemble: int = FULL["ensemble"]
    batch_size: int = 32
    width: float = 1 / 8
    size: int | None = None
    scale: Scale = "small"
    learning_rate: float | None = None
    decay: float | None = None
    sweep: bool = False
    device: str = "cpu"
    processes: int = 1

    def __post_init__(self) -> None:
        _within("steps", self.steps, 1, _MOST_STEPS, "The default is 1600.")
        _within("seeds", self.seeds, 1, _MOST_SEEDS, "Each seed is one run of every network.")
        _within("a seed", self.seed, 0, _LARGEST_SEED - _MOST_SEEDS, "Any number in that range will do.")
        _within("an ensemble", self.ensemble, 0, _MOST_SEEDS, "0 leaves it out; the paper's has 6 networks.")
        _within("a batch size", self.batch_size, 2, _MOST_STEPS, "The paper's is 32.")
        _within("a width", self.width, 0.01, _WIDEST, "1 is the paper's, 0.125 the default.")
        if self.size is not None:
            _within("a size", self.size, 1, _MOST_PIXELS, "224 is the paper's.")
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            todo = f"The default is {BASES['small'].learning_rate:g}."
            raise ArgumentError(expected("Settings", "a learning rate above 0", self.learning_rate, todo))
        if self.decay is not None and not (math.isfinite(self.decay) and self.decay >= 1):
            todo = "It is the factor by which the learning rate falls; 1 leaves it as it is."
            raise ArgumentError(expected("Settings", "a decay of at least 1", self.decay, todo))
        if self.scale not in BASES:
            raise ArgumentError(
                expected("Settings", f"a scale among {', '.join(BASES)}", repr(self.scale), "Choose one of them.")
            )
        _within("processes", self.processes, 1, _processors(), "Each trains one network on one core of this machine.")
        self._check_device()

    @property
    def base(self) -> Base:
        """The plain network's training, before any sweep."""
        found = BASES[self.scale]
        return Base(
            learning_rate=found.learning_rate if self.learning_rate is None else self.learning_rate,
            decay=found.decay if self.decay is None else self.decay,
            l2_weight=found.l2_weight,
            crops=found.crops,
        )

    def _check_device(self) -> None:
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # how torch says that it was built without CUDA
            reason = str(error).splitlines()[0]
            raise ArgumentError(
                expected("Settings", "a device of this machine", f"{self.device!r} ({reason})", "Leave --device away.")
            ) from error


def settings_for(
    *,
    quick: bool,
    steps: int | None,
    seeds: int | None,
    ensemble: int | None,
    device: str | None,
    processes: int | None,
    **others: Any,
) -> Settings:
    """Settings with what depends on the machine and on ``quick`` filled in where it is None; see ``Settings``."""
    default = QUICK if quick else FULL
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(
        steps=default["steps"] if steps is None else steps,
        seeds=default["seeds"] if seeds is None else seeds,
        ensemble=default["ensemble"] if ensemble is None else ensemble,
        device=device,
        processes=_processors() if processes is None and device == "cpu" else processes or 1,
        **others,
    )


def recorded_steps(steps: int) -> list[int]:
    """The steps at which every network is evaluated.

    >>> recorded_steps(100)[:4], len(recorded_steps(2000)), recorded_steps(3)
    ([0, 5, 10, 15], 21, [0, 1, 2, 3])
    """
    count = min(POINTS, steps)
    return [round(position * steps / count) for position in range(count + 1)]


def _processors() -> int:
    return os.cpu_count() or 1


def _within(what: str, value: float, least: float, most: float, todo: str) -> None:
    if not least <= value <= most:  # not for a NaN either
        raise ArgumentError(expected("Settings", f"{what} from {least} to {most}", value, todo))
