r"""The Inception network of the paper's section 4.2 (table in its appendix), at any width and input size.

A module sends its input through up to four branches and joins their outputs along the channels:

====================  ==========================================
branch                convolutions
====================  ==========================================
1×1                   1×1
3×3                   1×1 (reduce), 3×3
double 3×3            1×1 (reduce), 3×3, 3×3
pool                  3×3 average or max pooling, then 1×1
====================  ==========================================

The modules of stride 2 (3c and 4e) have no 1×1 branch, and pass the pooled input on as it is; their last 3×3
convolutions and their pooling have the stride. Every convolution is followed by the nonlinearity: g(Wu + b), or
g(BN(Wu)) with batch normalization, where the mean would cancel b (section 3.2).

At 224×224 pixels and width 1 it is the paper's network. A width multiplies every number of channels. The stem divides
the paper's 224 pixels by 8, in three layers of stride 2. For smaller images the first of these layers lose their
stride, so that the first module gets 7 pixels or more. A first convolution without stride is 3×3 instead of 7×7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import BatchNorm2d

Nonlinearity = Literal["relu", "sigmoid"]
Pool = Literal["average", "max"]

EPS = 1e-3
"""Added to the variance by every batch normalization of the network."""

_FEWEST_PIXELS = 7  # for the first module


@dataclass(frozen=True)
class Module:
    """A row of the paper's table: numbers of output channels at width 1.

    Attributes:
        name: in the paper.
        one: of the 1×1 branch; None for stride 2, where there is none.
        three: of the reduction and of the 3×3 convolution.
        double: of the reduction and of each of the two 3×3 convolutions.
        pool: the kind of pooling.
        projection: of the 1×1 convolution after the pooling; None for stride 2, where there is none.
    """

    name: str
    one: int | None
    three: tuple[int, int]
    double: tuple[int, int]
    pool: Pool
    projection: int | None

    @property
    def stride(self) -> int:
        return 1 if self.projection is not None else 2


STEM = (64, 64, 192)
"""Output channels of the 7×7, the 1×1 and the 3×3 convolution before the modules."""

MODULES = (
    Module("3a", 64, (64, 64), (64, 96), "average", 32),
    Module("3b", 64, (64, 96), (64, 96), "average", 64),
    Module("3c", None, (128, 160), (64, 96), "max", None),
    Module("4a", 224, (64, 96), (96, 128), "average", 128),
    Module("4b", 192, (96, 128), (96, 128), "average", 128),
    Module("4c", 160, (128, 160), (128, 160), "average", 96),
    Module("4d", 96, (128, 192), (160, 192), "average", 96),
    Module("4e", None, (128, 192), (192, 256), "max", None),
    Module("5a", 352, (192, 320), (160, 224), "average", 128),
    Module("5b", 352, (192, 320), (192, 224), "max", 128),
)


class Inception(nn.Module):
    """The network, from images of shape (N, channels, height, width) to class scores of shape (N, classes).

    Weights are drawn from a Gaussian of variance 2 / inputs (He initialization), those of the linear layer of variance
    1 / inputs, all from ``generator``. Networks of one ``generator`` state start from the same weights with and without
    batch normalization. Biases start at 0.

    Arguments:
        classes: number of outputs
        channels: of an image, 1 or 3
        size: pixels of the shorter side of an image, which decides the strides of the stem
        width: factor of every number of channels; the results are rounded, and at least 1
        normalize: with batch normalization before each nonlinearity
        nonlinearity: "relu" or "sigmoid"
        dropout: probability with which an input of the linear layer is set to 0 in training
        local_response: local response normalization after the first pooling and before the second
        generator: where the weights are drawn from

    >>> network = Inception(classes=10, channels=1, size=28, width=1 / 8, generator=torch.Generator().manual_seed(0))
    >>> network(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        size: int,
        width: float = 1.0,
        normalize: bool = True,
        nonlinearity: Nonlinearity = "relu",
        dropout: float = 0.0,
        local_response: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        make = _Maker(width, normalize, nonlinearity)
        first, second, third = stem_strides(size)
        stem = [make.scaled(outputs) for outputs in STEM]
        self.features = nn.Sequential()
        add = self.features.add_module
        add("conv1", make.unit(channels, stem[0], 7 if first == 2 else 3, first))
        add("pool1", _pooling("max", second))
        if local_response:
            add("norm1", _LocalResponse())
        add("conv2_reduce", make.unit(stem[0], stem[1], 1))
        add("conv2", make.unit(stem[1], stem[2], 3))
        if local_response:
            add("norm2", _LocalResponse())
        add("pool2", _pooling("max", third))
        outputs = stem[2]
        for row in MODULES:
            block = _Block(outputs, row, make)
            add(f"module_{row.name}", block)
            outputs = block.out_channels
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(outputs, classes)
        _initialize(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.dropout(self.features(images).mean(dim=(2, 3))))
        return scores


def stem_strides(size: int) -> tuple[int, int, int]:
    """Strides of the 7×7 convolution and of the two poolings of the stem, for an image of ``size`` pixels.

    >>> stem_strides(224), stem_strides(28), stem_strides(16), stem_strides(8)
    ((2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 1, 1))
    """
    third, second, first = (2 if size >= _FEWEST_PIXELS * 2**halvings else 1 for halvings in (1, 2, 3))
    return first, second, third


def parameter_count(network: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())


class Dropout(nn.Module):
    """Dropout whose draws come from ``generator``, so that a step depends on nothing that was drawn before it."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * torch.empty_like(x).bernoulli_(kept, generator=self.generator).div_(kept)

    def extra_repr(self) -> str:
        return f"p={self.probability}"


class _LocalResponse(nn.Module):
    """Local response normalization with the constants of Krizhevsky et al. 2012, which Inception took over."""

    def forward(self, x: Tensor) -> Tensor:
        return F.local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=1.0)


@dataclass(frozen=True)
class _Maker:
    """Convolutions with their nonlinearity, all of one kind."""

    width: float
    normalize: bool
    nonlinearity: Nonlinearity

    def scaled(self, channels: int) -> int:
        return max(1, round(channels * self.width))

    def unit(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """A convolution and what follows it; ``outputs`` is the number of channels at this width."""
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not self.normalize)
        if self.normalize:
            if self.nonlinearity == "relu":
                return nn.Sequential(convolution, BatchNorm2d(outputs, eps=EPS, activation="relu"))
            # No kernel fuses a sigmoid: as a layer of its own it leaves the fast one to the normalization.
            return nn.Sequential(convolution, BatchNorm2d(outputs, eps=EPS), nn.Sigmoid())
        return nn.Sequential(convolution, nn.ReLU(inplace=True) if self.nonlinearity == "relu" else nn.Sigmoid())


class _Block(nn.Module):
    """One inception module."""

    def __init__(self, inputs: int, row: Module, make: _Maker) -> None:
        super().__init__()
        three_reduce, three = (make.scaled(channels) for channels in row.three)
        double_reduce, double = (make.scaled(channels) for channels in row.double)
        self.branches = nn.ModuleList()
        self.out_channels = three + double
        if row.one is not None:
            self.branches.append(make.unit(inputs, make.scaled(row.one), 1))
            self.out_channels += make.scaled(row.one)
        self.branches.append(
            nn.Sequential(make.unit(inputs, three_reduce, 1), make.unit(three_reduce, three, 3, row.stride))
        )
        self.branches.append(
            nn.Sequential(
                make.unit(inputs, double_reduce, 1),
                make.unit(double_reduce, double, 3),
                make.unit(double, double, 3, row.stride),
            )
        )
        pool = nn.Sequential(_pooling(row.pool, row.stride))
        if row.projection is not None:
            pool.append(make.unit(inputs, make.scaled(row.projection), 1))
            self.out_channels += make.scaled(row.projection)
        else:
            self.out_channels += inputs
        self.branches.append(pool)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _pooling(kind: Pool, stride: int) -> nn.Module:
    if kind == "max":
        return nn.MaxPool2d(3, stride, padding=1)
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


@torch.no_grad()
def _initialize(network: nn.Module, generator: torch.Generator) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            inputs = layer.weight[0].numel()
            layer.weight.normal_(0, math.sqrt(2 / inputs), generator=generator)
        elif isinstance(layer, nn.Linear):
            layer.weight.normal_(0, math.sqrt(1 / layer.in_features), generator=generator)
        else:
            continue
        if layer.bias is not None:
            layer.bias.zero_()
