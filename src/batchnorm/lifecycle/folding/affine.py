"""The algebra of folding: scale and shift a channel, and what they make of a projection. All of it in float64.

scale = weight / sqrt(running_var + eps),  shift = bias - running_mean * scale
after a projection:   scale * (W x + b) + shift      W' = scale W,  b' = scale b + shift
before a projection:  W (scale * x + shift) + b      W' = W scale,  b' = b + W shift
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchnorm.nn import BatchNormLinear


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ scale · x + shift, each of shape (channels,), float64."""

    scale: Tensor
    shift: Tensor

    def then(self, after: Affine) -> Affine:
        """``after`` applied to what this one gives.

        >>> one, two = (Affine(torch.tensor([s]), torch.tensor([t])) for s, t in [(2.0, 1.0), (3.0, 4.0)])
        >>> one.then(two).scale, one.then(two).shift
        (tensor([6.]), tensor([7.]))
        """
        return Affine(self.scale * after.scale, self.shift * after.scale + after.shift)

    def at(self, channels: Tensor) -> Affine:
        """For each place in ``channels`` what this one does to the channel named there."""
        return Affine(self.scale[channels], self.shift[channels])

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())


@torch.no_grad()
def affine_of(norm: nn.Module) -> Affine:
    """What a batch norm with population statistics does, of any class that names its tensors as torch.nn does."""
    mean, var, weight, bias = (tensor_of(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None and var is not None
    eps: Any = getattr(norm, "eps", 1e-5)
    scale = torch.rsqrt(var + float(eps))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """That parameter or buffer in float64, or None where it is not there or not a tensor."""
    tensor = getattr(module, name, None)
    return tensor.detach().double() if isinstance(tensor, Tensor) else None


@dataclass(frozen=True, eq=False)
class Projection:
    """Weight and bias of a convolution, ``Linear`` or ``Bilinear``, float64.

    Arguments:
        weight: (out, in / groups, ...) or, ``transposed``, (in, out / groups, ...)
        bias: (out,)
    """

    weight: Tensor
    bias: Tensor
    groups: int = 1
    transposed: bool = False

    def before(self, affine: Affine) -> Projection:
        """The one projection that does what this one and then ``affine`` do."""
        return replace(self, weight=self.weight * self._by_output(affine.scale),
                       bias=self.bias * affine.scale + affine.shift)  # fmt: skip

    def after(self, affine: Affine) -> Projection:
        """The one projection that does what ``affine`` and then this one do.

        A shift comes out as a bias where every output position sees every input channel with the same sum of
        weights. Zero padding and the gaps of a transposed convolution break that: the caller sees to it.
        """
        shifted = (self.weight * self._by_input(affine.shift)).flatten(2 if self.transposed else 1)
        if self.transposed:
            sums = shifted.sum(2).unflatten(0, (self.groups, -1)).sum(1).flatten()
        else:
            sums = shifted.sum(1)
        return replace(self, weight=self.weight * self._by_input(affine.scale), bias=self.bias + sums)

    def _by_output(self, values: Tensor) -> Tensor:
        """``values`` of the output channels, so that they broadcast to the weight."""
        if not self.transposed:
            return values.view(-1, *[1] * (self.weight.dim() - 1))
        return self._by_second(values)

    def _by_input(self, values: Tensor) -> Tensor:
        if self.transposed:
            return values.view(-1, *[1] * (self.weight.dim() - 1))
        return self._by_second(values)

    def _by_second(self, values: Tensor) -> Tensor:
        """``values`` of the channels that the weight's second dimension counts within each group."""
        first, second = self.weight.shape[:2]
        rows = values.view(self.groups, second).repeat_interleave(first // self.groups, 0)
        return rows.view(first, second, *[1] * (self.weight.dim() - 2))


@torch.no_grad()
def projection_of(layer: nn.Module) -> Projection:
    """A convolution's, a ``Linear``'s or a ``Bilinear``'s; of a ``BatchNormLinear`` with its norm in it."""
    if isinstance(layer, BatchNormLinear):
        return projection_of(layer.linear).after(affine_of(layer.norm))
    weight, bias = tensor_of(layer, "weight"), tensor_of(layer, "bias")
    assert weight is not None
    outputs, groups = weight.shape[0], 1
    if isinstance(layer, _ConvNd):
        outputs, groups = layer.out_channels, layer.groups
    bias = weight.new_zeros(outputs) if bias is None else bias
    return Projection(weight, bias, groups, isinstance(layer, _ConvTransposeNd))
