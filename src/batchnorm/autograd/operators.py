"""The operators that ``torch.compile``, ``torch.export`` and fake tensors see.

A compiler cannot look into a kernel, so it gets an operator with a schema, a function that tells the shapes
of its results, and a backward. None of them changes its arguments: running statistics are updated outside, in
operations that the compiler can order. In eager mode nothing of this is called.

Backward is an operator of its own without a derivative: differentiating it again raises.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels import eager, layout
from batchnorm.kernels.activations import Activation
from batchnorm.kernels.contract import Kernel, Needs, count_of, kept
from batchnorm.moments import statistics_dtype


@torch.library.custom_op("batchnorm::train", mutates_args=())
def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the batch's mean and biased variance, (2, channels), and whether the batch counts, a bool of shape ().

    It does not where a checkpoint runs a compiled forward again in backward, which only the running code can tell.
    """
    act = Activation(activation, negative_slope)
    kernel = _kernel(x, weight, bias, residual, activation=act, mask=mask, sample_weight=sample_weight)
    y, stats = kernel.forward(
        x, weight, bias, eps, residual=residual, activation=act, mask=mask, sample_weight=sample_weight
    )
    count = count_of(x, mask, sample_weight)
    if isinstance(count, Tensor):
        # The mask's values were not checked: a channel may have none, and its variance would be 0/0.
        stats = torch.where(count > 0, stats, 0.0)
    return y, stats, x.new_full((), torch._C._current_graph_task_id() == -1, dtype=torch.bool)


@train.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x.device))
    return layout.of(x).empty(x), stats, x.new_empty((), dtype=torch.bool)


@torch.library.custom_op("batchnorm::infer", mutates_args=())
def infer(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """y by the given mean and variance."""
    act = Activation(activation, negative_slope)
    kernel = _kernel(x, mean, var, weight, bias, residual, activation=act, mask=mask)
    return kernel.normalize(x, mean, var, eps, weight, bias, residual=residual, activation=act, mask=mask)


@infer.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return layout.of(x).empty(x)


@torch.library.custom_op("batchnorm::backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    training: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the residual's gradient; without elements where not needed."""
    act = Activation(activation, negative_slope)
    kernel = _kernel(
        x, dy, stats, weight, bias, residual, y, activation=act, mask=mask, sample_weight=sample_weight
    )  # fmt: skip
    grads = kernel.backward(
        dy, x, stats, eps, weight, bias, training=training, residual=residual, y=y, activation=act, mask=mask,
        sample_weight=sample_weight, needs=Needs(*needs),
    )  # fmt: skip
    dx, dweight, dbias, dresidual = (x.new_empty(0) if g is None else g for g in grads)
    if needs[3] and _is_dy(activation, mask):
        # An operator must not give back what it was given.
        dresidual = layout.of(x).empty(x).copy_(dresidual)
    return dx, dweight, dbias, dresidual


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    training: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen = layout.of(x)
    return (
        seen.empty(x) if needs[0] else x.new_empty(0),
        torch.empty_like(weight) if needs[1] and weight is not None else x.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else x.new_empty(0),
        seen.empty(x) if needs[3] else x.new_empty(0),
    )


def correction(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: Tensor,
    d_max: Tensor,
) -> tuple[Tensor, Tensor]:
    """r and d of batch renormalization (``nn.renorm``), from mean and biased variance; without a derivative."""
    wide = mean.dtype
    std = torch.sqrt(running_var.to(wide) + eps)
    r = torch.sqrt(var + eps) / std
    d = (mean - running_mean.to(wide)) / std
    return torch.minimum(torch.maximum(r, 1 / r_max), r_max), torch.minimum(torch.maximum(d, -d_max), d_max)


recorded_correction = torch.library.custom_op("batchnorm::correction", mutates_args=())(correction)
"""The same as one operator.

A compiler computes ordinary operations again in backward where that saves memory. There it would read running
statistics that forward has moved since.
"""


@recorded_correction.register_fake
def _(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _save_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, mask, sample_weight, *options = inputs
    y, stats, counts = output
    ctx.mark_non_differentiable(stats, counts)
    _save(ctx, x, weight, bias, residual, mask, sample_weight, y, stats, options, training=True)


def _differentiate_train(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    sample_weight = ctx.saved_tensors[-1]
    if sample_weight is not None and sample_weight.requires_grad:
        raise NotImplementedError("batchnorm::train: no gradient for sample_weight under a compiler. Detach it.")
    return (*_gradients(ctx, dy, training=True), None, None, None, None, None)


def _save_infer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, mask, *options = inputs
    # A copy: the running statistics may move on before backward.
    stats = torch.stack((mean, var))
    _save(ctx, x, weight, bias, residual, mask, None, output, stats, options, training=False)


def _differentiate_infer(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, training=False)
    return (dx, None, None, dweight, dbias, dresidual, None, None, None, None)


train.register_autograd(_differentiate_train, setup_context=_save_train)
infer.register_autograd(_differentiate_infer, setup_context=_save_infer)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    y: Tensor,
    stats: Tensor,
    options: list[Any],
    *,
    training: bool,
) -> None:
    activation = Activation(*options[1:])
    needs = Needs(x.requires_grad, _asks(weight), _asks(bias), _asks(residual))
    keep_x, _, keep_residual, keep_y = kept(
        activation, training=training, needs=needs, residual=residual is not None
    )  # fmt: skip
    ctx.save_for_backward(
        x if keep_x else None, weight, bias, residual if keep_residual else None, y if keep_y else None, stats, mask,
        sample_weight,
    )  # fmt: skip
    ctx.options = options
    ctx.needs = needs
    ctx.residual_is_dy = _is_dy(activation.name, mask)


def _asks(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _is_dy(activation: str, mask: Tensor | None) -> bool:
    """Whether the residual's gradient is dy as it stands."""
    return activation == "identity" and mask is None


def _gradients(ctx: Any, dy: Tensor, *, training: bool) -> list[Tensor | None]:
    """dx, dweight, dbias and the residual's gradient, each None where not needed."""
    x, weight, bias, residual, y, stats, mask, sample_weight = ctx.saved_tensors
    # Frozen: the gradient looks at dy and at the sign of y, never at the values of x.
    x = dy if x is None else x
    needs = list(ctx.needs)
    if ctx.residual_is_dy:
        needs[3] = False  # the operator would have to copy it
    found = backward(
        dy, x, stats, weight, bias, residual, y, mask, sample_weight, *ctx.options, training, needs
    )  # fmt: skip
    grads = [g if n else None for g, n in zip(found, needs, strict=True)]
    if ctx.needs[3] and ctx.residual_is_dy:
        grads[3] = dy
    return grads


def _kernel(x: Tensor, *beside: Tensor | None, **call: Any) -> Kernel:
    """The kernel of the call. ``eager`` is made of ordinary operations, and serves where no kernel may run."""
    return kernels.choose(x, *beside, **call) or cast(Kernel, eager)
