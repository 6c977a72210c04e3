"""The one autograd function.

Forward keeps x and two values a channel (mean and variance), however the result is activated; a residual
in front of ReLU adds the result itself, which the next layer keeps anyway. Inference with frozen
parameters keeps nothing of tensor size.

Backward runs the kernel's. Where a graph is asked for (``create_graph=True``), the gradients are taken
through ``eager.differentiable`` instead, in operations that autograd knows, so that any further order is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import eager
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.eager import Needs, Running

NEEDS = {asked: Needs(*asked) for asked in product((False, True), repeat=4)}
"""Made once: making a named tuple is slow beside a small kernel."""


@dataclass(slots=True)
class Call:
    """What a forward is given beside its differentiable tensors."""

    kernel: ModuleType
    eps: float
    activation: Activation
    mask: Tensor | None = None
    population: tuple[Tensor, Tensor] | None = None  # mean and variance of inference; None: the batch's own
    batch: Tensor | None = None  # the batch's mean and biased variance, (2, channels), where already found
    running: Running | None = None  # updated by the forward that finds them


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
        y: Tensor
        if call.population is None and call.batch is None:
            y, stats = kernel.forward(
                x, weight, bias, call.eps, residual=residual, activation=activation, mask=mask,
                sample_weight=sample_weight, running=call.running,
            )  # fmt: skip
        else:
            given = call.population if call.population is not None else call.batch
            assert given is not None
            y = kernel.normalize(
                x, *given, call.eps, weight, bias, residual=residual, activation=activation, mask=mask
            )  # fmt: skip
            # Stacked, so copied: running statistics may move on before backward.
            stats = torch.stack(call.population) if call.population is not None else call.batch
        ctx.call = call
        needs_x = _needs_input(ctx, call)
        if residual is None and sample_weight is None and (needs_x or activation.name == "identity"):
            ctx.save_for_backward(x if needs_x else None, weight, bias, stats)  # the common cases
            return y
        sign_of_y = activation.sign_survives and (residual is not None or not needs_x)
        keep_x = needs_x or not (activation.name == "identity" or sign_of_y)
        keep_residual = residual is not None and activation.name != "identity" and not sign_of_y
        ctx.save_for_backward(
            x if keep_x else None,
            weight,
            bias,
            stats,
            residual if keep_residual else None,
            sample_weight,
            y if sign_of_y else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, residual, sample_weight, y = _saved(ctx)
        call: Call = ctx.call
        needs_grad: tuple[bool, ...] = ctx.needs_input_grad
        needs = NEEDS[needs_grad[:4]]
        training = call.population is None
        if torch.is_grad_enabled() or needs_grad[4]:
            return _through_graph(ctx, dy, needs)
        if x is None:
            # Inference, frozen: the gradient looks at dy and at the sign of y, never at the values of x.
            x = dy
        grads = call.kernel.backward(
            dy, x, stats, call.eps, weight, bias, training=training, residual=residual, y=y,
            activation=call.activation, mask=call.mask, sample_weight=sample_weight, needs=needs,
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
    """``BatchNormFunction.apply``.

    Function.apply is a layer of Python around the call below, and needed under function transforms only: for small
    inputs it would cost as much as the kernel.
    """
    if torch._C._are_functorch_transforms_active():
        y: Tensor = BatchNormFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, residual, sample_weight, call
        )
    else:
        y = _apply(x, weight, bias, residual, sample_weight, call)
    return y


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What forward kept, in one order."""
    kept: tuple[Any, ...] = ctx.saved_tensors
    return kept if len(kept) == 7 else (*kept, None, None, None)


def _needs_input(ctx: Any, call: Call) -> bool:
    """Whether a gradient depends on the values of x: training, or the weight's own gradient."""
    needs: tuple[bool, ...] = ctx.needs_input_grad
    return call.population is None or needs[1]


def _through_graph(ctx: Any, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """The same gradients, in operations that autograd can differentiate again."""
    x, weight, bias, stats, residual, sample_weight, y = _saved(ctx)
    call: Call = ctx.call
    population = None if call.population is None else (stats[0], stats[1])
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if x is None:
            # Frozen inference: the gradient is linear in dy, whatever the values of x were.
            x = torch.zeros_like(dy, requires_grad=needs.x)
        # Aliases: one tensor may be given twice (as x and as the residual), each place has its own gradient.
        x = x.view_as(x)
        weight, bias, residual, sample_weight = (
            None if t is None else t.view_as(t) for t in (weight, bias, residual, sample_weight)
        )
        linear = call.activation.is_piecewise_linear
        z = eager.differentiable(
            x, weight, bias, call.eps, stats=population, residual=None if linear else residual,
            activation=IDENTITY if linear else call.activation, mask=call.mask, sample_weight=sample_weight,
        )  # fmt: skip
        dy = dy.to(z.dtype)
        if linear:
            # Between its kinks the activation's slope is a constant: only what stands before it needs a graph.
            dy = _before_activation(call, dy, z.detach() if y is None else y, residual)
        wanted = [
            (x, needs.x), (weight, needs.weight), (bias, needs.bias),
            (None if linear else residual, needs.residual), (sample_weight, ctx.needs_input_grad[4]),
        ]  # fmt: skip
        inputs = [t for t, needed in wanted if needed and t is not None]
        found = iter(torch.autograd.grad(z, inputs, dy, create_graph=graph, allow_unused=True) if inputs else ())
        grads = [next(found) if needed and t is not None else None for t, needed in wanted]
    if linear and needs.residual:
        grads[3] = dy.to(x.dtype)
    return (*grads, None)


def _before_activation(call: Call, dy: Tensor, z: Tensor, residual: Tensor | None) -> Tensor:
    """dy·activation'(z) of a piecewise linear function, 0 where absent; differentiable in dy."""
    if call.activation.name != "identity":
        z = z if residual is None else z + residual.detach()
        dy = dy * call.activation.backward(torch.ones_like(dy), z)
    if call.mask is not None:
        dy = torch.where(call.mask, dy, torch.zeros((), dtype=dy.dtype, device=dy.device))
    return dy
