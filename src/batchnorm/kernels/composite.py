"""Batch normalization in ordinary PyTorch operations, for tensors and callers that no kernel can serve.

Every PyTorch tool can trace these functions: they take no address, branch on no value, and write nothing but the
running statistics. Autograd, forward-mode differentiation, function transforms, dispatch modes and wrapper subclasses
handle them like any other operations, to any order of derivative.

``normalized`` is the formula, computed in float64 where the device supports it. ``standard`` is
``torch.nn.functional.batch_norm`` followed by the activation, for tools that must recognize batch normalization:
exporters and their runtimes, quantization, mkldnn tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import Groups, group_of_samples, sums_in_groups
from batchnorm.kernels.seams import Reducer
from batchnorm.moments import Moments, counted, statistics_dtype


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    population: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reducer: Reducer | None = None,
    correct: Callable[[Moments], tuple[Tensor, Tensor]] | None = None,
    groups: Groups | None = None,
) -> tuple[Tensor, Moments | None]:
    """y = activation((x − mean)/√(var + eps)·weight + bias + residual), and the batch's moments.

    ``population`` is the mean and variance of inference, which do not depend on x; then no moments are returned.
    Without it the batch's are used, and differentiated; ``reducer``, ``correct`` and ``groups`` are the seams of
    ``kernels.seams``. y is not rounded to x's dtype, so neither is the gradient that flows back through it; each result
    is rounded once.
    """
    wide = statistics_dtype(x.device)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    x = x.to(wide)
    residual = None if residual is None else residual.to(wide)
    if mask is not None:
        # First of all: an absent value must have the derivative 0, not NaN times 0.
        x = _present(x, mask)
        residual = None if residual is None else _present(residual, mask)
    found = None
    channelwise = _Channelwise(x, groups if population is None else None)
    spread = channelwise.spread
    if population is None:
        found = _moments(x, counted(mask, sample_weight), channelwise)
        found = found if reducer is None else reducer.moments(found)
        # Not ``found.variance()``: NaN of a channel without values would reach the gradients of the others' weight.
        mean, var = found.mean, found.m2 / _at_least_one(found.count)
    else:
        mean, var = population
    z = (x - spread(mean.to(wide))) * spread(torch.rsqrt(var.to(wide) + eps))
    if found is not None and correct is not None:
        r, d = correct(found.detach())
        z = z * spread(r.to(wide)) + spread(d.to(wide))
    if weight is not None:
        z = z * weight.to(wide).view(shape)
    if bias is not None:
        z = z + bias.to(wide).view(shape)
    if residual is not None:
        z = z + residual
    y = activation(z)
    return (y if mask is None else _present(y, mask)), found


def standard(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, the addition and the activation; mean and var follow in training."""
    if mean is not None and x.dtype.itemsize == 2 and mean.dtype != x.dtype:
        # With a 16-bit input PyTorch accepts parameters only in the dtype of the statistics.
        weight = None if weight is None else weight.to(mean.dtype)
        bias = None if bias is None else bias.to(mean.dtype)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()  # PyTorch's dx is silently wrong for a weight that was expanded
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return activation(y)


class _Channelwise:
    """Sums over a channel, and values of a channel spread over x; of the channels of each group where there are groups.

    Works on sample indices and so for a last group of any size.
    """

    def __init__(self, x: Tensor, groups: Groups | None) -> None:
        self._others = tuple(range(2, x.dim()))
        self._groups = groups
        self._group = None if groups is None else group_of_samples(x.shape[0], groups, x.device)

    def count(self, x: Tensor) -> Tensor:
        """How many values there are, as ``sum`` of ones would say."""
        # Not new_full, which refuses symbolic numbers.
        if self._groups is None:
            return x.new_ones(x.shape[1]) * (x.numel() / max(1, x.shape[1]))
        in_a_sample = x.numel() / max(1, x.shape[0] * x.shape[1])
        return sums_in_groups(x.new_ones(x.shape[:2]) * in_a_sample, self._groups)

    def sum(self, t: Tensor) -> Tensor:
        """Of a tensor of x's shape: (channels,) or (groups, channels)."""
        if self._groups is None:
            return t.sum((0, *self._others))
        return sums_in_groups(t.sum(self._others) if self._others else t, self._groups)

    def spread(self, t: Tensor) -> Tensor:
        """A tensor (channels,) or (groups, channels) so that it broadcasts to x."""
        rows = t.view(1, -1) if self._group is None else t[self._group]
        return rows.view(*rows.shape, *(1,) * len(self._others))


def _moments(x: Tensor, weight: Tensor | None, channelwise: _Channelwise) -> Moments:
    if weight is None:
        count = channelwise.count(x)
    else:
        weight = weight.to(x.dtype).expand(x.shape)
        count = channelwise.sum(weight)
    safe = _at_least_one(count)
    mean = channelwise.sum(_weighted(x, weight)) / safe
    # A second pass about the mean removes the rounding of the sum; a constant channel gets exactly its value.
    rest = channelwise.sum(_weighted(x - channelwise.spread(mean), weight)) / safe
    mean = mean + torch.where(torch.isfinite(rest), rest, torch.zeros_like(rest))
    squares = _weighted((x - channelwise.spread(mean)).square(), weight)
    return Moments(count, mean, channelwise.sum(squares))


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _at_least_one(count: Tensor) -> Tensor:
    """``count`` as a divisor: 1 where there are no values."""
    return torch.where(count > 0, count, torch.ones_like(count))


def _present(t: Tensor, mask: Tensor) -> Tensor:
    """``t`` where the mask is True, else 0."""
    return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))
