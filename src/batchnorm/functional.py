"""``batch_norm()``: check, choose a kernel, differentiate."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import kernels
from batchnorm.autograd import Call, differentiated, operators, phases
from batchnorm.checks import EVERYWHERE, Places, check, check_out, check_places, check_residual
from batchnorm.errors import AutogradError, expected
from batchnorm.kernels import composite, layout
from batchnorm.kernels.activations import Activation
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Kernel, Running, count_of, enough, moments_from
from batchnorm.kernels.seams import PLAIN, Seams
from batchnorm.moments import Moments


class Population(NamedTuple):
    """The statistics of inference: constants."""

    mean: Tensor
    var: Tensor


class Sink(Protocol):
    """Where the batch's moments go."""

    @property
    def running(self) -> Running | None:
        """The running statistics that ``take`` may write."""

    def take(self, found: Moments, where: Tensor | None = None) -> None:
        """Called once the result is known. May raise; then nothing must have been changed.

        ``where`` is a bool of shape (): False if the batch does not count. None: it does.
        """


class Batch(NamedTuple):
    """The statistics of training: those of the batch. ``Running`` follows them inside the kernel."""

    sink: Running | Sink | None = None
    seams: Seams = PLAIN


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
        input: shape (N, C, ...), float32, float64, bfloat16 or float16, in any memory layout
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
        a tensor of input's shape and dtype, in the channels_last memory format where the input's strides suggest it,
        else contiguous, as in PyTorch; differentiable any number of times in input, weight, bias, residual and
        sample_weight

    Raises:
        ArgumentError (a ValueError): one value a channel in training; eps not positive in training; a
            shape or name outside the above
        MismatchError (a RuntimeError): sizes or devices that do not fit together
        DtypeError (a RuntimeError): dtypes that cannot be normalized or combined
        AutogradError (a RuntimeError): running statistics that require grad, or that a function transform would have
            to write although they were not passed into it
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
    if type(input) is not Tensor and has_torch_function_variadic(
        input, running_mean, running_var, weight, bias, mask, sample_weight, residual, out
    ):
        result: Tensor = handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias, mask, sample_weight, residual, out),
            input, running_mean, running_var, weight, bias, training, momentum, eps, mask=mask,
            sample_weight=sample_weight, residual=residual, activation=activation, negative_slope=negative_slope,
            out=out,
        )  # fmt: skip
        return result
    act = activation_by_name(activation, negative_slope)
    if input.dim() == 1 and input.numel() == 0:
        # PyTorch takes an empty vector for an input without channels.
        return batch_norm(
            input.reshape(0, 0), running_mean, running_var, weight, bias, training, momentum, eps
        ).reshape(0)  # fmt: skip
    check("batch_norm", input, weight, bias, running_mean, running_var, eps, by_batch=training)
    places = EVERYWHERE
    if mask is not None or sample_weight is not None:
        places = check_places("batch_norm", input, mask, sample_weight, by_batch=training)
    if residual is not None:
        residual = check_residual("batch_norm", input, residual)
    if out is not None:
        check_out(input, (weight, bias, residual), out, training)
    statistics: Population | Batch
    if not training:
        assert running_mean is not None and running_var is not None
        statistics = Population(running_mean, running_var)
    elif running_mean is not None and running_var is not None and input.numel() > 0:
        statistics = Batch(Running(running_mean, running_var, momentum))
    else:
        statistics = Batch()
    return run(input, weight, bias, eps, statistics, act, residual, places, out)


class Normalized(NamedTuple):
    """What ``batch_norm_with_statistics`` gives."""

    output: Tensor
    running_mean: Tensor
    running_var: Tensor


