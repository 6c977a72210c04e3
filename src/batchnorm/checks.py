"""What a call must satisfy before anything is computed: one quick test, and the detailed checks only if it fails."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, AutogradError, DtypeError, MismatchError, NonFiniteError, expected
from batchnorm.kernels import plain
from batchnorm.kernels.contract import Running, count_of
from batchnorm.moments import Moments, broadcast_weights, combine_weights

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

PARAMETERS = {(x, p) for x in FLOATING for p in FLOATING if p == x or (p == torch.float32 and x.itemsize == 2)}
"""(input dtype, parameter dtype) pairs that may be combined: equal ones, or float32 parameters with a 16-bit input."""

STATISTICS = {
    (x, mean, var) for x, mean, var in product(FLOATING, repeat=3) if x != torch.float64 or mean == var == torch.float64
}
"""(input, running mean, running var) dtypes that may be combined: a float64 input needs float64 statistics."""


class Places(NamedTuple):
    """Which values count, and how often. Both have the input's rank and broadcast to it."""

    mask: Tensor | None = None
    sample_weight: Tensor | None = None


EVERYWHERE = Places()


def check(
    function: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    *,
    by_batch: bool,
    whole: bool = True,
) -> None:
    """Raise if the input cannot be normalized.

    Arguments:
        function: the name used in our own messages
        mean, var: the running statistics that are read or updated, or None if neither happens
        by_batch: whether the batch's own statistics are used
        whole: whether ``x`` is the whole batch; else its size is judged where the parts are merged
    """
    # The quick test runs on every call and is written for speed: True if every check in ``_check`` would pass.
    shape, dtype, device = x.shape, x.dtype, x.device
    values: Any = x.numel()
    if type(values) is Tensor:
        return  # torch.jit.trace records every use of a size; PyTorch's operator does the checks itself
    if len(shape) > 1 and values > shape[1] and eps > 0.0:
        channels = shape[1]
        if (
            (
                weight is None
                or (weight.numel() == channels and (dtype, weight.dtype) in PARAMETERS and weight.device == device)
            )
            and (
                bias is None
                or (bias.numel() == channels and (dtype, bias.dtype) in PARAMETERS and bias.device == device)
            )
            and (
                (by_batch and mean is var and dtype in FLOATING)
                if mean is None or var is None
                else (
                    mean.numel() == channels
                    and var.numel() == channels
                    and (dtype, mean.dtype, var.dtype) in STATISTICS
                    and mean.device == device
                    and var.device == device
                    and not mean.requires_grad
                    and not var.requires_grad
                )
            )
        ):
            return
    _check(function, x, weight, bias, mean, var, eps, by_batch, whole)


def _check(
    function: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    by_batch: bool,
    whole: bool,
) -> None:
    check_input(function, x)
    if by_batch and whole:
        check_batch_size(x)
    check_eps(eps, by_batch)
    check_statistics(function, x, mean, var, by_batch)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            _check_channels(function, x, name, p)
            if (x.dtype, p.dtype) not in PARAMETERS:
                raise DtypeError(_dtype_message(function, name, x, p))


