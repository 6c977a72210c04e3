"""The one autograd function.

Forward keeps x and two values a channel (mean and variance), however the result is activated; a residual
in front of ReLU adds the result itself, which the next layer keeps anyway. Inference with frozen
parameters keeps nothing of tensor size. ``contract.kept`` decides it.

Backward runs the kernel's. Where a graph is asked for (``create_graph=True``), where the gradient is no plain tensor,
or where a mode or transform looks on, the gradients are taken through ``composite.normalized`` instead, in operations
that autograd knows, so that any further order is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from batchnorm.autograd import phases
from batchnorm.kernels import composite
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import Kernel, Needs, Running, kept
from batchnorm.kernels.plain import is_plain
from batchnorm.kernels.seams import PLAIN, Seams
from batchnorm.moments import Moments

NEEDS = {asked: Needs(*asked) for asked in product((False, True), repeat=4)}
"""Made once: making a named tuple is slow beside a small kernel."""


@dataclass(slots=True)
class Call:
    """What a forward is given beside its differentiable tensors."""

    kernel: Kernel
    eps: float
    activation: Activation
    mask: Tensor | None = None
    population: tuple[Tensor, Tensor] | None = None  # mean and variance of inference; None: the batch's own
    running: Running | None = None  # updated by the forward
    seams: Seams = PLAIN
    stats: Tensor | None = None  # found by the forward in training: mean and biased variance, (2, channels)
    found: Moments | None = None  # the moments behind ``stats``, where a step came between statistics and use
    correction: tuple[Tensor, Tensor] | None = None  # r and d of the forward, constants
    bias: Tensor | None = None  # beside what autograd saves: backward does not look at its values, and they may change


class BatchNormFunction(torch.autograd.Function):
    """y = activation((x − mean)/√(var + eps)·weight + bias + residual)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        sample_weight: Tensor | None,
        call: Call,
    ) -> Tensor:
        activation, mask, kernel = call.activation, call.mask, call.kernel
        if call.seams is not PLAIN:
            y, stats, call.found, call.correction = phases.forward(
                kernel, x, weight, bias, call.eps, call.seams, residual=residual, activation=activation, mask=mask,
                sample_weight=sample_weight, running=call.running,
            )  # fmt: skip
            call.stats = stats
        elif call.population is None:
            y, stats = kernel.forward(
                x, weight, bias, call.eps, residual=residual, activation=activation, mask=mask,
                sample_weight=sample_weight, running=call.running,
            )  # fmt: skip
            call.stats = stats
        else:
            y = kernel.normalize(
                x, *call.population, call.eps, weight, bias, residual=residual, activation=activation, mask=mask
            )  # fmt: skip
            # Stacked, so copied: running statistics may move on before backward.
            stats = torch.stack(call.population)
        ctx.call = call
        keep_x, keep_bias, keep_residual, keep_y = kept(
            activation, training=call.population is None, needs=NEEDS[ctx.needs_input_grad[:4]],
            residual=residual is not None,
        )  # fmt: skip
        if not keep_bias:
            call.bias = bias
        if residual is None and sample_weight is None and mask is None and not keep_y:
            ctx.save_for_backward(x if keep_x else None, weight, bias if keep_bias else None, stats)
            return y
        ctx.save_for_backward(
            x if keep_x else None,
            weight,
            bias if keep_bias else None,
            stats,
            residual if keep_residual else None,
            sample_weight,
            y if keep_y else None,
            mask,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        needs_grad: tuple[bool, ...] = ctx.needs_input_grad
        call: Call = ctx.call
        if torch.is_grad_enabled() or needs_grad[4] or not is_plain(dy, *saved):
            return _through_graph(call, dy, saved, needs_grad)
        x, weight, bias, stats, residual, sample_weight, y, mask = saved
        if x is None:
            # Inference, frozen: the gradient looks at dy and at the sign of y, never at the values of x.
            x = dy
        if call.found is not None:
            phased = phases.backward(
                call.kernel, dy, x, stats, call.found.count, call.eps, weight, bias, reducer=call.seams.reducer,
                correction=call.correction, groups=call.seams.groups, residual=residual, y=y,
                activation=call.activation, mask=mask, sample_weight=sample_weight, needs=NEEDS[needs_grad[:4]],
            )  # fmt: skip
            return (*phased, None, None)
        grads = call.kernel.backward(
            dy, x, stats, call.eps, weight, bias, training=call.population is None, residual=residual, y=y,
            activation=call.activation, mask=mask, sample_weight=sample_weight, needs=NEEDS[needs_grad[:4]],
            groups=call.seams.groups,
        )  # fmt: skip
        return (*grads, None, None)


_apply: Any = super(torch.autograd.Function, BatchNormFunction).apply


def differentiated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_weight: Tensor | None,
    call: Call,
) -> Tensor:
    """``BatchNormFunction.apply``, for plain tensors outside of function transforms.

    Function.apply is a layer of Python around the call below that serves transforms: for small inputs it would cost
    as much as the kernel.
    """
    y: Tensor = _apply(x, weight, bias, residual, sample_weight, call)
    return y