def batch_norm_with_statistics(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Normalized:
    """``batch_norm`` in training, with the new running statistics as results. Nothing is written.

    For function transforms (``torch.func.grad``, ``vmap``, ``jvp`` and the like), which cannot write to tensors from
    outside. Under ``vmap`` each example is a batch of its own and gets statistics of its own. No gradient flows
    through them.

    Arguments:
        running_mean, running_var: shape (C,), as they are before the batch
        momentum: weight of the NEW batch; 1/k for the k-th batch gives the cumulative average
        others: as of ``batch_norm``

    Returns:
        ``output``, ``running_mean`` and ``running_var``; the statistics have the dtypes of the given ones

    Raises:
        as ``batch_norm``

    >>> import torch
    >>> x, weight = torch.tensor([[1.0], [3.0], [8.0]]), torch.ones(1)
    >>> def loss(weight, mean, var):
    ...     y, mean, var = batch_norm_with_statistics(x, mean, var, weight, momentum=0.5)
    ...     return y.pow(3).sum(), (mean, var)
    >>> torch.func.grad(loss, has_aux=True)(weight, torch.zeros(1), torch.ones(1))
    (tensor([4.2330]), (tensor([2.]), tensor([7.])))
    """
    act = activation_by_name(activation, negative_slope)
    name = "batch_norm_with_statistics"
    check(name, input, weight, bias, running_mean, running_var, eps, by_batch=True)
    places = EVERYWHERE
    if mask is not None or sample_weight is not None:
        places = check_places(name, input, mask, sample_weight, by_batch=True)
    if residual is not None:
        residual = check_residual(name, input, residual)
    sink = _Results(Running(running_mean, running_var, momentum))
    output = run(input, weight, bias, eps, Batch(sink), act, residual, places)
    if input.numel() == 0:
        return Normalized(output, running_mean, running_var)
    return Normalized(output, *sink.results)


class _Results:
    """The sink that writes nothing and keeps what would be written."""

    running = None

    def __init__(self, before: Running) -> None:
        self._before = before
        self.results = before.mean, before.var

    def take(self, found: Moments, where: Tensor | None = None) -> None:
        before = self._before.mean, self._before.var
        new = [value.to(r.dtype) for r, value in zip(before, self._before.after(found), strict=True)]
        if where is not None:
            new = [torch.where(where, value, r) for r, value in zip(before, new, strict=True)]
        self.results = new[0], new[1]


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: Population | Batch,
    activation: Activation,
    residual: Tensor | None = None,
    places: Places = EVERYWHERE,
    out: Tensor | None = None,
) -> Tensor:
    """``batch_norm`` on arguments that were checked."""
    if torch.compiler.is_compiling():
        seams = PLAIN if isinstance(statistics, Population) else statistics.seams
        in_sight = _is_exporting() or type(x) is not Tensor or torch._C._are_functorch_transforms_active()
        if in_sight or seams is not PLAIN:
            return _composite(x, weight, bias, eps, statistics, activation, residual, places, out)
        return _by_operators(x, weight, bias, eps, statistics, activation, residual, places, out)
    mask, sample_weight = places
    if isinstance(statistics, Population):
        mean, var = statistics
        kernel = kernels.choose(
            x, weight, bias, mean, var, residual, out, activation=activation, mask=mask, sample_weight=sample_weight
        )
        if kernel is None or (kernel.NAME == "eager" and places == EVERYWHERE and kernels.left_to_torch(x)):
            return _composite(x, weight, bias, eps, statistics, activation, residual, places, out)
        if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
            return differentiated(
                x, weight, bias, residual, None, Call(kernel, eps, activation, mask, statistics)
            )  # fmt: skip
        return _inferred(kernel, x, weight, bias, eps, mean, var, activation, residual, mask, out)

    sink, seams = statistics
    fused = sink if isinstance(sink, Running) and (seams is PLAIN or seams.is_fused) else None
    running = sink if isinstance(sink, Running) or sink is None else sink.running
    written = () if running is None else (running.mean, running.var, running.batches)
    kernel = kernels.choose(
        x, weight, bias, residual, *written, activation=activation, mask=mask, sample_weight=sample_weight,
        groups=seams.groups,
    )  # fmt: skip
    if kernel is None or (kernel.NAME == "eager" and _plainly(sink, seams, places) and kernels.left_to_torch(x)):
        return _composite(x, weight, bias, eps, statistics, activation, residual, places, out)
    found = None
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual, sample_weight):
        call = Call(kernel, eps, activation, mask, None, fused, seams)
        y = differentiated(x, weight, bias, residual, sample_weight, call)
        stats, found = call.stats, call.found
    elif seams is PLAIN:
        y, stats = kernel.forward(
            x, weight, bias, eps, residual=residual, activation=activation, mask=mask, sample_weight=sample_weight,
            running=fused,
        )  # fmt: skip
    else:
        y, stats, found, _ = phases.forward(
            kernel, x, weight, bias, eps, seams, residual=residual, activation=activation, mask=mask,
            sample_weight=sample_weight, running=fused,
        )  # fmt: skip
    if sink is not None and sink is not fused:
        if found is None:
            assert stats is not None
            found = moments_from(stats, count_of(x, mask, sample_weight, seams.groups))
        _give(sink, found)
    return y


