"""From the events of training to the ``Metrics`` that reports are drawn from."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor

from batchnorm.experiments.inception.images import ImageSet
from batchnorm.experiments.inception.network import Inception, parameter_count
from batchnorm.experiments.inception.settings import Settings
from batchnorm.experiments.inception.training import Job, Point, Tested, accuracy_of
from batchnorm.experiments.inception.variants import CHANGES, VARIANTS, Base, recipe
from batchnorm.experiments.record import versions
from batchnorm.report.inception.metrics import (
    ENSEMBLE_OF,
    EXPERIMENT,
    PLAIN,
    SCHEMA,
    Change,
    Data,
    Ensemble,
    Metrics,
    Run,
    SweepRow,
    Variant,
    best_of,
    summarize,
)
from batchnorm.report.inception.metrics import Settings as SettingsRecord
from batchnorm.report.metrics import finite


@dataclass(frozen=True)
class Event:
    """What a network in training says: a point, and with the last one its result on the test images.

    Attributes:
        point: of the course.
        tested: with the last point.
        seconds, cpu_seconds: taken so far.
    """

    point: Point
    tested: Tested | None
    seconds: float
    cpu_seconds: float


class Recording:
    """Events as they come; ``metrics`` can be asked for at any time."""

    def __init__(self, settings: Settings, images: ImageSet, source: str | None) -> None:
        self.settings = settings
        self.images = images
        self.source = source
        self.base = settings.base
        self.started = datetime.now(timezone.utc)
        self._clock = time.perf_counter()
        self._seconds = 0.0
        self._events: dict[Job, list[Event]] = {}

    @property
    def empty(self) -> bool:
        return not self._events

    def add(self, job: Job, event: Event) -> None:
        self._seconds = time.perf_counter() - self._clock
        self._events.setdefault(job, []).append(event)

    def choose(self) -> Base:
        """The best of the sweep's rates and decays, by validation accuracy; it is the plain network's from now on."""
        rows = self._sweep()
        best = max(rows, key=lambda row: row["best"])
        self.base = Base(best["learning_rate"], best["decay"], self.base.l2_weight, self.base.crops)
        return self.base

    def metrics(self) -> Metrics:
        """All that was recorded so far; at least one event is needed."""
        settings, images = self.settings, self.images
        runs = [self._run(job, events) for job, events in sorted(self._events.items(), key=_position) if not job.sweep]
        every = [event for events in self._events.values() for event in events[-1:]]
        sweep = self._sweep()
        return Metrics(
            schema=SCHEMA,
            experiment=EXPERIMENT,
            complete=len(runs) == len(jobs(settings, self.base)) and all(run["complete"] for run in runs),
            started=self.started.isoformat(timespec="seconds"),
            seconds=round(self._seconds, 3),
            cpu_seconds=round(sum(event.cpu_seconds for event in every), 3),
            settings=SettingsRecord(
                steps=settings.steps,
                batch_size=settings.batch_size,
                seeds=[settings.seed + k for k in range(settings.seeds)],
                ensemble=settings.ensemble,
                width=settings.width,
                size=settings.size,
                scale=settings.scale,
                learning_rate=self.base.learning_rate,
                decay=self.base.decay,
                sweep=settings.sweep,
                device=settings.device,
                processes=settings.processes,
            ),
            data=Data(
                name=images.name,
                source=self.source,
                channels=images.channels,
                height=images.height,
                width=images.width,
                classes=images.classes,
                train=len(images.train.labels),
                validation=len(images.validation.labels),
                test=len(images.test.labels),
            ),
            versions=versions(),
            variants=self._variants(),
            changes=self._changes(),
            sweep=sweep or None,
            runs=runs,
            summary=summarize(runs, self._ensemble()),
        )

    def _run(self, job: Job, events: list[Event]) -> Run:
        points, last = [event.point for event in events], events[-1]
        recalibrated = [point.recalibrated for point in points if point.recalibrated is not None]
        return Run(
            variant=job.variant,
            seed=job.seed,
            complete=last.tested is not None,
            seconds=round(last.seconds, 3),
            cpu_seconds=round(last.cpu_seconds, 3),
            steps=[point.step for point in points],
            loss=[finite(point.loss) for point in points],
            accuracy=[point.accuracy for point in points],
            recalibrated=recalibrated or None,
            test_accuracy=None if last.tested is None else last.tested.accuracy,
            test_recalibrated=None if last.tested is None else last.tested.recalibrated,
        )

    def _sweep(self) -> list[SweepRow]:
        rows = []
        for job, events in self._events.items():
            if job.sweep:
                steps, accuracy = [e.point.step for e in events], [e.point.accuracy for e in events]
                best, at = best_of(steps, accuracy)
                complete = steps[-1] == self.settings.steps
                rows.append(SweepRow(
                    learning_rate=job.learning_rate, decay=job.decay, best=best, best_step=at, final=accuracy[-1],
                    complete=complete,
                ))  # fmt: skip
        return sorted(rows, key=lambda row: (row["learning_rate"], row["decay"]))

    def _ensemble(self) -> Ensemble | None:
        tested = {
            job.seed: events[-1].tested
            for job, events in self._events.items()
            if job.variant == ENSEMBLE_OF and not job.sweep
        }
        members = [
            (seed, found) for seed, found in sorted(tested.items(), key=lambda item: item[0]) if found is not None
        ]
        members = members[: self.settings.ensemble]
        if len(members) < 2:
            return None
        labels = self.images.test.labels
        return Ensemble(
            variant=ENSEMBLE_OF,
            seeds=[seed for seed, _ in members],
            single=[found.accuracy for _, found in members],
            together=[
                answered_together([found.probabilities for _, found in members[:count]], labels)
                for count in range(1, len(members) + 1)
            ],
        )

    def _variants(self) -> list[Variant]:
        found = []
        for variant in VARIANTS:
            settings = recipe(variant, self.settings.scale, self.base)
            with torch.device("meta"):  # it is only counted
                network = Inception(
                    classes=self.images.classes,
                    channels=self.images.channels,
                    size=min(self.images.height, self.images.width),
                    width=self.settings.width,
                    normalize=variant.normalize,
                    nonlinearity=variant.nonlinearity,
                    generator=torch.Generator(),
                )
            found.append(
                Variant(
                    key=variant.key,
                    name=variant.name,
                    sentence=variant.sentence,
                    parameters=parameter_count(network),
                    recipe=asdict(settings),
                )
            )
        return found

    def _changes(self) -> list[Change]:
        scale = self.settings.scale
        return [
            Change(
                setting=name,
                sentence=change.sentence,
                paper=[change.paper.plain, change.paper.changed],
                used=[change.at(scale, changed=False), change.at(scale, changed=True)],
                why=change.why,
            )
            for name, change in CHANGES.items()
        ]


def jobs(settings: Settings, base: Base) -> list[Job]:
    """All networks of a run but those of the sweep, in the order in which they are trained.

    Seed by seed, so that a run that is stopped has compared what it has; the ensemble's further networks last.
    """
    found = [
        Job(variant.key, settings.seed + k, base.learning_rate, base.decay)
        for k in range(settings.seeds)
        for variant in VARIANTS
    ]
    for k in range(settings.seeds, settings.ensemble):
        found.append(Job(ENSEMBLE_OF, settings.seed + k, base.learning_rate, base.decay))
    return found


SWEEP = ((0.5, 10.0), (0.5, 30.0), (1.0, 10.0), (1.0, 30.0), (2.0, 10.0), (2.0, 30.0), (5.0, 30.0))
"""What a sweep tries: factors of the scale's learning rate, and decays. The last is the rate of BN-x5."""


def sweep_jobs(settings: Settings) -> list[Job]:
    """The plain network at every rate and decay of the sweep, with the first seed."""
    rate = settings.base.learning_rate
    return [Job(PLAIN, settings.seed, rate * factor, decay, True) for factor, decay in SWEEP]


def answered_together(probabilities: list[Tensor], labels: Tensor) -> float:
    """Accuracy of the mean of class probabilities, each of shape (images, classes) (section 4.2.3)."""
    return accuracy_of(torch.stack(probabilities).double().mean(dim=0), labels)


def _position(item: tuple[Job, list[Event]]) -> tuple[int, int]:
    keys = [variant.key for variant in VARIANTS]
    return item[0].seed, keys.index(item[0].variant)
