"""What stands in a folded model where a batch norm stood."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.lifecycle.folding.affine import Affine


class ScaleShift(nn.Module):
    """y = scale · x + shift for each channel (dimension 1): what is left of a batch norm that no neighbour can take.

    Arguments:
        scale, shift: shape (channels,), kept in float32 or wider. The result has the input's dtype.

    >>> layer = ScaleShift(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    >>> layer(torch.ones(1, 2))
    tensor([[2., 4.]], grad_fn=<AddcmulBackward0>)
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, input: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (input.dim() - 2)
        return torch.addcmul(self.shift.view(shape), input, self.scale.view(shape)).to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.scale.numel())


class ResidualActivation(nn.Module):
    """y = activation(before(x) + residual): a layer of this library that was given a residual, without its norm.

    >>> layer = ResidualActivation(nn.Identity(), nn.ReLU())
    >>> layer(torch.tensor([1.0, -3.0]), residual=torch.tensor([1.0, 1.0]))
    tensor([2., 0.])
    """

    def __init__(self, before: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.activation = activation

    def forward(self, input: Tensor, *, residual: Tensor) -> Tensor:
        y: Tensor = self.activation(self.before(input) + residual)
        return y


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation_module(name: str | None, negative_slope: float) -> nn.Module:
    """torch.nn's module for one of our fused activations.

    >>> activation_module("leaky_relu", 0.2)
    LeakyReLU(negative_slope=0.2)
    """
    if name is None:
        return nn.Identity()
    return nn.LeakyReLU(negative_slope) if name == "leaky_relu" else _ACTIVATIONS[name]()


def scale_shift(affine: Affine, like: nn.Module) -> ScaleShift:
    """In the dtype of the statistics of the norm ``like``, but no less than float32, frozen where it is."""
    mean = like.running_mean
    assert isinstance(mean, Tensor)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    module = ScaleShift(affine.scale.to(mean.device, dtype), affine.shift.to(mean.device, dtype))
    weight = getattr(like, "weight", None)
    return module.requires_grad_(weight is None or bool(weight.requires_grad))
