"""One network of section 4.2: how it is trained, what is measured on it, and its state to go on from.

A step depends on the seed and on its number alone: mini-batches, crops, distortions and dropout are drawn from
generators made for that step. The state after a step is therefore the network, the optimizer and the points recorded,
and training that goes on from it ends with the same bits as training that never stopped.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm import recalibrate
from batchnorm.errors import DataError, NonFiniteError, expected
from batchnorm.experiments.inception.crops import distort
from batchnorm.experiments.inception.images import Images, ImageSet, Request, prepared
from batchnorm.experiments.inception.network import Inception
from batchnorm.experiments.inception.settings import Settings, recorded_steps
from batchnorm.experiments.inception.variants import BY_KEY, MOMENTUM, Base, Recipe, recipe

CALIBRATION_BATCHES = 20
"""Mini-batches of training images over which the statistics are recalibrated."""

_EVALUATION_BATCH = 250

# Streams of random numbers, one for each purpose.
_WEIGHTS, _ORDER, _CROPS, _NOISE, _CALIBRATION = range(5)


@dataclass(frozen=True)
class Job:
    """A network to train.

    Attributes:
        variant: its key, see ``variants.BY_KEY``.
        seed: of its weights and of all that is drawn.
        learning_rate, decay: of the plain network, from which the variant's follow.
        sweep: it is one of the sweep's, and never sees the test images.
    """

    variant: str
    seed: int
    learning_rate: float
    decay: float
    sweep: bool = False

    @property
    def name(self) -> str:
        if self.sweep:
            return f"sweep, rate {self.learning_rate:g}, decay {self.decay:g}"
        return f"{BY_KEY[self.variant].name}, seed {self.seed}"

    @property
    def file(self) -> str:
        """A name for files of this job."""
        kind = f"sweep-{self.learning_rate:g}-{self.decay:g}" if self.sweep else self.variant
        return f"{kind}-seed-{self.seed}"


@dataclass(frozen=True)
class Point:
    """What is recorded at one step.

    Attributes:
        step: training steps done.
        loss: mean cross-entropy of the training mini-batches since the last point; NaN at step 0.
        accuracy: on the validation images; with batch normalization under running averages.
        recalibrated: the same under statistics from ``recalibrate``; None without batch normalization.
    """

    step: int
    loss: float
    accuracy: float
    recalibrated: float | None


@dataclass(frozen=True)
class Tested:
    """A trained network on the test images.

    Attributes:
        accuracy, recalibrated: as in ``Point``.
        probabilities: of the classes under running averages, float32 of shape (images, classes).
    """

    accuracy: float
    recalibrated: float | None
    probabilities: Tensor


class Training:
    """A network in training.

    Arguments:
        job: which one
        settings: of the run
        images: to train and evaluate on

    Raises:
        DataError: there are too few images for a mini-batch.
    """

    def __init__(self, job: Job, settings: Settings, images: ImageSet) -> None:
        if len(images.train.labels) < settings.batch_size:
            wanted = f"at least {settings.batch_size} training images, one mini-batch, beside those for validation"
            raise DataError(expected("train", wanted, len(images.train.labels), "Take a larger set."))
        self.job = job
        self.settings = settings
        self.images = images
        self.device = torch.device(settings.device)
        base = Base(job.learning_rate, job.decay, settings.base.l2_weight, settings.base.crops)
        self.recipe: Recipe = recipe(BY_KEY[job.variant], settings.scale, base)
        self.network = self._build().to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self.optimizer = _optimizer(self.network, self.recipe)
        self.points: list[Point] = []
        self.tested: Tested | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    @property
    def step(self) -> int:
        """Training steps done at the last point; -1 before the first."""
        return self.points[-1].step if self.points else -1

    @property
    def finished(self) -> bool:
        return self.step == self.settings.steps and (self.tested is not None or self.job.sweep)

    def run(self) -> Iterator[Point]:
        """Train to the end, yielding each point once it is in ``points``. With the last one comes ``tested``."""
        for until in recorded_steps(self.settings.steps):
            if until <= self.step:
                continue
            began, cpu_began = time.perf_counter(), time.process_time()
            losses = [self._descend(step) for step in range(max(self.step, 0), until)]
            loss = torch.stack(losses).mean().item() if losses else math.nan
            accuracy, recalibrated, _ = self._evaluate(self.images.validation)
            tested = None
            if until == self.settings.steps and not self.job.sweep:
                tested = Tested(*self._evaluate(self.images.test))
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu_began
            self.tested = tested
            self.points.append(Point(until, loss, accuracy, recalibrated))
            yield self.points[-1]

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs, in types that ``torch.load(weights_only=True)`` reads."""
        tested = None
        if self.tested is not None:
            tested = [self.tested.accuracy, self.tested.recalibrated, self.tested.probabilities]
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "points": [asdict(point) for point in self.points],
            "tested": tested,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave, in this process or another."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.points = [Point(**point) for point in state["points"]]
        self.tested = None if state["tested"] is None else Tested(*state["tested"])
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]
        self._batches = None

    def _build(self) -> Inception:
        with torch.random.fork_rng(devices=[]):  # torch's layers draw weights of their own first
            return self._inception()

    def _inception(self) -> Inception:
        return Inception(
            classes=self.images.classes,
            channels=self.images.channels,
            size=min(self.images.height, self.images.width),
            width=self.settings.width,
            normalize=self.recipe.normalize,
            nonlinearity=self.recipe.nonlinearity,
            dropout=self.recipe.dropout,
            local_response=self.recipe.local_response,
            generator=_generator(self.job.seed, _WEIGHTS),
        )

    @torch.enable_grad()
    def _descend(self, step: int) -> Tensor:
        """One step of gradient descent; the loss is left on its device."""
        if self._batches is None:
            self._batches = self._mini_batches(step)
        images, labels = next(self._batches)
        noise = _generator(self.job.seed, _NOISE, step)
        x = prepared(images, self.device)
        if self.recipe.distortion:
            x = distort(x, self.recipe.distortion, noise)
        dropout = self.network.dropout
        if dropout.probability:
            dropout.generator = _generator(self.job.seed, _NOISE, step, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(step, self.settings.steps)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._mixed_precision():
            loss = cross_entropy(self.network(x), labels.to(self.device, non_blocking=True))
        loss.backward()
        self.optimizer.step()
        dropout.generator = None  # a generator of a device cannot be copied with the network
        return loss.detach()

    def _mini_batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the steps from ``first`` on, images as bytes."""
        order = _Order(
            self.job.seed, len(self.images.train.labels), self.settings.batch_size, self.recipe.fresh_batches
        )
        steps = range(first, self.settings.steps)
        crops = self.recipe.crops
        requests = (Request(order.batch(k), _seed(self.job.seed, _CROPS, k) if crops else None) for k in steps)
        labels = self.images.train.labels
        for step, images in zip(steps, self.images.train.batches(requests), strict=True):
            yield images, labels[order.batch(step)]

    @torch.no_grad()
    def _evaluate(self, images: Images) -> tuple[float, float | None, Tensor]:
        """Accuracy under running averages, under recalibrated statistics, and the former's probabilities."""
        accuracy, probabilities = self._measure(self.network, images)
        if not self.recipe.normalize:
            return accuracy, None, probabilities
        network = copy.deepcopy(self.network)
        try:
            with self._mixed_precision():
                recalibrate(network, list(self._calibration_batches()))
        except NonFiniteError:
            return accuracy, 0.0, probabilities  # training has diverged, and without statistics nothing is recognized
        return accuracy, self._measure(network, images)[0], probabilities

    def _calibration_batches(self) -> Iterator[Tensor]:
        """Mini-batches of the training size, the same ones at every point."""
        count, size = len(self.images.train.labels), self.settings.batch_size
        chosen = torch.randperm(count, generator=_generator(0, _CALIBRATION))[: size * CALIBRATION_BATCHES]
        requests = [Request(part) for part in chosen[: len(chosen) // size * size].view(-1, size)]
        for images in self.images.train.batches(requests):
            yield prepared(images, self.device)

    def _measure(self, network: nn.Module, images: Images) -> tuple[float, Tensor]:
        network.eval()
        requests = [Request(part) for part in torch.arange(len(images.labels)).split(_EVALUATION_BATCH)]
        scores = []
        for part in images.batches(requests):
            with self._mixed_precision():
                scores.append(network(prepared(part, self.device)).float().cpu())
        found = torch.cat(scores)
        return accuracy_of(found, images.labels), found.softmax(dim=1)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def accuracy_of(scores: Tensor, labels: Tensor) -> float:
    """The share of images whose label has the highest of the scores, shape (images, classes).

    ``argmax`` would take a NaN for the largest: where training has diverged no image counts as recognized.
    """
    right = (scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)
    return int(right.sum()) / len(right)


class _Order:
    """Which images are in the mini-batch of a step; the few left over after whole mini-batches sit an epoch out."""

    def __init__(self, seed: int, images: int, batch_size: int, fresh: bool) -> None:
        self._seed, self._images, self._size, self._fresh = seed, images, batch_size, fresh
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> Tensor:
        epoch, position = divmod(step, self._images // self._size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._drawn(epoch))
        return self._epoch[1][position]

    def _drawn(self, epoch: int) -> Tensor:
        whole = self._images // self._size * self._size
        drawn = torch.randperm(self._images, generator=_generator(self._seed, _ORDER, epoch if self._fresh else 0))
        batches = drawn[:whole].view(-1, self._size)
        if self._fresh or epoch == 0:
            return batches
        return batches[torch.randperm(len(batches), generator=_generator(self._seed, _ORDER, epoch))]


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Gradient descent with momentum; convolutions and linear layers have the L2 weight, the other parameters none."""
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": recipe.l2_weight}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=MOMENTUM, foreach=True)


def _seed(*numbers: int) -> int:
    """A seed for one purpose: no two lists of numbers share a stream."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(_seed(*numbers))
