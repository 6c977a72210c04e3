"""The kernel's functions on a batch in groups (virtual batches), each in one launch for all groups of one size.

``contract.Kernel`` documents what each function does. Compared with the whole batch, only the statistics are more:
the tensors are read and written as often.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import layout
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import Groups, Needs, Running, group_counts
from batchnorm.kernels.cpu import block, fan, plan, pooling, wide_range
from batchnorm.kernels.cpu.compiling import Kernel
from batchnorm.kernels.cpu.plan import Plan
from batchnorm.kernels.cpu.threads import launch, threads_for
from batchnorm.moments import Moments

CPU = torch.device("cpu")

UNEVEN = 8
"""Groups for each thread from which on it does not matter that one thread may have one group more."""

_pack_word = struct.Struct("q").pack
_LENGTH = block.FAR + 1


def why_not(x: Tensor, groups: Groups) -> str | None:
    """None where the groups lie in memory as the batch does, or that they do not."""
    whole = layout.format_of(x)
    for run, part in groups.pieces(x.shape[0]):
        if layout.format_of(x[run.start : run.start + part.size]) is not whole:
            return "groups of another memory format than the batch's"
    return None


def moments(x: Tensor, groups: Groups, mask: Tensor | None, sample_weight: Tensor | None) -> Moments:
    masked = mask is not None or sample_weight is not None
    whole = plan.find("MOMENTS", x, masked=masked)
    x = whole.readable("x", x)
    raw = torch.empty((groups.number, 3, whole.channels), dtype=torch.float64, device=CPU)
    operands = [_samples(block.X, x), _channels(block.STATS, raw)]
    _run("MOMENTS", whole, x, groups, operands, mask=mask, sample_weight=sample_weight)
    return Moments(raw[:, 0], raw[:, 1], raw[:, 2])


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Groups,
    *,
    residual: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    weight, bias, parameter = _parameters(weight, bias)
    stats = torch.stack((mean.to(torch.float64), var.to(torch.float64)))
    masked = mask is not None
    whole = plan.find("NORMALIZE", x, None, None, residual, ("y",), activation, parameter, masked=masked)
    given = x
    x = whole.readable("x", x)
    residual = None if residual is None else whole.readable("residual", residual)
    y = whole.output(x)
    operands = [
        _samples(block.X, x), _samples(block.Y, y), _samples(block.RESIDUAL, residual),
        _channels(block.WEIGHT, weight), _channels(block.BIAS, bias), _channels(block.MEAN, stats[0]),
        _channels(block.VAR, stats[1]),
    ]  # fmt: skip
    far = _run(
        "NORMALIZE", whole, x, groups, operands, residual=residual, written=("y",), activation=activation,
        parameter=parameter, mask=mask, eps=eps,
    )  # fmt: skip
    if far:
        y = wide_range.normalize(
            given, mean, var, eps, weight, bias, residual=residual, activation=activation, mask=mask, groups=groups
        )
    return y if out is None else out.copy_(y)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Groups,
    *,
    residual: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    weight, bias, parameter = _parameters(weight, bias)
    masked = mask is not None or sample_weight is not None
    whole = plan.find("FORWARD", x, None, None, residual, ("y",), activation, parameter, masked=masked)
    x = whole.readable("x", x)
    residual = None if residual is None else whole.readable("residual", residual)
    y = whole.output(x)
    raw = torch.empty((groups.number, 2, whole.channels), dtype=torch.float64, device=CPU)
    operands = [
        _samples(block.X, x), _samples(block.Y, y), _samples(block.RESIDUAL, residual),
        _channels(block.WEIGHT, weight), _channels(block.BIAS, bias), _channels(block.STATS, raw),
        _channels(block.MEAN, raw[:, 0]), _channels(block.VAR, raw[:, 1]),
    ]  # fmt: skip
    far = _run(
        "FORWARD", whole, x, groups, operands, residual=residual, written=("y",), activation=activation,
        parameter=parameter, mask=mask, sample_weight=sample_weight, eps=eps,
    )  # fmt: skip
    stats = raw.transpose(0, 1)
    if running is not None:
        counts = group_counts(x, mask, sample_weight, groups)
        if pooling.follow(running, raw, counts):
            changed(running.mean, running.var)
        else:
            running.update(Moments(counts, stats[0], stats[1] * counts).pooled())
    if far:
        y.copy_(
            wide_range.normalize(
                x, stats[0], stats[1], eps, weight, bias, residual=residual, activation=activation, mask=mask,
                groups=groups,
            )
        )  # fmt: skip
    return y, stats


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Groups,
    *,
    y: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weight, bias, parameter = _parameters(weight, bias)
    stats = torch.stack((mean.to(torch.float64), var.to(torch.float64)))
    y = None if activation.name == "identity" else y
    masked = mask is not None
    whole = plan.find("BACKWARD_SUMS", x, dy, y, None, (), activation, parameter, masked=masked)
    x, dy, y = _readable(whole, x, dy, y)
    raw = torch.empty((groups.number, 2, whole.channels), dtype=torch.float64, device=CPU)
    operands = [
        *_of_backward(x, dy, y, weight, bias, stats), _channels(block.SUMS, raw),
    ]  # fmt: skip
    far = _run(
        "BACKWARD_SUMS", whole, x, groups, operands, dy=dy, y=y, activation=activation, parameter=parameter, mask=mask,
        eps=eps,
    )  # fmt: skip
    if far:
        return wide_range.backward_sums(
            dy, x, mean, var, eps, weight, bias, y=y, activation=activation, mask=mask, groups=groups
        )
    return raw[:, 0], raw[:, 1]


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: tuple[Tensor, Tensor],
    count: Tensor | float,
    groups: Groups,
    *,
    y: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    weight, bias, parameter = _parameters(weight, bias)
    stats = torch.stack((mean.to(torch.float64), var.to(torch.float64)))
    y = None if activation.name == "identity" else y
    written = tuple(name for name, needed in (("dx", needs.x), ("dresidual", needs.residual)) if needed)
    masked = mask is not None or sample_weight is not None
    whole = plan.find("BACKWARD_INPUT", x, dy, y, None, written, activation, parameter, masked=masked)
    x, dy, y = _readable(whole, x, dy, y)
    dx = whole.output(x) if needs.x else None
    dresidual = whole.output(x) if needs.residual else None
    # Divided here, since counts may differ from channel to channel: a COUNT of 1 then does the rest.
    both = torch.stack([t.to(torch.float64) / count for t in sums], 1)
    operands = [
        *_of_backward(x, dy, y, weight, bias, stats), _samples(block.DX, dx), _samples(block.DRESIDUAL, dresidual),
        _channels(block.SUMS, both),
    ]  # fmt: skip
    far = _run(
        "BACKWARD_INPUT", whole, x, groups, operands, dy=dy, y=y, written=written, activation=activation,
        parameter=parameter, mask=mask, sample_weight=sample_weight, eps=eps, count=1.0,
    )  # fmt: skip
    if far:
        return wide_range.backward_input(
            dy, x, mean, var, eps, weight, bias, sums, count, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs, groups=groups,
        )  # fmt: skip
    return dx, dresidual


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Groups,
    *,
    y: Tensor | None,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    weight, bias, parameter = _parameters(weight, bias)
    passed_on = dy if needs.residual and activation.name == "identity" and mask is None else None
    y = None if activation.name == "identity" else y
    written = tuple(
        name for name, needed in (("dx", needs.x), ("dresidual", needs.residual and passed_on is None)) if needed
    )
    masked = mask is not None or sample_weight is not None
    whole = plan.find("BACKWARD", x, dy, y, None, written, activation, parameter, masked=masked)
    x, dy, y = _readable(whole, x, dy, y)
    stats = stats.to(torch.float64)
    if stats.stride(2) != 1:
        stats = stats.contiguous()
    dx = whole.output(x) if needs.x else None
    dresidual = whole.output(x) if "dresidual" in written else None
    shape = (groups.number, whole.channels)
    dweight = weight.new_empty(shape) if needs.weight and weight is not None else None
    dbias = bias.new_empty(shape) if needs.bias and bias is not None else None
    sums = torch.empty((groups.number, 2, whole.channels), dtype=torch.float64, device=CPU)
    operands = [
        *_of_backward(x, dy, y, weight, bias, stats), _samples(block.DX, dx), _samples(block.DRESIDUAL, dresidual),
        _channels(block.SUMS, sums), _channels(block.DWEIGHT, dweight), _channels(block.DBIAS, dbias),
        ]  # fmt: skip
    far = _run(
        "BACKWARD", whole, x, groups, operands, dy=dy, y=y, written=written, activation=activation, parameter=parameter,
        mask=mask, sample_weight=sample_weight, eps=eps,
    )  # fmt: skip
    if far:
        return wide_range.backward(
            dy, x, stats, eps, weight, bias, training=True, y=y, activation=activation, mask=mask,
            sample_weight=sample_weight, needs=needs, groups=groups,
        )  # fmt: skip
    total_weight, total_bias = (
        None if t is None else t.sum(0, dtype=torch.float64).to(dtype)
        for t, dtype in zip((dweight, dbias), dtypes, strict=True)
    )
    return dx, total_weight, total_bias, passed_on if passed_on is not None else dresidual


def changed(mean: Tensor, var: Tensor) -> None:
    """Tell autograd that they were written, by address, so that a graph that keeps them raises as it should."""
    try:  # noqa: SIM105  (a context manager costs as much again)
        torch._C._increment_version((mean, var))
    except RuntimeError:  # inference tensors have no version, and no graph keeps them
        pass


class _Operand(NamedTuple):
    """What a slot of the argument block points to, and the bytes from one sample and from one group to the next."""

    slot: int
    address: int = 0
    of_sample: int = 0
    of_group: int = 0


def _samples(slot: int, t: Tensor | None) -> _Operand:
    """A tensor of x's size, or one of its first dimension."""
    return _Operand(slot) if t is None else _Operand(slot, t.data_ptr(), t.stride(0) * t.element_size())