def check_input(function: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        todo = "Convert it first, e.g. input.float(); complex values can be normalized as two real channels."
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise DtypeError(expected(function, f"an input of dtype {names}", x.dtype, todo))
    if x.dim() < 2:
        todo = "Add the missing dimension, e.g. input.unsqueeze(0)."
        raise ArgumentError(expected(function, "an input of shape (N, C, ...)", f"shape {tuple(x.shape)}", todo))


def check_batch_size(x: Tensor) -> None:
    """torch's own message for a batch of one value a channel, on which libraries match."""
    if x.shape[1] and x.numel() == x.shape[1]:
        raise ArgumentError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_eps(eps: float, by_batch: bool) -> None:
    """torch's own messages."""
    if by_batch and eps <= 0.0:
        raise ArgumentError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ArgumentError(f"batch_norm eps must be non-negative, but got {eps}")


def check_statistics(function: str, x: Tensor, mean: Tensor | None, var: Tensor | None, by_batch: bool) -> None:
    if (mean is None) != (var is None):
        raise ArgumentError("running_mean and running_var must either both be None or neither be None")
    if mean is None or var is None:
        if not by_batch:
            raise MismatchError("running_mean must be defined in evaluation mode")
        return
    for name, r in (("running_mean", mean), ("running_var", var)):
        _check_channels(function, x, name, r)
        if (x.dtype, r.dtype, r.dtype) not in STATISTICS:
            raise DtypeError(_dtype_message(function, name, x, r))
        if r.requires_grad and torch.is_grad_enabled():
            todo = f"Give {name}.detach(): statistics are not differentiable arguments."
            raise AutogradError(expected(function, f"{name} without requires_grad", "one that requires grad", todo))


def check_places(
    function: str, x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, *, by_batch: bool
) -> Places:
    """Mask and weights with x's rank, after checks of their dtypes, shapes and devices.

    Their values are checked only where that breaks no graph: not under a compiler, tracer, mode or transform. There a
    batch with too few present values raises nothing; it leaves the running statistics as they are (``enough``).
    """
    combined = combine_weights(function, x, mask, sample_weight)
    for name, t in (("mask", mask), ("sample_weight", sample_weight)):
        if t is not None and t.device != x.device:
            raise MismatchError(_device_message(function, name, x, t))
    look = can_look(x, mask, sample_weight)
    if sample_weight is not None:
        if not sample_weight.is_floating_point():
            sample_weight = sample_weight.to(torch.float32)
        values = sample_weight.detach()
        if look and not bool(((values >= 0) & torch.isfinite(values)).all()):
            todo = "Clip or drop the others."
            raise ArgumentError(expected(function, "finite sample weights of 0 or more", "others", todo))
        sample_weight = broadcast_weights(function, "sample_weight", x, sample_weight)
    if mask is not None:
        mask = broadcast_weights(function, "mask", x, mask)
    if by_batch and look and combined is not None and x.numel():
        check_present(function, count_of(x, mask, sample_weight))
    return Places(mask, sample_weight)


def can_look(*tensors: Tensor | None) -> bool:
    """True if values may be read here: no compiler, tracer, mode or transform is watching, and there is memory."""
    return not torch.compiler.is_compiling() and plain.is_plain(*tensors)


def least(count: Tensor | float) -> float:
    """The smallest number of values (the sum of their weights) that any channel has. Reads a tensor's value."""
    if not isinstance(count, Tensor):
        return count
    return float(count.detach().min()) if count.numel() else 0.0


def check_present(function: str, count: Tensor | float) -> None:
    """Raise if masks and weights leave a channel one value or less: it has no variance."""
    found = least(count)
    if found <= 1:
        todo = "Leave such a batch out, or give it more present values."
        invariant = "more than 1 present value per channel when training (the sum of the weights)"
        raise ArgumentError(expected(function, invariant, f"{found:g}", todo))


def check_residual(function: str, x: Tensor, residual: Tensor) -> Tensor:
    try:
        residual = residual.expand(x.shape)
    except RuntimeError:
        invariant, todo = f"a residual that broadcasts to {tuple(x.shape)}", "Reshape or project the residual."
        raise MismatchError(expected(function, invariant, f"shape {tuple(residual.shape)}", todo)) from None
    if residual.dtype != x.dtype or residual.device != x.device:
        got, todo = f"{residual.dtype} on {residual.device}", "Convert it with residual.to(input)."
        raise DtypeError(expected(function, f"a residual of {x.dtype} on {x.device}", got, todo))
    return residual


def check_out(x: Tensor, others: tuple[Tensor | None, ...], out: Tensor, training: bool) -> None:
    if training:
        todo = "Leave out= away in training: backward needs the input."
        raise ArgumentError(expected("batch_norm", "out= in inference only", "training=True", todo))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        todo = "Call it under torch.no_grad(), or leave out= away."
        raise MismatchError(expected("batch_norm", "no gradient to flow beside out=", "one that would", todo))
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        invariant = f"out of shape {tuple(x.shape)}, {x.dtype} on {x.device}"
        got = f"{tuple(out.shape)}, {out.dtype} on {out.device}"
        raise MismatchError(expected("batch_norm", invariant, got, "Give torch.empty_like(input)."))


def nonfinite_channels(found: Moments, running: Running | None) -> list[int]:
    """Indices of the channels whose batch mean or variance is Inf or NaN in the dtype of the running statistics."""
    return [int(c) for c in (~finite_channels(found, running)).nonzero()]


def finite_channels(found: Moments, running: Running | None) -> Tensor:
    """True for each channel whose batch mean and variance are finite in the dtype of the running statistics."""
    mean, var = found.mean, found.variance()
    if running is not None:
        mean, var = mean.to(running.mean.dtype), var.to(running.var.dtype)
    return torch.isfinite(mean) & torch.isfinite(var)


def raise_nonfinite(where: str, channels: list[int], batch: int | None) -> None:
    """The error of ``nonfinite="raise"``."""
    shown = ", ".join(str(c) for c in channels[:8]) + (", ..." if len(channels) > 8 else "")
    at = "" if batch is None else f" of batch {batch}"
    got = f"Inf or NaN in channel{'s' if len(channels) > 1 else ''} {shown}{at}"
    todo = 'Look at the layers before it, lower the learning rate, or drop such batches with nonfinite="skip".'
    raise NonFiniteError(expected(where, "finite values", got, todo))


def _check_channels(function: str, x: Tensor, name: str, t: Tensor) -> None:
    if t.numel() != x.shape[1]:
        raise MismatchError(f"{name} should contain {x.shape[1]} elements not {t.numel()}")
    if t.device != x.device:
        raise MismatchError(_device_message(function, name, x, t))


def _device_message(function: str, name: str, x: Tensor, t: Tensor) -> str:
    todo = f"Move one of them, e.g. module.to({str(x.device)!r})."
    return expected(function, f"{name} on {x.device}, where the input is", t.device, todo)


def _dtype_message(function: str, name: str, x: Tensor, t: Tensor) -> str:
    todo = "Cast one of them, e.g. module.double() or input.float()."
    return expected(function, f"{name} of a dtype that goes with an input of {x.dtype}", t.dtype, todo)
