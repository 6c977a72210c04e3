"""Metrics made by hand, with results that can be read off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from batchnorm.report.metrics import (
    AccuracyByStatistics,
    Data,
    Metrics,
    Network,
    Percentiles,
    Run,
    Settings,
    Versions,
    summarize,
)

STEPS = [0, 1, 2, 4, 10, 20, 40, 100]

MakeRun = Callable[..., Run]
MakeMetrics = Callable[..., Metrics]


def _network(accuracy: Sequence[float], unit: int) -> Network:
    values = [float(k) for k in range(len(accuracy))]
    return Network(
        accuracy=list(accuracy),
        unit=unit,
        percentiles=Percentiles(p15=[v - 2 for v in values], p50=list(values), p85=[v + 1 for v in values]),
        travel=1.25,
        spread_growth=3.0,
    )


@pytest.fixture
def make_run() -> MakeRun:
    """A run with these accuracies at ``STEPS``, or at as many of them as there are accuracies."""

    def make(
        plain: Sequence[float] = (0.1, 0.1, 0.2, 0.5, 0.82, 0.91, 0.95, 0.96),
        normalized: Sequence[float] = (0.1, 0.5, 0.85, 0.92, 0.96, 0.97, 0.975, 0.98),
        seed: int = 0,
    ) -> Run:
        return Run(
            seed=seed,
            complete=len(plain) == len(STEPS),
            seconds=1.5,
            steps=STEPS[: len(plain)],
            plain=_network(plain, unit=3),
            normalized=_network(normalized, unit=8),
            accuracy_by_statistics=AccuracyByStatistics(
                batch=[value - 0.01 for value in normalized],
                running=list(normalized),
                paper=[value - 0.02 for value in normalized],
                pooled=[value - 0.03 for value in normalized],
            ),
        )

    return make


@pytest.fixture
def make_metrics(make_run: MakeRun) -> MakeMetrics:
    """Metrics of these runs; of one with the usual accuracies where none are given."""

    def make(*runs: Run, name: str = "a few digits", source: str = "digits") -> Metrics:
        runs = runs or (make_run(),)
        return Metrics(
            schema=1,
            complete=all(run["complete"] for run in runs),
            started="2024-05-06T07:08:09+00:00",
            seconds=3.25,
            settings=Settings(
                steps=100,
                batch_size=60,
                learning_rate=0.1,
                weight_std=0.1,
                hidden=[100, 100, 100],
                seeds=list(range(len(runs))),
                threads=1,
            ),
            data=Data(name=name, source=source, height=8, width=8, train=1317, test=480),
            versions=Versions(
                batchnorm="9.8.7", torch="2.13.0", numpy="2.4.0", python="3.11.7", machine="Linux x86_64"
            ),
            runs=list(runs),
            summary=summarize(runs),
        )

    return make
