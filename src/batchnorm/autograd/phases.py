"""Forward and backward in two phases, with the seams of a training forward between statistics and use."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.activations import Activation
from batchnorm.kernels.contract import Groups, Kernel, Needs, Running
from batchnorm.kernels.seams import Reducer, Seams, corrected
from batchnorm.moments import Moments


def forward(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    seams: Seams,
    *,
    residual: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    running: Running | None,
) -> tuple[Tensor, Tensor, Moments | None, tuple[Tensor, Tensor] | None]:
    """y; mean and variance that it was normalized by, stacked; their moments, and the correction r and d, if any.

    Groups alone leave nothing to do between statistics and use: that is the fused kernel, which gives no moments and
    updates ``running`` itself.
    """
    groups = seams.groups
    if seams.is_fused:
        y, stats = kernel.forward(
            x, weight, bias, eps, residual=residual, activation=activation, mask=mask, sample_weight=sample_weight,
            running=running, groups=groups,
        )  # fmt: skip
        return y, stats, None, None
    batch = kernel.moments(x, mask=mask, sample_weight=sample_weight, groups=groups)
    if seams.reducer is not None:
        batch = seams.reducer.moments(batch)
    correction = None if seams.correct is None else seams.correct(batch)
    weight, bias = corrected(weight, bias, correction, x.dtype)
    stats = torch.stack((batch.mean, batch.variance()))
    y = kernel.normalize(
        x, stats[0], stats[1], eps, weight, bias, residual=residual, activation=activation, mask=mask, groups=groups
    )  # fmt: skip
    return y, stats, batch, correction


def backward(
    kernel: Kernel,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    count: Tensor | float,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    reducer: Reducer | None,
    correction: tuple[Tensor, Tensor] | None,
    groups: Groups | None,
    residual: Tensor | None,
    y: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and the residual's gradient, None for each that is not needed.

    dweight and dbias are those of the local part: the sums that the reducer exchanges for dx are made of them, so
    they cost no exchange of their own.
    """
    mean, var = stats
    scale, offset = corrected(weight, bias, correction, x.dtype)
    local = kernel.backward_sums(
        dy, x, mean, var, eps, scale, offset, residual=residual, y=y, activation=activation, mask=mask, groups=groups
    )  # fmt: skip
    dbias, dweight = local
    if correction is not None:
        r, d = correction
        dweight = r * dweight + d * dbias
    if groups is not None:
        dbias, dweight = dbias.sum(0), dweight.sum(0)
    dx = dresidual = None
    passed_on = needs.residual and activation.name == "identity" and mask is None
    asked = Needs(needs.x, False, False, needs.residual and not passed_on)
    if needs.x and reducer is not None:
        total = reducer.sums(torch.stack(local))
        local = (total[0], total[1])
    if asked.x or asked.residual:
        dx, dresidual = kernel.backward_input(
            dy, x, mean, var, eps, scale, offset, local, count, residual=residual, y=y, activation=activation,
            mask=mask, sample_weight=sample_weight, needs=asked, groups=groups,
        )  # fmt: skip
    return (
        dx,
        dweight.to(weight.dtype) if needs.weight and weight is not None else None,
        dbias.to(bias.dtype) if needs.bias and bias is not None else None,
        dy if passed_on else dresidual,
    )