def _saved(ctx: Any) -> tuple[Any, ...]:
    """x, weight, bias, stats, residual, sample_weight, y and mask as forward kept them."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    x, weight, bias, stats, *rest = saved
    return (x, weight, ctx.call.bias if bias is None else bias, stats, *(rest or (None, None, None, None)))


def _through_graph(
    call: Call, dy: Tensor, saved: tuple[Any, ...], needs_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients, in operations that autograd can differentiate again."""
    x, weight, bias, stats, residual, sample_weight, y, mask = saved
    population = None if call.population is None else (stats[0], stats[1])
    graph = torch.is_grad_enabled()
    needs = NEEDS[needs_grad[:4]]
    correction = call.correction
    with torch.enable_grad():
        if x is None:
            # Frozen inference: the gradient is linear in dy, whatever the values of x were.
            x = stats.new_zeros(dy.shape, dtype=dy.dtype).requires_grad_(needs.x)
        # Aliases: one tensor may be given twice (as x and as the residual), each place has its own gradient.
        x = x.view_as(x)
        weight, bias, residual, sample_weight = (
            None if t is None else t.view_as(t) for t in (weight, bias, residual, sample_weight)
        )
        linear = call.activation.is_piecewise_linear
        z, _ = composite.normalized(
            x, weight, bias, call.eps, population=population, residual=None if linear else residual,
            activation=IDENTITY if linear else call.activation, mask=mask, sample_weight=sample_weight,
            reducer=call.seams.reducer, correct=None if correction is None else lambda _: correction,
            groups=call.seams.groups,
        )  # fmt: skip
        dy = dy.to(z.dtype)
        if linear:
            # Between its kinks the activation's slope is a constant: only what stands before it needs a graph.
            dy = _before_activation(call.activation, dy, z.detach() if y is None else y, residual, mask)
        wanted = [
            (x, needs.x), (weight, needs.weight), (bias, needs.bias),
            (None if linear else residual, needs.residual), (sample_weight, needs_grad[4]),
        ]  # fmt: skip
        inputs = [t for t, needed in wanted if needed and t is not None]
        found = iter(torch.autograd.grad(z, inputs, dy, create_graph=graph, allow_unused=True) if inputs else ())
        grads = [next(found) if needed and t is not None else None for t, needed in wanted]
    if linear and needs.residual:
        grads[3] = dy.to(x.dtype)
    return (*grads, None)


def _before_activation(
    activation: Activation, dy: Tensor, z: Tensor, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """dy·activation'(z) of a piecewise linear function, 0 where absent; differentiable in dy."""
    if activation.name != "identity":
        z = z if residual is None else z + residual.detach()
        dy = dy * activation.backward(torch.ones_like(dy), z)
    if mask is not None:
        dy = torch.where(mask, dy, torch.zeros((), dtype=dy.dtype, device=dy.device))
    return dy
