"""Section 4.1 of the paper: a small network of sigmoids, with and without batch normalization.

The network is the paper's: three fully connected hidden layers of 100 sigmoids, each y = g(Wu + b) with W drawn
from a Gaussian of small variance, then ten outputs with cross-entropy; mini-batches of 60, plain gradient descent.
The normalized twin has y = g(BN(Wu)): the bias goes, since the mean that is subtracted would cancel it (section
3.2), and β takes its place. Both start from the same weights and see the same mini-batches in the same order.

What is measured, and on what:

- Test accuracy, on the whole test set.
- The input to each sigmoid of the last hidden layer (Wu + b without normalization, BN(Wu) with), as its 15th, 50th
  and 85th percentile over the test set. For the normalized network the test set goes through in mini-batches of 60
  with their own statistics: it is the distribution that the sigmoid meets in training, where the paper's argument
  lies, and running averages that still lag behind in the first steps do not enter it.
- For the normalized network also the accuracy by the statistics used: those of the test mini-batches, running
  averages, and Algorithm 2 (``batchnorm.recalibrate``) with both estimators, over training mini-batches.

Evaluation works on a copy: it changes nothing in the network being trained.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm1d, recalibrate
from batchnorm.errors import ArgumentError, DataError, NonFiniteError, expected
from batchnorm.experiments.digits import CLASSES, Digits

BATCH_SIZE = 60
HIDDEN = (100, 100, 100)
PERCENTILES = (0.15, 0.50, 0.85)

# Bounds on the cost of one evaluation where the data are large; scikit-learn's digits stay below both.
_MOST_IMAGES_FOR_PERCENTILES = 10_000
_MOST_CALIBRATION_BATCHES = 200

_LARGEST_SEED = 2**32 - 1
# Longer than anyone waits; figures and files are designed for fewer.
_MOST_STEPS = 10**9
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        steps: training steps of each network; the paper's 50,000.
        learning_rate: of both networks.
        weight_std: standard deviation of the Gaussian from which all weights are drawn; biases start at 0.
        seed: of the first run; it fixes the weights and the order of the mini-batches.
        seeds: number of runs, with seeds ``seed``, ``seed + 1`` and so on.
        threads: of PyTorch. At this size a second one costs more than it gives.

    Raises:
        ArgumentError: a value with which nothing can be trained.
    """

    steps: int = 50_000
    learning_rate: float = 0.1
    weight_std: float = 0.1
    seed: int = 0
    seeds: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        processors = os.cpu_count() or 1
        _require(self.steps >= 1, "steps of at least 1", self.steps, "Take 50000, the paper's, or fewer.")
        _require(
            self.steps <= _MOST_STEPS, f"at most {_MOST_STEPS} steps", self.steps, "Take 50000, the paper's, or fewer."
        )
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "a learning rate above 0",
            self.learning_rate,
            "The default is 0.1.",
        )
        _require(
            math.isfinite(self.weight_std) and self.weight_std > 0,
            "a standard deviation of the weights above 0",
            self.weight_std,
            "The default is 0.1.",
        )
        _require(self.seeds >= 1, "at least 1 seed", self.seeds, "Each seed is one run of both networks.")
        _require(
            self.seeds <= _MOST_SEEDS,
            f"at most {_MOST_SEEDS} seeds",
            self.seeds,
            "Each seed is one run of both networks.",
        )
        _require(
            0 <= self.seed <= _LARGEST_SEED - self.seeds,
            f"a seed from 0 to {_LARGEST_SEED - self.seeds}",
            self.seed,
            "Any number in that range will do.",
        )
        _require(
            1 <= self.threads <= processors,
            f"threads from 1 to {processors}, the processors of this machine",
            self.threads,
            "One is fastest for a network of this size.",
        )


