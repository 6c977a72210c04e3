"""Turns recorded points into ``Metrics``, from which reports are made."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray

from batchnorm.experiments.digits import Digits
from batchnorm.experiments.mnist import BATCH_SIZE, HIDDEN, Point, Settings
from batchnorm.report.metrics import (
    SCHEMA,
    AccuracyByStatistics,
    Data,
    Metrics,
    Network,
    Percentiles,
    Run,
    Versions,
    finite,
    summarize,
)
from batchnorm.report.metrics import Settings as SettingsRecord


class Recording:
    """Recorded points, one list for each seed. ``metrics`` can be called at any time.

    One call adds a whole point, so the records of both networks have the same length after an interruption at any
    instruction.
    """

    def __init__(self, settings: Settings, digits: Digits, source: str) -> None:
        self.settings = settings
        self.digits = digits
        self.source = source
        self.started = datetime.now(timezone.utc)
        self._clock = time.perf_counter()
        self._points: dict[int, list[Point]] = {}
        self._ended: dict[int, float] = {}  # seconds since the start when the last point of a seed came

    @property
    def empty(self) -> bool:
        return not self._points

    def add(self, seed: int, point: Point) -> None:
        self._ended[seed] = time.perf_counter() - self._clock
        self._points.setdefault(seed, []).append(point)

    def metrics(self) -> Metrics:
        """The metrics of all points recorded so far. At least one point is needed."""
        runs = []
        began = 0.0
        for seed, points in self._points.items():
            runs.append(self._run(seed, points, self._ended[seed] - began))
            began = self._ended[seed]
        settings = self.settings
        return Metrics(
            schema=SCHEMA,
            complete=len(runs) == settings.seeds and all(run["complete"] for run in runs),
            started=self.started.isoformat(timespec="seconds"),
            seconds=round(began, 3),
            settings=SettingsRecord(
                steps=settings.steps,
                batch_size=BATCH_SIZE,
                learning_rate=settings.learning_rate,
                weight_std=settings.weight_std,
                hidden=list(HIDDEN),
                seeds=[settings.seed + k for k in range(settings.seeds)],
                threads=settings.threads,
            ),
            data=Data(
                name=self.digits.name,
                source=self.source,
                height=self.digits.height,
                width=self.digits.width,
                train=len(self.digits.train_images),
                test=len(self.digits.test_images),
            ),
            versions=versions(),
            runs=runs,
            summary=summarize(runs),
        )

    def _run(self, seed: int, points: Sequence[Point], seconds: float) -> Run:
        return Run(
            seed=seed,
            complete=points[-1].step == self.settings.steps,
            seconds=round(seconds, 3),
            steps=[point.step for point in points],
            plain=_network(
                [point.plain_accuracy for point in points],
                np.stack([point.plain_percentiles.numpy() for point in points]),
            ),
            normalized=_network(
                [point.running_accuracy for point in points],
                np.stack([point.normalized_percentiles.numpy() for point in points]),
            ),
            accuracy_by_statistics=AccuracyByStatistics(
                batch=[point.batch_accuracy for point in points],
                running=[point.running_accuracy for point in points],
                paper=[point.paper_accuracy for point in points],
                pooled=[point.pooled_accuracy for point in points],
            ),
        )


def _network(accuracy: list[float], percentiles: NDArray[np.float32]) -> Network:
    """The metrics of one network over training, from percentiles of shape (points, 3, sigmoids).

    The typical sigmoid is the middle one when all are ordered by how far their median moves. The same rule picks it in
    both networks.
    """
    low, median, high = percentiles.astype(np.float64).transpose(1, 0, 2)
    travel = median.max(axis=0) - median.min(axis=0)
    unit = int(np.argsort(travel, kind="stable")[len(travel) // 2])
    spread = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.log(spread.max(axis=0) / spread.min(axis=0)).mean()
    return Network(
        accuracy=accuracy,
        unit=unit,
        percentiles=Percentiles(p15=_values(low[:, unit]), p50=_values(median[:, unit]), p85=_values(high[:, unit])),
        travel=finite(float(travel.mean())),
        spread_growth=finite(float(np.exp(growth))),
    )


def _values(values: NDArray[np.float64]) -> list[float | None]:
    """Numbers for JSON. Six significant digits are enough: float32 arithmetic keeps fewer."""
    return [finite(float(f"{value:.6g}")) for value in values]


def versions() -> Versions:
    """Versions of the software and the kind of machine."""
    return Versions(
        batchnorm=metadata.version("batchnorm"),
        torch=str(torch.__version__),
        numpy=np.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
    )
