"""Frozen layers: ``FrozenBatchNorm2d``, whose class says so, and the state that ``freeze`` gives to any other layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.errors import ArgumentError
from batchnorm.kernels.activations import activation as activation_by_name

BUFFERS = ("weight", "bias", "running_mean", "running_var")


FROZEN = "_batchnorm_frozen"
"""The attribute of a layer that ``freeze`` has frozen. It is copied and pickled with the layer."""


@dataclass(frozen=True)
class Frozen:
    """What ``freeze`` has changed: which parameters required grad, None where it did not ask."""

    requires_grad: dict[str, bool] | None = None


class StaysInEval:
    """The ``train`` of a layer with frozen statistics: an attribute of its own, before that of its class.

    It remembers the requested mode, and the layer stays in eval mode. So ``layer.training`` always tells what the layer
    does, for any class, and no forward has to know about freezing.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mode = layer.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """As ``nn.Module.train``, for the layer's children too."""
        layer = self.layer
        type(layer).train(layer, mode)
        layer.training = False
        self.mode = mode
        return layer


def has_frozen_statistics(layer: nn.Module) -> bool:
    """Whether ``freeze`` keeps the layer in eval mode."""
    return isinstance(layer.__dict__.get("train"), StaysInEval)


class FrozenBatchNorm2d(nn.Module):
    r"""Batch normalization by fixed statistics, in training as in eval mode.

    .. math::
        y = f\Big(\frac{x - \text{running\_mean}}{\sqrt{\text{running\_var} + \epsilon}}\,\gamma + \beta + r\Big)

    with the state of ``torchvision.ops.FrozenBatchNorm2d`` and its namesakes in detectron2 and transformers: four
    buffers of shape (C,), no parameters and no counter. A counter in a state dict is ignored, as there.

    Arguments:
        num_features: channels C of an input of shape (N, C, H, W)
        eps: added to the variance, inside the root
        activation: f, with ``negative_slope``, as of ``BatchNorm2d``

    Shape:
        input and output (N, C, H, W); the result's dtype is that of input and buffers promoted, as torchvision's

    Raises:
        ArgumentError: an input that is not (N, C, H, W)

    >>> import torch
    >>> layer = FrozenBatchNorm2d(3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> torch.allclose(layer(x), x, atol=1e-4)
    True
    >>> list(layer.parameters())
    []
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self._activation = activation_by_name(activation, negative_slope)
        # A leaf for the tracers of torch.fx, as ``BatchNorm2d`` is.
        self.__module__ = "torch.nn"
        for name in BUFFERS:
            fill = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, fill(num_features, device=device, dtype=dtype))

    @property
    def activation(self) -> str | None:
        """The name of the function applied after the normalization; may be set."""
        return None if self._activation.name == "identity" else self._activation.name

    @activation.setter
    def activation(self, name: str | None) -> None:
        self._activation = activation_by_name(name, self.negative_slope)

    @property
    def negative_slope(self) -> float:
        """The slope of "leaky_relu" below zero; may be set."""
        return self._activation.negative_slope if self.activation == "leaky_relu" else 0.01

    @negative_slope.setter
    def negative_slope(self, slope: float) -> None:
        self._activation = activation_by_name(self.activation, slope)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``; ``residual``, which broadcasts to it, is added before the activation."""
        if input.dim() != 4:
            raise ArgumentError(f"expected 4D input (got {input.dim()}D input)")
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        mean, var, weight, bias = (t.to(dtype) for t in (self.running_mean, self.running_var, self.weight, self.bias))
        return functional.batch_norm(
            input.to(dtype), mean, var, weight, bias, False, eps=self.eps, residual=residual,
            activation=self.activation, negative_slope=self.negative_slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = f"{self.weight.shape[0]}, eps={self.eps}"
        return shown if self.activation is None else f"{shown}, activation={self.activation!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
