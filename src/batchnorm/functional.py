"""``batch_norm()``: check, choose a kernel, differentiate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from batchnorm import kernels
from batchnorm.autograd import Call, differentiated, operators
from batchnorm.errors import ArgumentError, DtypeError, MismatchError, NonFiniteError, expected
from batchnorm.kernels import eager
from batchnorm.kernels.activations import Activation
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.eager import Running, update
from batchnorm.moments import Moments, broadcast_weights, combine_weights

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT32 = torch.float32
WIDE = (torch.float32, torch.float64)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    out: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization of a tensor with channels in dimension 1.

    .. math::
        y = f\Big(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta + r\Big)

    over every dimension but 1, with :math:`\gamma` = ``weight``, :math:`\beta` = ``bias``, :math:`r` =
    ``residual`` and :math:`f` = ``activation``. In training, mean and biased variance are the batch's own
    (Ioffe and Szegedy 2015, Algorithm 1 and section 3.2) and the running statistics follow them:

    .. math::
        \text{running} \leftarrow (1 - \text{momentum})\,\text{running} + \text{momentum}\cdot\text{batch}

    with the batch's *unbiased* variance. Otherwise the running statistics are used as they are.

    The first eight arguments are those of ``torch.nn.functional.batch_norm``.

    Arguments:
        input: shape (N, C, ...), float32, float64, bfloat16 or float16, in any memory layout, which the
            result keeps
        running_mean, running_var: shape (C,), updated in place in training; both or neither
        weight, bias: shape (C,), of the input's dtype, or float32 beside a 16-bit input
        momentum: weight of the NEW batch, as in PyTorch. Keras, Flax and the paper's notes give the weight
            of the old value: theirs = 1 − ours
        mask: bool, True where a value is present; shape (N,), (N, ...) without C, or broadcastable to input.
            Absent values are neither measured nor normalized: the result and every gradient there are 0
        sample_weight: non-negative frequency weights in one of the same shapes: 2 is the sample counted
            twice. They change the statistics, every value is still normalized. Differentiable
        residual: broadcastable to input, added before the activation
        activation: None, "relu", "leaky_relu" (with ``negative_slope``), "silu", "gelu", "sigmoid" or "tanh"
        out: receives the result of inference; may be ``input`` or ``residual`` itself. Not differentiable

    Returns:
        a tensor of input's shape, dtype and memory layout, differentiable any number of times in input,
        weight, bias, residual and sample_weight

    Raises:
        ArgumentError (a ValueError): one value a channel in training; eps not positive in training; a
            shape or name outside the above
        MismatchError (a RuntimeError): sizes or devices that do not fit together
        DtypeError (a RuntimeError): dtypes that cannot be normalized or combined
        Nothing is changed when an error is raised.

    >>> import torch
    >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> batch_norm(x, mean, var, training=True, momentum=0.5)
    tensor([[-1.0000,  0.0000],
            [ 1.0000,  0.0000]])
    >>> mean, var
    (tensor([1.0000, 2.5000]), tensor([1.5000, 0.5000]))
    """
    act = activation_by_name(activation, negative_slope)
    check_input("batch_norm", input)
    if training:
        check_batch_size(input)
        check_eps(eps)
    check_statistics("batch_norm", input, running_mean, running_var, training)
    check_parameters("batch_norm", input, weight, bias)
    if mask is not None or sample_weight is not None:
        mask, sample_weight = check_weights(input, mask, sample_weight, training)
    if residual is not None:
        residual = check_residual("batch_norm", input, residual)
    if out is not None:
        check_out(input, (weight, bias, residual), out, training)
    running = None
    population = None
    if not training:
        assert running_mean is not None and running_var is not None
        population = (running_mean, running_var)
    elif running_mean is not None and running_var is not None and input.numel() > 0:
        running = Running(running_mean, running_var, momentum)
    return run(
        input, weight, bias, eps, population=population, running=running, mask=mask, sample_weight=sample_weight,
        residual=residual, activation=act, out=out,
    )  # fmt: skip


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    population: tuple[Tensor, Tensor] | None,
    running: Running | None,
    activation: Activation,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    batch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``batch_norm`` on arguments that are known to be right.

    ``population`` gives the statistics of inference, ``batch`` those of training where they were already
    found (mean and biased variance, (2, channels)); with neither they are found here and ``running`` follows.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return run_traced(
            x, weight, bias, eps, population, running, activation, residual, mask, sample_weight, batch, out
        )
    kernel = kernels.choose(x, activation=activation, mask=mask, sample_weight=sample_weight)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual, sample_weight):
        return differentiated(
            x, weight, bias, residual, sample_weight, Call(kernel, eps, activation, mask, population, batch, running)
        )
    if population is None and batch is None:
        y: Tensor = kernel.forward(
            x, weight, bias, eps, residual=residual, activation=activation, mask=mask, sample_weight=sample_weight,
            running=running,
        )[0]  # fmt: skip
        return y
    mean, var = population if population is not None else (batch[0], batch[1])  # type: ignore[index]
    if out is not None:
        # A kernel may write before it has read all: only the very places of the input may be written over.
        if _share_memory(x, out) and (x.data_ptr(), x.stride()) != (out.data_ptr(), out.stride()):
            x = x.clone()
        if residual is not None and _share_memory(residual, out):
            residual = residual.clone()
    y = kernel.normalize(x, mean, var, eps, weight, bias, residual=residual, activation=activation, mask=mask, out=out)
    return y


