"""The functions that can follow the normalization in the same kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.errors import ArgumentError, expected


@dataclass(frozen=True)
class Activation:
    """A function applied to each value after scale, shift and residual.

    ``negative_slope`` is the factor of ``leaky_relu`` below zero, and 0 or 1 for the two functions that
    are special cases of it; the smooth functions do not use it.
    """

    name: str
    negative_slope: float = 0.0

    @property
    def is_piecewise_linear(self) -> bool:
        """Identity, ReLU or leaky ReLU: the derivative is known from a sign alone."""
        return self.name in ("identity", "relu", "leaky_relu")

    @property
    def sign_survives(self) -> bool:
        """Whether the output has the sign that the derivative asks for, so that the input need not be kept."""
        return self.name in ("relu", "leaky_relu") and self.negative_slope >= 0

    def __call__(self, z: Tensor) -> Tensor:
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope)
        return _FORWARD[self.name](z)

    def backward(self, dy: Tensor, z: Tensor) -> Tensor:
        """dy · act'(z). For relu and leaky_relu only the sign of ``z`` is looked at."""
        if self.name == "identity":
            return dy
        # As torch's: the derivative at 0 is the one of the negative side. A NaN passes dy on in relu, and is on the
        # negative side in leaky_relu.
        if self.name == "relu":
            return torch.where(z <= 0, torch.zeros_like(dy), dy)
        if self.name == "leaky_relu":
            return torch.where(z > 0, dy, dy * self.negative_slope)
        return dy * _DERIVATIVE[self.name](z)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_derivative,
    "gelu": _gelu_derivative,
    "sigmoid": _sigmoid_derivative,
    "tanh": lambda z: 1 - torch.tanh(z).square(),
}

IDENTITY = Activation("identity", 1.0)
RELU = Activation("relu", 0.0)
_FIXED = {None: IDENTITY, "relu": RELU} | {n: Activation(n) for n in ("silu", "gelu", "sigmoid", "tanh")}
NAMES = (None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")


def activation(name: str | None, negative_slope: float = 0.01) -> Activation:
    """The activation of that name; None is the identity.

    Raises:
        ArgumentError: the name is none of those known
    """
    if name in _FIXED:
        return _FIXED[name]
    if name == "leaky_relu":
        return Activation("leaky_relu", float(negative_slope))
    todo = "Apply any other function to the result."
    raise ArgumentError(expected("activation", f"one of {NAMES}", repr(name), todo))
