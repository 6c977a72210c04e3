"""Batch normalization in ordinary PyTorch operations, for tensors and callers that no kernel may serve.

Every tool of PyTorch can look into these functions: no address is taken, no branch depends on a value, nothing is
written but the running statistics. Autograd, forward-mode differentiation, function transforms, dispatch modes and
wrapper subclasses do with them what they do with any operations, to any order of derivative.

``normalized`` is the formula, computed in float64 where the device has it. ``standard`` is
``torch.nn.functional.batch_norm`` and the activation after it, for tools that have to recognize batch normalization
to be of use: exporters and their runtimes, quantization, mkldnn tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.activations import IDENTITY, Activation
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
) -> tuple[Tensor, Moments | None]:
    """y = activation((x − mean)/√(var + eps)·weight + bias + residual), and the batch's moments.

    ``population`` holds mean and variance that do not depend on x (inference; no moments then). Without it those of
    the batch are used and differentiated; ``reducer`` and ``correct`` are the seams of ``kernels.seams``. y is not
    rounded to x's dtype, so that neither is what flows back through it; each gradient is, once.
    """
    wide = statistics_dtype(x.device)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    x = x.to(wide)
    residual = None if residual is None else residual.to(wide)
    if mask is not None:
        # Before anything is computed from it: the derivative of what is absent must be 0, not NaN times 0.
        x = _present(x, mask)
        residual = None if residual is None else _present(residual, mask)
    found = None
    if population is None:
        found = _moments(x, counted(mask, sample_weight))
        found = found if reducer is None else reducer.moments(found)
        mean, var = found.mean, found.variance()
    else:
        mean, var = population
    z = (x - mean.to(wide).view(shape)) * torch.rsqrt(var.to(wide) + eps).view(shape)
    if found is not None and correct is not None:
        r, d = correct(found.detach())
        z = z * r.to(wide).view(shape) + d.to(wide).view(shape)
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
        # PyTorch takes parameters in the dtype of the statistics beside a 16-bit input, and in no other.
        weight = None if weight is None else weight.to(mean.dtype)
        bias = None if bias is None else bias.to(mean.dtype)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()  # PyTorch's dx is silently wrong for a weight that was expanded
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return activation(y)


def _moments(x: Tensor, weight: Tensor | None) -> Moments:
    others = [0, *range(2, x.dim())]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if weight is None:
        # Not new_full, which refuses symbolic numbers.
        count = x.new_ones(x.shape[1]) * (x.numel() / max(1, x.shape[1]))
        safe = count
    else:
        weight = weight.to(x.dtype).expand(x.shape)
        count = weight.sum(others)
        safe = torch.where(count > 0, count, torch.ones_like(count))
    mean = _weighted(x, weight).sum(others) / safe
    # Once more about itself: the sum's rounding goes, and a constant channel has exactly its value as the mean.
    rest = _weighted(x - mean.view(shape), weight).sum(others) / safe
    mean = mean + torch.where(torch.isfinite(rest), rest, torch.zeros_like(rest))
    return Moments(count, mean, _weighted((x - mean.view(shape)).square(), weight).sum(others))


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _present(t: Tensor, mask: Tensor) -> Tensor:
    """``t`` where the mask is True, else 0."""
    return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))
