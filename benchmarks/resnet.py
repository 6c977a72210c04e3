"""A training step of ResNet-50, and how much of it is batch normalization.

The share of batch normalization is the time that goes when its layers are taken out: 1 − (step without) / (step
with), both timed in the same round, additions and ReLUs left in. Timers around the layers would not do: with ReLU and
residual fused there is no layer that does the normalization alone, and what a layer leaves in or pushes out of the
cache shows in its neighbours' time. So the fused layers are charged with what the whole step costs more than a
network without normalization, and credited with the ReLUs and additions that they save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.bench.measure import Plan, Samples, interleave
from batchnorm.bench.peers import Block
from batchnorm.bench.results import ResNet, Step
from batchnorm.bench.run import threads as with_threads
from batchnorm.errors import BatchNormError

BATCH = 16
SIZE = 112

WITHOUT = "without"
VARIANTS = ("torch", "ours", "fused", WITHOUT)
STEPS = Plan(least=0.0, rounds=12, enough=5, budget=20.0)

# Stages of the network: inner channels, blocks, stride of the first. He et al. 2015, table 1; the stride lies on the
# 3×3 convolution, as in torchvision.
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EXPANSION = 4


class Fused(nn.Module):
    """Our layer with all that follows it in one kernel."""

    def __init__(self, channels: int, extra: str) -> None:
        super().__init__()
        self.norm = bn.BatchNorm2d(channels, activation=None if extra == "plain" else "relu")

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.norm(x, residual=residual)  # type: ignore[no-any-return]


def normalization(variant: str, channels: int, extra: str) -> nn.Module:
    """Batch normalization, the sum with a residual and ReLU, as far as ``extra`` asks for them."""
    if variant == "fused":
        return Fused(channels, extra)
    layers: dict[str, Callable[[int], nn.Module]] = {
        "torch": nn.BatchNorm2d,
        "ours": bn.BatchNorm2d,
        WITHOUT: nn.Identity,
    }
    return Block(layers[variant](channels), extra)


class Bottleneck(nn.Module):
    def __init__(self, variant: str, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = inner * _EXPANSION
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = normalization(variant, inner, "relu")
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = normalization(variant, inner, "relu")
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.norm3 = normalization(variant, out, "residual+relu")
        self.project: nn.Conv2d | None = None
        if stride != 1 or channels != out:
            self.project = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.norm0 = normalization(variant, out, "plain")

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.project is None else self.norm0(self.project(x), None)
        y = self.norm1(self.conv1(x), None)
        y = self.norm2(self.conv2(y), None)
        return self.norm3(self.conv3(y), residual)  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """53 convolutions and as many normalizations.

    Arguments:
        variant: one of ``VARIANTS``
        classes: outputs of the last layer
    """

    def __init__(self, variant: str, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = normalization(variant, 64, "relu")
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        channels = 64
        for inner, count, stride in _STAGES:
            for place in range(count):
                blocks.append(Bottleneck(variant, channels, inner, stride if place == 0 else 1))
                channels = inner * _EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.pool(self.norm(self.stem(x), None)))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def measure(
    *, layout: str = "contiguous", threads: int = 1, batch: int = BATCH, size: int = SIZE, plan: Plan = STEPS
) -> ResNet:
    """The share of batch normalization with torch's layers, with ours, and with ours fused.

    Raises:
        BatchNormError: the three networks do not have the same loss at the first step
    """
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, (batch,), generator=generator)
    with with_threads(threads):
        steps = {variant: _training_step(variant, images, labels, memory_format) for variant in VARIANTS}
        losses = {variant: step() for variant, step in steps.items()}
        for variant in ("ours", "fused"):
            if not math.isclose(losses[variant], losses["torch"], rel_tol=1e-3):
                raise BatchNormError(
                    f"bench: ResNet-50's loss is {losses[variant]:.6g} with {variant}, {losses['torch']:.6g} with torch"
                )
        samples = interleave(steps, plan)
        stem = torch.empty(batch, 64, size // 2, size // 2).contiguous(memory_format=memory_format)
        backends = {"ours": bn.explain(stem).backend, "fused": bn.explain(stem, activation="relu").backend}
    return ResNet(
        batch=batch,
        size=size,
        dtype="float32",
        layout=layout,
        threads=threads,
        rounds=len(samples[WITHOUT].seconds),
        without=samples[WITHOUT].median,
        steps={
            variant: _step(samples[variant], samples[WITHOUT], backends.get(variant))
            for variant in VARIANTS
            if variant != WITHOUT
        },
    )


def _training_step(
    variant: str, images: Tensor, labels: Tensor, memory_format: torch.memory_format
) -> Callable[[], float]:
    """Forward, loss, backward and the optimizer's step; gives the loss.

    The learning rate is 0, which changes none of the work: a network without normalization would diverge, and
    arithmetic on what it then holds might take another time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet50(variant).to(memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _step(found: Samples, without: Samples, backend: str | None) -> Step:
    shares = Samples(tuple(1 - b / a for a, b in zip(found.seconds, without.seconds, strict=True)), 1)
    return Step(
        median=found.median,
        p10=found.quantile(0.1),
        p90=found.quantile(0.9),
        share=median(shares.seconds),
        share_p10=shares.quantile(0.1),
        share_p90=shares.quantile(0.9),
        backend=backend,
    )
