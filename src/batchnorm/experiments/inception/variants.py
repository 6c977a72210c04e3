"""The networks of section 4.2.2 and the changes of section 4.2.1, as one table of settings.

Every row has the sentence of the paper (arXiv 1502.03167) that it comes from. Where a small network on small images
needs another value than the paper's, ``small`` gives it and ``why`` says why. "small" is the default scale, "paper" the
one for ImageNet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from batchnorm.experiments.inception.network import Nonlinearity

Scale = Literal["small", "paper"]
Value = TypeVar("Value", float, bool)

MOMENTUM = 0.9
"""Of the gradient descent: the weight of the old step. The paper gives none; GoogLeNet, its model, has 0.9."""


@dataclass(frozen=True)
class Base:
    """The plain network's training.

    Attributes:
        learning_rate: at the first step.
        decay: the factor F by which the rate falls over all steps; it is rate · F^(-step / steps).
        l2_weight: weight of half the sum of all squared weights in the loss.
        crops: train on random crops and reflections of the images.
    """

    learning_rate: float
    decay: float
    l2_weight: float
    crops: bool


# The small rate and decay are the best of the sweep in docs/inception.md. The paper gives its rate alone: the decay is
# GoogLeNet's, 4 % every 8 epochs, over the paper's 31 million steps, and the L2 weight is the one that later Inception
# networks were published with.
BASES: dict[Scale, Base] = {
    "small": Base(learning_rate=0.02, decay=30.0, l2_weight=1e-4, crops=False),
    "paper": Base(learning_rate=0.0015, decay=50.0, l2_weight=4e-5, crops=True),
}


@dataclass(frozen=True)
class Pair(Generic[Value]):
    """A setting of the plain network, and what section 4.2.1 changes it to."""

    plain: Value
    changed: Value


@dataclass(frozen=True)
class Change(Generic[Value]):
    """One change of section 4.2.1.

    Attributes:
        sentence: the paper's.
        paper: values of the paper; where it gives none, ``why`` says so.
        small: values of the small scale; None where they are the paper's.
        why: the small scale has other values, or where a value comes from that the paper does not give.
    """

    sentence: str
    paper: Pair[Value]
    small: Pair[Value] | None = None
    why: str = ""

    def at(self, scale: Scale, *, changed: bool) -> Value:
        pair = self.small if scale == "small" and self.small is not None else self.paper
        return pair.changed if changed else pair.plain


DROPOUT = Change(
    "Batch Normalization fulfills some of the same goals as Dropout. Removing Dropout from Modified BN-Inception "
    "speeds up training, without increasing overfitting.",
    paper=Pair(0.4, 0.0),
    small=Pair(0.0, 0.0),
    why="With some two epochs of training nothing overfits, and dropout lowers the plain network's accuracy.",
)
L2_FACTOR = Change(
    "While in Inception an L2 loss on the model parameters controls overfitting, in Modified BN-Inception the weight "
    "of this loss is reduced by a factor of 5.",
    paper=Pair(1.0, 1 / 5),
)
DECAY_SPEED = Change(
    "Because our network trains faster than Inception, we lower the learning rate 6 times faster.",
    paper=Pair(1.0, 6.0),
    small=Pair(1.0, 1.0),
    why="The paper's normalized networks stop long before the plain one. Here all take the same number of steps, and a "
    "rate that falls 6 times faster would be next to nothing for most of them.",
)
LOCAL_RESPONSE = Change(
    "While Inception and other networks benefit from it, we found that with Batch Normalization it is not necessary.",
    paper=Pair(True, False),
    small=Pair(False, False),
    why="It normalizes over 5 neighbouring channels; at width 1/8 the first layer has 8 in all.",
)
FRESH_BATCHES = Change(
    "We enabled within-shard shuffling of the training data, which prevents the same examples from always appearing in "
    "a mini-batch together.",
    paper=Pair(False, True),
)
DISTORTION = Change(
    "Because batch-normalized networks train faster and observe each training example fewer times, we let the trainer "
    'focus on more "real" images by distorting them less.',
    paper=Pair(0.4, 0.2),
    small=Pair(0.0, 0.0),
    why="The paper does not give its strengths; 0.4 and 0.2 are ours. In some two epochs no image is seen often.",
)

# By the setting's name, for reports.
CHANGES: dict[str, Change[float] | Change[bool]] = {
    "dropout": DROPOUT,
    "l2_factor": L2_FACTOR,
    "decay_speed": DECAY_SPEED,
    "local_response": LOCAL_RESPONSE,
    "fresh_batches": FRESH_BATCHES,
    "distortion": DISTORTION,
}


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared.

    Attributes:
        key: its name in files and options.
        name: the paper's.
        sentence: the paper's, section 4.2.2.
        normalize: with batch normalization before each nonlinearity.
        rate: factor of the plain network's learning rate.
        nonlinearity: of the whole network.
        changed: with the changes of section 4.2.1.
    """

    key: str
    name: str
    sentence: str
    normalize: bool
    rate: float = 1.0
    nonlinearity: Nonlinearity = "relu"
    changed: bool = False


