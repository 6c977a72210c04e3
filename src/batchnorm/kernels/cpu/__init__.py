"""The CPU kernels: Numba, run in PyTorch's own thread pool.

``contract.Kernel`` documents what each function does. The functions below pack the arguments for the compiled
kernels: ``plan`` decides once for each combination of shapes and options what runs, they fill in the addresses. What
they make or convert on the way is held in a local variable until the kernels have returned.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import INPUT_ONLY, Groups, Needs, Running, count_of, moments_from
from batchnorm.kernels.cpu import grouped, plan, wide_range
from batchnorm.kernels.cpu.block import pack_what
from batchnorm.moments import Moments

NAME = "cpu"

CPU = torch.device("cpu")
"""Said at each allocation: the default device may be another one."""

CONSTANT = float("inf")
"""COUNT of statistics that do not depend on the input: their share of the gradient vanishes."""

WRITTEN = {
    (False, False): (), (True, False): ("dx",), (False, True): ("dresidual",), (True, True): ("dx", "dresidual"),
}  # fmt: skip
"""What a backward writes, by whether dx and dresidual are needed."""

KEPT_ROOM = 1 << 17
"""float64 values of working memory that a thread keeps for its next call."""


def supports(
    x: Tensor,
    *,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Groups | None = None,
) -> str | None:
    """None where the compiled kernels serve, or why they do not."""
    if not x.is_cpu:
        return f"runs on the CPU, the input is on {x.device}"
    if x.dtype not in plan.DTYPES:
        return f"no kernel for {x.dtype}"
    if x.numel() == 0:
        return "nothing to do for an input without values"
    if activation.name not in plan.ACTIVATIONS:
        return f"{activation.name} is not fused here"
    if activation.negative_slope < 0:
        return "leaky_relu with a negative slope changes the sign that backward looks at"
    if mask is not None or sample_weight is not None:
        for name, t in (("mask", mask), ("sample_weight", sample_weight)):
            if t is not None and t.shape[1] != 1 and x.shape[1] != 1:
                return f"a {name} of each channel's own"
    return None if groups is None else grouped.why_not(x, groups)


def moments(
    x: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None, groups: Groups | None = None
) -> Moments:
    if groups is not None:
        return grouped.moments(x, groups, mask, sample_weight)
    masked = mask is not None or sample_weight is not None
    p = plan.find("MOMENTS", x, masked=masked)
    x = p.readable("x", x) if p.copied else x
    stats = torch.empty((3, p.channels), dtype=torch.float64, device=CPU)
    if masked:
        mask, sample_weight = p.positions(mask, torch.uint8), p.positions(sample_weight, torch.float64)
    scratch = _room(p)
    p.run(
        pack_what(
            x.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 0, stats.data_ptr(), 0, 0, 0, 0, 0, _at(mask), _at(sample_weight),
            _at(scratch), 0,
            0.0, 0.0, 0.0, 0.0,
        )
    )  # fmt: skip
    return Moments(stats[0], stats[1], stats[2])


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    if groups is not None:
        return grouped.normalize(
            x, mean, var, eps, weight, bias, groups, residual=residual, activation=activation, mask=mask, out=out
        )
    if out is not None and out.data_ptr() == x.data_ptr() and wide_range.is_far(x, mean, var):
        return out.copy_(
            wide_range.normalize(x, mean, var, eps, weight, bias, residual=residual, activation=activation, mask=mask)
        )
    weight, bias, parameter = _parameters(weight, bias)
    mean, var = _statistics(mean, var)
    p = plan.find(
        "NORMALIZE", x, None, out, residual, ("y",) if out is None else (), activation, parameter, mean.dtype,
        masked=mask is not None,
    )  # fmt: skip
    aside = None
    if p.copied:
        x = p.readable("x", x)
        residual = None if residual is None else p.readable("residual", residual)
        aside = out if "y" in p.copied else None
    y = p.output(x) if out is None or aside is not None else out
    positions = None if mask is None else p.positions(mask, torch.uint8)
    scratch = _room(p)
    far = p.run(
        pack_what(
            x.data_ptr(), 0, y.data_ptr(), _at(residual), 0, 0, _at(weight), _at(bias), mean.data_ptr(),
            var.data_ptr(), 0, 0, 0, 0, 0, 0, _at(positions), 0, _at(scratch), 0,
            eps, 0.0, activation.negative_slope, 0.0,
        )
    )  # fmt: skip
    if far:
        y.copy_(
            wide_range.normalize(x, mean, var, eps, weight, bias, residual=residual, activation=activation, mask=mask)
        )
    return y if aside is None else aside.copy_(y)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    running: Running | None = None,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    if groups is not None:
        return grouped.forward(
            x, weight, bias, eps, groups, residual=residual, activation=activation, mask=mask,
            sample_weight=sample_weight, running=running,
        )  # fmt: skip
    weight, bias, parameter = _parameters(weight, bias)
    running_mean = running_var = batches = None
    factor = 0.0
    # Not with a factor of 1: r + 1·(batch − r) would keep a NaN that has to be forgotten.
    if running is not None and running.factor != 1.0 and _in_place(running):
        running_mean, running_var, factor = running.mean, running.var, float(running.factor)
        batches = running.batches
    masked = mask is not None or sample_weight is not None
    p = plan.find(
        "FORWARD", x, None, None, residual, ("y",), activation, parameter, torch.float64, running_mean, masked
    )
    if p.copied:
        x = p.readable("x", x)
        residual = None if residual is None else p.readable("residual", residual)
    y = p.output(x)
    stats = torch.empty_like(p.pair)
    at = stats.data_ptr()
    positions, weights = mask, sample_weight
    if masked:
        positions, weights = p.positions(mask, torch.uint8), p.positions(sample_weight, torch.float64)
    scratch = _room(p)
    far = p.run(
        pack_what(
            x.data_ptr(), 0, y.data_ptr(), _at(residual), 0, 0, _at(weight), _at(bias), at, at + 8 * p.channels, at,
            _at(running_mean), _at(running_var), 0, 0, 0, _at(positions), _at(weights), _at(scratch), _at(batches),
            eps, factor, activation.negative_slope, 0.0,
        )
    )  # fmt: skip
    if far:
        y.copy_(
            wide_range.normalize(
                x, stats[0], stats[1], eps, weight, bias, residual=residual, activation=activation, mask=mask
            )
        )
    if running_mean is not None and running_var is not None:
        grouped.changed(running_mean, running_var)
    elif running is not None:
        running.update(moments_from(stats, count_of(x, mask, sample_weight)))
    return y, stats


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    if groups is not None:
        return grouped.backward_sums(
            dy, x, mean, var, eps, weight, bias, groups, y=y, activation=activation, mask=mask
        )  # fmt: skip
    weight, bias, parameter = _parameters(weight, bias)
    mean, var = _statistics(mean, var)
    y = None if activation.name == "identity" else y
    p = plan.find("BACKWARD_SUMS", x, dy, y, None, (), activation, parameter, mean.dtype, masked=mask is not None)
    if p.copied:
        x, dy = p.readable("x", x), p.readable("dy", dy)
        y = None if y is None else p.readable("y", y)
    sums = torch.empty_like(p.pair)
    positions = None if mask is None else p.positions(mask, torch.uint8)
    scratch = _room(p)
    far = p.run(
        pack_what(
            x.data_ptr(), dy.data_ptr(), _at(y), 0, 0, 0, _at(weight), _at(bias), mean.data_ptr(), var.data_ptr(), 0,
            0, 0, sums.data_ptr(), 0, 0, _at(positions), 0, _at(scratch), 0, eps, 0.0, activation.negative_slope, 0.0,
        )
    )  # fmt: skip
    if far:
        return wide_range.backward_sums(dy, x, mean, var, eps, weight, bias, y=y, activation=activation, mask=mask)
    return sums[0], sums[1]


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    count: Tensor | float,
    *,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    needs: Needs = INPUT_ONLY,
    groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    if sums is None:
        stats = torch.stack((mean, var))
        dx, _, _, dresidual = backward(
            dy, x, stats, eps, weight, bias, training=False, y=y, activation=activation, mask=mask,
            needs=Needs(needs.x, False, False, needs.residual),
        )  # fmt: skip
        return dx, dresidual
    if groups is not None:
        return grouped.backward_input(
            dy, x, mean, var, eps, weight, bias, sums, count, groups, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs,
        )  # fmt: skip
    weight, bias, parameter = _parameters(weight, bias)
    mean, var = _statistics(mean, var)
    y = None if activation.name == "identity" else y
    written = WRITTEN[needs.x, needs.residual]
    masked = mask is not None or sample_weight is not None
    p = plan.find("BACKWARD_INPUT", x, dy, y, None, written, activation, parameter, mean.dtype, masked=masked)
    if p.copied:
        x, dy = p.readable("x", x), p.readable("dy", dy)
        y = None if y is None else p.readable("y", y)
    dx = p.output(x) if needs.x else None
    dresidual = p.output(x) if needs.residual else None
    # Divided here, since counts may differ from channel to channel: a COUNT of 1 then does the rest.
    both = torch.stack(sums).to(torch.float64) / count
    positions, weights = mask, sample_weight
    if masked:
        positions, weights = p.positions(mask, torch.uint8), p.positions(sample_weight, torch.float64)
    scratch = _room(p)
    far = p.run(
        pack_what(
            x.data_ptr(), dy.data_ptr(), _at(y), 0, _at(dx), _at(dresidual), _at(weight), _at(bias), mean.data_ptr(),
            var.data_ptr(), 0, 0, 0, both.data_ptr(), 0, 0, _at(positions), _at(weights), _at(scratch), 0,
            eps, 0.0, activation.negative_slope, 1.0,
        )
    )  # fmt: skip
    if far:
        return wide_range.backward_input(
            dy, x, mean, var, eps, weight, bias, sums, count, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs,
        )  # fmt: skip
    return dx, dresidual


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    needs: Needs,
    groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if groups is not None:
        return grouped.backward(
            dy, x, stats, eps, weight, bias, groups, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs,
        )  # fmt: skip
    weight, bias, parameter = _parameters(weight, bias)
    passed_on = None
    if activation.name == "identity" and mask is None:
        # dz is dy itself: the residual's gradient needs no memory of its own.
        passed_on = dy if needs.residual else None
    if activation.name == "identity":
        y = None
    written = WRITTEN[needs.x, needs.residual and passed_on is None]
    operation = "BACKWARD" if training else "BACKWARD_EVAL"
    masked = mask is not None or sample_weight is not None
    p = plan.find(operation, x, dy, y, None, written, activation, parameter, stats.dtype, masked=masked)
    if p.copied:
        x, dy = p.readable("x", x), p.readable("dy", dy)
        y = None if y is None else p.readable("y", y)
    dx = p.output(x) if needs.x else None
    dresidual = p.output(x) if needs.residual and passed_on is None else None
    dweight = torch.empty_like(weight) if needs.weight and weight is not None else None
    dbias = torch.empty_like(bias) if needs.bias and bias is not None else None
    mean = stats.data_ptr()
    sums = torch.empty_like(p.pair) if len(p.launches) > 1 else None
    positions, weights = mask, sample_weight
    if masked:
        positions, weights = p.positions(mask, torch.uint8), p.positions(sample_weight, torch.float64)
    scratch = _room(p)
    # 0: the kernels count for themselves.
    count = 0.0 if training and len(p.launches) == 1 else x.numel() / p.channels if training else CONSTANT
    far = p.run(
        pack_what(
            x.data_ptr(), dy.data_ptr(), _at(y), 0, _at(dx), _at(dresidual), _at(weight), _at(bias), mean,
            mean + stats.element_size() * p.channels, 0, 0, 0, _at(sums), _at(dweight), _at(dbias), _at(positions),
            _at(weights), _at(scratch), 0,
            eps, 0.0, activation.negative_slope, count,
        )
    )  # fmt: skip
    if far:
        return wide_range.backward(
            dy, x, stats, eps, weight, bias, training=training, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs,
        )  # fmt: skip
    return dx, dweight, dbias, passed_on if passed_on is not None else dresidual


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Kept(threading.local):
    """Working memory that each thread keeps: between two calls nothing in it is of use, and making it takes time."""

    room: Tensor | None = None


_kept = _Kept()


def _room(p: plan.Plan) -> Tensor | None:
    """Working memory for the kernels of a plan."""
    if not p.scratch:
        return None
    if p.scratch > KEPT_ROOM:
        return torch.empty(p.scratch, dtype=torch.float64, device=CPU)
    room = _kept.room
    if room is None or room.numel() < p.scratch:
        room = _kept.room = torch.empty(p.scratch, dtype=torch.float64, device=CPU)
    return room


def _parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight and bias as the kernels read them (one dtype, no gaps), and one of them for its dtype."""
    if weight is None:
        return None, bias if bias is None or bias.is_contiguous() else bias.contiguous(), bias
    if not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
        bias = bias.to(weight.dtype).contiguous()
    return weight, bias, weight


def _statistics(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance as the kernels read them: both float32 or both float64, no gaps."""
    if mean.dtype != var.dtype or mean.dtype not in (torch.float32, torch.float64):
        mean, var = mean.to(torch.float64), var.to(torch.float64)
    return mean.contiguous(), var.contiguous()


def _in_place(running: Running) -> bool:
    """Whether the kernels can update these running statistics themselves."""
    mean, var, batches = running.mean, running.var, running.batches
    if batches is not None and (batches.dtype != torch.int64 or not batches.is_cpu):
        return False
    return mean.dtype == var.dtype and mean.is_contiguous() and var.is_contiguous() and mean.dtype in plan.CODES