def run_traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    population: tuple[Tensor, Tensor] | None,
    running: Running | None,
    activation: Activation,
    residual: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    batch: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """``run`` where a compiler looks on: the same by operators it can record."""
    options = (eps, activation.name, activation.negative_slope)
    if population is not None:
        y: Tensor = operators.infer(x, *population, weight, bias, residual, mask, *options)
        return y if out is None else out.copy_(y)
    # Measured again where ``batch`` was given: statistics that the gradient flows through have to be found inside.
    y, stats = operators.train(x, weight, bias, residual, mask, sample_weight, *options)
    if running is not None and batch is None:
        count = eager.count_of(x, mask, sample_weight)
        if not isinstance(count, Tensor):
            count = torch.full_like(stats[0], count)
        update(running, Moments(count, stats[0], stats[1] * count))
    return y


def batch_moments(x: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Moments:
    """The batch's moments by the kernel that ``run`` would use, without a graph."""
    with torch.no_grad():
        kernel = kernels.choose(x, mask=mask, sample_weight=sample_weight)
        found: Moments = kernel.moments(x, mask=mask, sample_weight=sample_weight)
    return found


def nonfinite_channels(found: Moments, running: Running | None) -> list[int]:
    """Channels whose batch mean or variance is Inf or NaN, in the dtype that running statistics have."""
    mean, var = found.mean, found.variance()
    if running is not None:
        mean, var = mean.to(running.mean.dtype), var.to(running.var.dtype)
    bad = ~(torch.isfinite(mean) & torch.isfinite(var))
    return [int(c) for c in bad.nonzero()]


def is_usual(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> bool:
    """Whether one quick look says that none of the checks below has anything to say, in training or out of it."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) < 2 or x.numel() <= shape[1] or dtype not in FLOATING or eps <= 0.0 or mean is None or var is None:
        return False
    channels = shape[1]
    for t in (mean, var, weight, bias):
        if t is None:
            continue
        other = t.dtype
        if t.numel() != channels or t.device != device or (other != dtype and (other != FLOAT32 or dtype in WIDE)):
            return False
    return True


def check_input(function: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        todo = "Convert it first, e.g. input.float(); complex values can be normalized as two real channels."
        raise DtypeError(expected(function, f"an input of dtype {_names(FLOATING)}", x.dtype, todo))
    if x.dim() < 2:
        todo = "Add the missing dimension, e.g. input.unsqueeze(0)."
        raise ArgumentError(expected(function, "an input of shape (N, C, ...)", f"shape {tuple(x.shape)}", todo))


def check_batch_size(x: Tensor) -> None:
    """torch's own message for a batch of one value a channel, on which libraries match."""
    if x.shape[1] and x.numel() == x.shape[1]:
        raise ArgumentError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_eps(eps: float) -> None:
    if eps <= 0.0:
        raise ArgumentError(f"batch_norm eps must be positive during training, but got {eps}")


def check_statistics(function: str, x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool) -> None:
    if (mean is None) != (var is None):
        raise ArgumentError("running_mean and running_var must either both be None or neither be None")
    if mean is None or var is None:
        if not training:
            raise MismatchError("running_mean must be defined in evaluation mode")
        return
    for name, r in (("running_mean", mean), ("running_var", var)):
        _check_channels(function, x, name, r)
        if x.dtype == torch.float64 and r.dtype != torch.float64:
            raise DtypeError(_dtype_message(function, name, x, r))


def check_parameters(function: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Sizes, devices and dtypes of weight and bias: the input's dtype, or float32 beside 16 bits."""
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        _check_channels(function, x, name, p)
        if p.dtype != x.dtype and not (p.dtype == torch.float32 and x.dtype.itemsize == 2):
            raise DtypeError(_dtype_message(function, name, x, p))


def check_weights(
    x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and weights with x's rank, after a look at their dtypes, shapes and values."""
    combined = combine_weights("batch_norm", x, mask, sample_weight)
    if sample_weight is not None:
        if not sample_weight.is_floating_point():
            sample_weight = sample_weight.to(torch.float32)
        if bool((sample_weight.detach() < 0).any()) or not bool(torch.isfinite(sample_weight.detach()).all()):
            todo = "Clip or drop the others."
            raise ArgumentError(expected("batch_norm", "finite sample weights of 0 or more", "others", todo))
        sample_weight = broadcast_weights("batch_norm", "sample_weight", x, sample_weight)
    if mask is not None:
        mask = broadcast_weights("batch_norm", "mask", x, mask)
    if training and combined is not None and x.numel():
        count = eager.count_of(x, mask, sample_weight)
        least = float(count.detach().min()) if isinstance(count, Tensor) else count
        if least <= 1:
            todo = "Leave such a batch out, or give it more present values."
            invariant = "more than 1 present value per channel when training (the sum of the weights)"
            raise ArgumentError(expected("batch_norm", invariant, f"{least:g}", todo))
    return mask, sample_weight


def check_residual(function: str, x: Tensor, residual: Tensor) -> Tensor:
    try:
        residual = residual.expand(x.shape)
    except RuntimeError:
        invariant, todo = (
            f"a residual that broadcasts to {tuple(x.shape)}",
            "Reshape or project the residual.",
        )
        raise MismatchError(expected(function, invariant, f"shape {tuple(residual.shape)}", todo)) from None
    if residual.dtype != x.dtype or residual.device != x.device:
        got, todo = f"{residual.dtype} on {residual.device}", "Convert it with residual.to(input)."
        raise DtypeError(expected(function, f"a residual of {x.dtype} on {x.device}", got, todo))
    return residual


def check_out(x: Tensor, others: tuple[Tensor | None, ...], out: Tensor, training: bool) -> None:
    if training:
        todo = "Leave out= away in training: backward needs the input."
        raise ArgumentError(expected("batch_norm", "out= in inference only", "training=True", todo))
    if torch.is_grad_enabled() and _any_requires_grad(x, *others):
        todo = "Call it under torch.no_grad(), or leave out= away."
        raise MismatchError(expected("batch_norm", "no gradient to flow beside out=", "one that would", todo))
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        invariant = f"out of shape {tuple(x.shape)}, {x.dtype} on {x.device}"
        got = f"{tuple(out.shape)}, {out.dtype} on {out.device}"
        raise MismatchError(expected("batch_norm", invariant, got, "Give torch.empty_like(input)."))


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
        todo = f"Move one of them, e.g. module.to({str(x.device)!r})."
        raise MismatchError(expected(function, f"{name} on {x.device}, where the input is", t.device, todo))


def _dtype_message(function: str, name: str, x: Tensor, t: Tensor) -> str:
    todo = "Cast one of them, e.g. module.double() or input.float()."
    return expected(function, f"{name} of a dtype that goes with an input of {x.dtype}", t.dtype, todo)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110  (any() with a generator costs a microsecond)
        if t is not None and t.requires_grad:
            return True
    return False


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