PLAIN = Variant(
    "inception",
    "Inception",
    "Inception: the network described at the beginning of Section 4.2, trained with the initial learning rate of "
    "0.0015.",
    normalize=False,
)
BASELINE = Variant(
    "bn-baseline",
    "BN-Baseline",
    "BN-Baseline: Same as Inception with Batch Normalization before each nonlinearity.",
    normalize=True,
)
X5 = Variant(
    "bn-x5",
    "BN-x5",
    "BN-x5: Inception with Batch Normalization and the modifications in Sec. 4.2.1. The initial learning rate was "
    "increased by a factor of 5, to 0.0075.",
    normalize=True,
    rate=5.0,
    changed=True,
)
X30 = replace(
    X5,
    key="bn-x30",
    name="BN-x30",
    sentence="BN-x30: Like BN-x5, but with the initial learning rate 0.045 (30 times that of Inception).",
    rate=30.0,
)
X5_SIGMOID = replace(
    X5,
    key="bn-x5-sigmoid",
    name="BN-x5-Sigmoid",
    sentence="BN-x5-Sigmoid: Like BN-x5, but with sigmoid nonlinearity g(t) = 1/(1+exp(-t)) instead of ReLU.",
    nonlinearity="sigmoid",
)
PLAIN_SIGMOID = replace(
    PLAIN,
    key="inception-sigmoid",
    name="Inception-Sigmoid",
    sentence="We also attempted to train the original Inception with sigmoid, but the model remained at the accuracy "
    "equivalent to chance.",
    nonlinearity="sigmoid",
)

VARIANTS = (PLAIN, BASELINE, X5, X30, X5_SIGMOID, PLAIN_SIGMOID)
BY_KEY = {variant.key: variant for variant in VARIANTS}


@dataclass(frozen=True)
class Recipe:
    """All settings of one network, resolved.

    Attributes:
        normalize, nonlinearity, dropout, local_response: of the network, see ``Inception``.
        learning_rate: at the first step.
        decay: the factor by which the rate falls over all steps.
        l2_weight: weight of half the sum of the squared weights of convolutions and linear layer in the loss.
        fresh_batches: draw new mini-batches each epoch; otherwise the same images always stay together.
        distortion: strength s of the photometric distortions; brightness, contrast and saturation are multiplied by
            factors from 1 - s to 1 + s.
        crops: train on random crops and reflections.
    """

    normalize: bool
    nonlinearity: Nonlinearity
    learning_rate: float
    decay: float
    l2_weight: float
    dropout: float
    local_response: bool
    fresh_batches: bool
    distortion: float
    crops: bool

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of the step after ``step`` are done."""
        return self.learning_rate * math.pow(self.decay, -step / steps)


def recipe(variant: Variant, scale: Scale, base: Base) -> Recipe:
    """The settings of ``variant`` when the plain network is trained as ``base`` says.

    >>> recipe(X5, "paper", BASES["paper"]).learning_rate
    0.0075
    >>> recipe(PLAIN, "paper", BASES["paper"]).dropout, recipe(PLAIN, "small", BASES["small"]).dropout
    (0.4, 0.0)
    """
    changed = variant.changed
    return Recipe(
        normalize=variant.normalize,
        nonlinearity=variant.nonlinearity,
        learning_rate=base.learning_rate * variant.rate,
        decay=base.decay ** DECAY_SPEED.at(scale, changed=changed),
        l2_weight=base.l2_weight * L2_FACTOR.at(scale, changed=changed),
        dropout=DROPOUT.at(scale, changed=changed),
        local_response=LOCAL_RESPONSE.at(scale, changed=changed),
        fresh_batches=FRESH_BATCHES.at(scale, changed=changed),
        distortion=DISTORTION.at(scale, changed=changed),
        crops=base.crops,
    )