@dataclass(frozen=True)
class Point:
    """What is recorded at one step.

    Attributes:
        step: training steps done.
        plain_accuracy: test accuracy without normalization.
        batch_accuracy, running_accuracy, paper_accuracy, pooled_accuracy: test accuracy of the normalized network
            under statistics of the test mini-batches, running averages, and Algorithm 2 by either estimator.
        plain_percentiles, normalized_percentiles: 15th, 50th and 85th percentile of the input to each sigmoid of
            the last hidden layer, shape (3, sigmoids).
    """

    step: int
    plain_accuracy: float
    batch_accuracy: float
    running_accuracy: float
    paper_accuracy: float
    pooled_accuracy: float
    plain_percentiles: Tensor
    normalized_percentiles: Tensor


def recorded_steps(steps: int) -> list[int]:
    """The steps at which to record: close together at first, then every fiftieth of the run.

    The gap is a tenth of the step reached, at most a fiftieth of the whole. The first and last steps are included.

    >>> recorded_steps(20)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    >>> len(recorded_steps(50_000))
    129
    """
    widest = max(steps // 50, 1)
    recorded = [0]
    while recorded[-1] < steps:
        recorded.append(min(recorded[-1] + min(max(recorded[-1] // 10, 1), widest), steps))
    return recorded


def build_networks(
    pixels: int, *, weight_std: float, generator: torch.Generator
) -> tuple[nn.Sequential, nn.Sequential]:
    """The plain network and its normalized twin, with equal weights.

    Args:
        pixels: of one image.
        weight_std: standard deviation of the weights.
        generator: where the weights are drawn from.

    Returns:
        Two networks from (images, pixels) to (images, 10). In each the last but two module gives the input to the
        last layer of sigmoids.
    """
    plain: list[nn.Module] = []
    normalized: list[nn.Module] = []
    inputs = pixels
    for units in HIDDEN:
        weight = torch.empty(units, inputs, dtype=torch.float32).normal_(0, weight_std, generator=generator)
        plain += [_linear(weight, bias=True), nn.Sigmoid()]
        normalized += [_linear(weight, bias=False), BatchNorm1d(units, dtype=torch.float32), nn.Sigmoid()]
        inputs = units
    weight = torch.empty(CLASSES, inputs, dtype=torch.float32).normal_(0, weight_std, generator=generator)
    return (
        nn.Sequential(*plain, _linear(weight, bias=True)),
        nn.Sequential(*normalized, _linear(weight, bias=True)),
    )


def train(settings: Settings, digits: Digits, seed: int) -> Iterator[Point]:
    """Train both networks side by side and yield a ``Point`` at each of ``recorded_steps``.

    Deterministic for a seed and a number of threads; the caller's random state is neither read nor changed.

    Args:
        settings: ``seed``, ``seeds`` and ``threads`` in it are the caller's business.
        digits: at least one mini-batch of training images.
        seed: of this run.

    Raises:
        DataError: there are too few images.
    """
    if len(digits.train_images) < BATCH_SIZE or len(digits.test_images) < 2:
        raise DataError(
            expected(
                "train",
                f"at least {BATCH_SIZE} training images and 2 test images",
                f"{len(digits.train_images)} and {len(digits.test_images)}",
                "Take a larger set.",
            )
        )
    plain, normalized = build_networks(
        digits.pixels,
        weight_std=settings.weight_std,
        generator=torch.Generator().manual_seed(2 * seed),
    )
    # A second generator, so that the order of the mini-batches does not depend on how many weights were drawn.
    batches = _mini_batches(digits, torch.Generator().manual_seed(2 * seed + 1))
    evaluation = _Evaluation(digits)
    done = 0
    for until in recorded_steps(settings.steps):
        for _ in range(done, until):
            images, labels = next(batches)
            _descend(plain, images, labels, settings.learning_rate)
            _descend(normalized, images, labels, settings.learning_rate)
        done = until
        yield evaluation.point(done, plain, normalized)


def _mini_batches(digits: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Full mini-batches without end, in a new order each epoch. The few images left over are skipped in that epoch."""
    images, labels = digits.train_images, digits.train_labels
    whole = len(images) // BATCH_SIZE * BATCH_SIZE
    while True:
        for chosen in torch.randperm(len(images), generator=generator)[:whole].view(-1, BATCH_SIZE):
            yield images[chosen], labels[chosen]


@torch.enable_grad()
def _descend(network: nn.Sequential, images: Tensor, labels: Tensor, learning_rate: float) -> None:
    """One step of plain gradient descent, written out because importing torch.optim takes seconds."""
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(cross_entropy(network(images), labels), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=learning_rate)


class _Evaluation:
    """All measurements of one ``Point``, on images chosen once."""

    def __init__(self, digits: Digits) -> None:
        # A fixed shuffle: a test set sorted by class would make mini-batches of one class.
        order = torch.randperm(len(digits.test_images), generator=torch.Generator().manual_seed(0))
        self.images, self.labels = digits.test_images[order], digits.test_labels[order]
        self.test_batches = self.images.tensor_split(math.ceil(len(order) / BATCH_SIZE))
        whole = len(digits.train_images) // BATCH_SIZE
        self.calibration_batches = [
            digits.train_images[chosen]
            for chosen in torch.randperm(len(digits.train_images), generator=torch.Generator().manual_seed(0))[
                : min(whole, _MOST_CALIBRATION_BATCHES) * BATCH_SIZE
            ].view(-1, BATCH_SIZE)
        ]

    @torch.no_grad()
    def point(self, step: int, plain: nn.Sequential, normalized: nn.Sequential) -> Point:
        plain_inputs, plain_accuracy = self._measure(plain, [self.images])
        network = copy.deepcopy(normalized).eval()
        _, running_accuracy = self._measure(network, [self.images])
        paper_accuracy = self._accuracy_recalibrated(network, "paper")
        pooled_accuracy = self._accuracy_recalibrated(network, "pooled")
        batch_inputs, batch_accuracy = self._measure(network.train(), self.test_batches)
        return Point(
            step=step,
            plain_accuracy=plain_accuracy,
            batch_accuracy=batch_accuracy,
            running_accuracy=running_accuracy,
            paper_accuracy=paper_accuracy,
            pooled_accuracy=pooled_accuracy,
            plain_percentiles=_percentiles(plain_inputs),
            normalized_percentiles=_percentiles(batch_inputs),
        )

    def _accuracy_recalibrated(self, network: nn.Sequential, estimator: Literal["paper", "pooled"]) -> float:
        """The accuracy with population statistics, which stay in ``network``."""
        try:
            recalibrate(network, self.calibration_batches, estimator=estimator)
        except NonFiniteError:
            return 0.0  # training has diverged: there are no statistics, so no image counts as recognized
        return self._measure(network.eval(), [self.images])[1]

    def _measure(self, network: nn.Sequential, batches: Sequence[Tensor]) -> tuple[Tensor, float]:
        """The input to the last layer of sigmoids, shape (images, sigmoids), and the accuracy."""
        body, head = network[:-2], network[-2:]
        inputs = torch.cat([body(images) for images in batches])
        outputs = head(inputs)
        # argmax treats NaN as the largest. If training has diverged, no image counts as recognized.
        right = (outputs.argmax(dim=1) == self.labels) & outputs.isfinite().all(dim=1)
        return inputs, int(right.sum()) / len(right)


def _percentiles(inputs: Tensor) -> Tensor:
    """Percentiles over the images, shape (3, sigmoids)."""
    wanted = torch.tensor(PERCENTILES, dtype=inputs.dtype)
    return torch.quantile(inputs[:_MOST_IMAGES_FOR_PERCENTILES], wanted, dim=0)


def _linear(weight: Tensor, *, bias: bool) -> nn.Linear:
    """A linear layer with a copy of ``weight`` and a bias of zeros, made without drawing from the global generator."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=weight.dtype).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.zero_()
    return layer


def _require(holds: bool, invariant: str, got: object, todo: str) -> None:
    if not holds:
        raise ArgumentError(expected("Settings", invariant, got, todo))