def _channels(slot: int, t: Tensor | None) -> _Operand:
    """(channels,), or one tensor for each group in the first dimension."""
    if t is None:
        return _Operand(slot)
    return _Operand(slot, t.data_ptr(), 0, t.stride(0) * t.element_size() if t.dim() > 1 else 0)


def _of_backward(
    x: Tensor, dy: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> list[_Operand]:
    return [
        _samples(block.X, x), _samples(block.DY, dy), _samples(block.Y, y), _channels(block.WEIGHT, weight),
        _channels(block.BIAS, bias), _channels(block.MEAN, stats[0]), _channels(block.VAR, stats[1]),
    ]  # fmt: skip


def _readable(whole: Plan, x: Tensor, dy: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return whole.readable("x", x), whole.readable("dy", dy), None if y is None else whole.readable("y", y)


def _parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight and bias in one dtype of 32 bits or more, in which the groups' gradients can be added up; and one of them.

    Each is (channels,) or (groups, channels), without gaps.
    """
    given = [t for t in (weight, bias) if t is not None]
    if not given:
        return None, None, None
    dtype = torch.float32
    for t in given:
        dtype = torch.promote_types(dtype, t.dtype)
    weight, bias = (None if t is None else t.to(dtype).contiguous() for t in (weight, bias))
    return weight, bias, weight if weight is not None else bias


def _run(
    operation: str,
    whole: Plan,
    x: Tensor,
    groups: Groups,
    operands: list[_Operand],
    *,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    written: tuple[str, ...] = (),
    activation: Activation = IDENTITY,
    parameter: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    eps: float = 0.0,
    count: float = 0.0,
) -> bool:
    """Launch, and return whether there were numbers too large for the vectors' arithmetic (``block``, slot FAR)."""
    # Held here until the kernels have returned.
    positions, weights = whole.positions(mask, torch.uint8), whole.positions(sample_weight, torch.float64)
    for slot, t in ((block.MASK, positions), (block.SAMPLE_WEIGHT, weights)):
        if t is not None:
            operands.append(_samples(slot, t.view(x.shape[0], -1)))
    threads = threads_for(x.numel())
    there = [operand for operand in operands if operand.address]
    key = (
        operation, groups, x.shape, x.stride(), x.dtype, written, activation.name, threads, count,
        None if parameter is None else parameter.dtype, *((slot, *steps) for slot, _, *steps in there),
    )  # fmt: skip
    fans = _fans.get(key)
    if fans is None:
        if len(_fans) >= plan.KEPT:
            _fans.clear()
        masked = positions is not None or weights is not None
        given = (dy, y, residual)
        fans = _fans[key] = _make(operation, x, groups, there, given, written, activation, parameter, masked, count)
    told, told_address = plan.told()
    for each in fans:
        what = [0] * (block.EPS - block.HOW_SLOTS)
        for (slot, address, _, _), offset in zip(there, each.offsets, strict=True):
            what[slot - block.HOW_SLOTS] = address + offset
        scratch = None
        if each.scratch:
            scratch = torch.empty(each.scratch, dtype=torch.float64, device=CPU)
            what[block.SCRATCH - block.HOW_SLOTS] = scratch.data_ptr()
        packed = block.pack_what(*what, eps, 0.0, activation.negative_slope, each.values) + told_address
        for kernel, how in each.launches:
            if each.number == 1:
                launch(kernel, how + packed, each.threads)
                continue
            base = array("q", how + packed)
            room = array("q", bytes(8 * _LENGTH * each.threads))
            fanned = fan.pack(
                -1, each.threads, kernel.address or kernel.compile(), each.number, int(not each.of_thread_each),
                _LENGTH, base.buffer_info()[0], each.steps.buffer_info()[0], room.buffer_info()[0], block.SCRATCH,
                each.of_thread,
            )  # fmt: skip
            launch(fan.EACH, fanned, each.threads)
    return told.value != 0


class _Fan(NamedTuple):
    """The launches for groups of one size, decided once."""

    launches: tuple[tuple[Kernel, bytes], ...]  # each with the first half of its argument block
    number: int  # of groups
    threads: int
    of_thread_each: bool  # whether a thread takes whole groups; else all threads work on each
    offsets: tuple[int, ...]  # bytes from an operand's address to what the first of these groups reads
    steps: array[int]  # what is added to each slot from one group to the next
    scratch: int  # float64 values of working memory in all
    of_thread: int  # bytes from a thread's working memory to the next one's
    values: float  # COUNT


_fans: dict[Hashable, tuple[_Fan, ...]] = {}


def _make(
    operation: str,
    x: Tensor,
    groups: Groups,
    operands: list[_Operand],
    given: tuple[Tensor | None, ...],
    written: tuple[str, ...],
    activation: Activation,
    parameter: Tensor | None,
    masked: bool,
    count: float,
) -> tuple[_Fan, ...]:
    threads = threads_for(x.numel())
    stream = _pack_word(int(x.numel() * x.element_size() >= plan.STREAM_FROM))
    first, fans = 0, []
    for run, (size, number) in groups.pieces(x.shape[0]):
        alone = number > 1 and (number % threads == 0 or number >= UNEVEN * threads)
        one = slice(run.start, run.start + size)
        dy, y, residual = (None if t is None else t[one] for t in given)
        each = plan.find(
            operation, x[one], dy, y, residual, written, activation, parameter, masked=masked,
            threads=1 if alone else threads,
        )  # fmt: skip
        steps = array("q", bytes(8 * _LENGTH))
        for slot, _, of_sample, of_group in operands:
            steps[slot] = size * of_sample + of_group
        if not alone:
            steps[block.SCRATCH] = 8 * each.scratch
        at = 8 * block.STREAM
        values = count
        launches = tuple((kernel, how[:at] + stream + how[at + 8 :]) for kernel, how in each.launches)
        if len(launches) > 1 and not count:
            # Kernels in phases do not count for themselves.
            values = x.numel() / (x.shape[0] * x.shape[1]) * size
        fans.append(
            _Fan(
                launches, number, threads if alone else each.threads, alone,
                tuple(run.start * of_sample + first * of_group for _, _, of_sample, of_group in operands), steps,
                each.scratch * (threads if alone else number), 8 * each.scratch if alone else 0, values,
            )
        )  # fmt: skip
        first += number
    return tuple(fans)