def _inferred(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    var: Tensor,
    activation: Activation,
    residual: Tensor | None,
    mask: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    if out is not None:
        # A kernel may write before it has read all: only the very places of the input may be written over.
        if _share_memory(x, out) and (x.data_ptr(), x.stride()) != (out.data_ptr(), out.stride()):
            x = x.clone()
        if residual is not None and _share_memory(residual, out):
            residual = residual.clone()
    y = kernel.normalize(x, mean, var, eps, weight, bias, residual=residual, activation=activation, mask=mask, out=out)
    if out is not None:
        # Kernels write by address: autograd has to learn that what it may have kept is gone.
        torch.autograd.graph.increment_version(out)
    return y


def _composite(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: Population | Batch,
    activation: Activation,
    residual: Tensor | None,
    places: Places,
    out: Tensor | None,
) -> Tensor:
    """``run`` in ordinary operations."""
    sink = None if isinstance(statistics, Population) else statistics.sink
    population = statistics if isinstance(statistics, Population) else None
    seams = PLAIN if isinstance(statistics, Population) else statistics.seams
    if _plainly(sink, seams, places) and _torchs_own(x):
        y = _standard(x, weight, bias, eps, population, sink, activation, residual)
        return y if out is None else out.copy_(y)
    wide, found = composite.normalized(
        x, weight, bias, eps, population=population, residual=residual, activation=activation, mask=places.mask,
        sample_weight=places.sample_weight, reducer=seams.reducer, correct=seams.correct, groups=seams.groups,
    )  # fmt: skip
    y = wide.to(x.dtype)
    if out is not None:
        return out.copy_(y)
    if not torch._C._are_functorch_transforms_active():  # there strides are an inner matter
        y = y.contiguous(memory_format=layout.format_of(x))
    if sink is not None and found is not None:
        # Too few present values move nothing: masks were not looked at here.
        _give(sink, found.detach(), where=None if places == EVERYWHERE else enough(found.pooled()))
    return y


def _plainly(sink: Running | Sink | None, seams: Seams, places: Places) -> bool:
    """Whether PyTorch's own operator can do all that is asked for."""
    follows = sink is None or (isinstance(sink, Running) and not isinstance(sink.factor, Tensor))
    return follows and places == EVERYWHERE and seams is PLAIN


def _standard(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    population: Population | None,
    sink: Running | Sink | None,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    mean, var = population if population is not None else (None, None)
    momentum = 0.0
    if sink is not None:
        assert isinstance(sink, Running) and not isinstance(sink.factor, Tensor)
        mean, var, momentum = sink.mean, sink.var, sink.factor
        if sink.batches is not None:
            sink.batches.add_(1)
    return composite.standard(
        x, weight, bias, eps, mean=mean, var=var, training=population is None, momentum=momentum, residual=residual,
        activation=activation,
    )  # fmt: skip


def _give(sink: Running | Sink, found: Moments, *, where: Tensor | None = None) -> None:
    """Hand the moments over, those of groups as one; nothing moves where the bool ``where`` is False."""
    found = found.pooled()
    try:
        if isinstance(sink, Running):
            sink.update(found, where)
        else:
            sink.take(found, where)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active() or isinstance(error, AutogradError):
            raise
        todo = (
            "Pass the buffers into the transformed function and use torch.func.functional_call, call "
            "functional.batch_norm_with_statistics, which returns the new ones, or normalize by running statistics "
            "with eval()."
        )
        invariant = "running statistics that were passed into the function transform"
        got = "captured ones, which it cannot write"
        raise AutogradError(expected("batch_norm", invariant, got, todo)) from error


def _by_operators(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: Population | Batch,
    activation: Activation,
    residual: Tensor | None,
    places: Places,
    out: Tensor | None,
) -> Tensor:
    """``run`` where torch.compile looks on: the same by operators it can record."""
    mask, sample_weight = places
    options = (eps, activation.name, activation.negative_slope)
    if isinstance(statistics, Population):
        y: Tensor = operators.infer(x, *statistics, weight, bias, residual, mask, *options)
        return y if out is None else out.copy_(y)
    y, stats, counts = operators.train(x, weight, bias, residual, mask, sample_weight, *options)
    if statistics.sink is not None:
        found = moments_from(stats, count_of(x, mask, sample_weight))
        _give(statistics.sink, found, where=counts if places == EVERYWHERE else counts & enough(found))
    return y


def batch_moments(x: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Moments:
    """The batch's moments by the kernel that ``run`` would use, without a graph."""
    with torch.no_grad():
        kernel = None
        if not torch.compiler.is_compiling():
            kernel = kernels.choose(x, mask=mask, sample_weight=sample_weight)
        if kernel is None:
            return Moments.from_tensor(x, mask=mask, sample_weight=sample_weight)
        return kernel.moments(x, mask=mask, sample_weight=sample_weight)


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _torchs_own(x: Tensor) -> bool:
    """True where PyTorch's own operator for batch normalization is of more use than its parts."""
    return _has_to_be_recognized(x) or (not torch.compiler.is_compiling() and kernels.left_to_torch(x))


def _has_to_be_recognized(x: Tensor) -> bool:
    """True where only PyTorch's own operator for batch normalization is of use."""
    if _is_exporting() or x.layout is not torch.strided:
        return True
    if torch.compiler.is_compiling():
        return False
    # ``functionalize`` writes captured statistics through this operator, and through no other.
    level = torch._C._functorch.peek_interpreter_stack()
    functionalizing = level is not None and level.key() == torch._C._functorch.TransformType.Functionalize
    making_fx = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return functionalizing or making_fx or torch._C._get_tracing_state() is not None


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110  (any() with a generator costs a microsecond)
        if t is not None and t.requires_grad:
            return True
    return False
