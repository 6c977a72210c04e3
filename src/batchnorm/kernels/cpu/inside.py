"""Channel inside: kernels for tensors whose channels lie side by side (channels_last, (N, C), (N, L, C) transposed).

Two sweeps over memory, with the arithmetic of the channels between them: sums of chunks of rows
(``inside_sums``), their totals and coefficients (``inside_channels``), the result (``inside_maps``). How rows are
cut: ``inside_rows``.

In between all threads wait for each other. Where kernels run in PyTorch's OpenMP pool they do so at its barrier,
so that each operation is one launch; elsewhere PHASE cuts the operation in two launches (see ``phases``).
"""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
from numba import types

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import pasted, tell_far
from batchnorm.kernels.cpu.compiling import kernels, my_share
from batchnorm.kernels.cpu.inside_channels import (
    add_up,
    centre,
    finish_moments,
    inverse,
    read_channels,
    read_statistics,
    spread,
    update_running,
    write_channels,
    write_coefficients,
    write_gradient_coefficients,
    write_parameter_gradients,
    write_statistics,
)
from batchnorm.kernels.cpu.inside_maps import input_chunk, normalize_chunk
from batchnorm.kernels.cpu.inside_rows import (
    at_channels,
    at_partial,
    at_sums,
    at_totals,
    cut_of,
    scratch,
    share,
)
from batchnorm.kernels.cpu.inside_sums import find_shift, gradient_chunk, moments_chunk
from batchnorm.kernels.cpu.inside_wide import (
    fence,
    plain,
    real_pointer,
    wide,
    wide_any_lost,
    wide_load,
    wide_splat,
)
from batchnorm.kernels.cpu.scalars import FLOAT64, pointer, slot_float
from batchnorm.kernels.cpu.threads import openmp
from batchnorm.kernels.cpu.vectors import vmul, vsub

__all__ = [
    "BACKWARD",
    "BACKWARD_EVAL",
    "BACKWARD_INPUT",
    "BACKWARD_SUMS",
    "FORWARD",
    "MOMENTS",
    "NORMALIZE",
    "phases",
    "scratch",
]


def _find_barrier() -> bool:
    library = openmp()
    barrier = None if library is None else getattr(library, "GOMP_barrier", None)
    if barrier is None:
        # Linked but never called: any address will do.
        barrier = ctypes.pythonapi.PyErr_CheckSignals
    llvm.add_symbol("batchnorm_GOMP_barrier", ctypes.cast(barrier, ctypes.c_void_p).value)
    return library is not None and hasattr(library, "GOMP_barrier")


_has_barrier = _find_barrier()
_barrier = types.ExternalFunction("batchnorm_GOMP_barrier", types.void())


def phases(threads: int) -> tuple[int, ...]:
    """The values of PHASE with which to launch, in order, the kernels that have two sweeps."""
    return (0,) if threads == 1 or _has_barrier else (1, 2)


@plain
def _wait(block, threads):  # type: ignore[no-untyped-def]
    if threads > 1 and block[slots.PHASE] == 0:
        _barrier()


@plain
def _my_columns(block, c, thread, threads):  # type: ignore[no-untyped-def]
    """The columns whose totals this thread adds up: a share, or in a launch of its own all of them."""
    if block[slots.PHASE] != 0:
        return 0, c.padded
    if c.fold > 1:
        return 0, c.padded if thread == 0 else 0
    w = wide(FLOAT64)
    first, last = share(c.padded // w, thread, threads)
    return first * w, last * w


@plain
def _coefficients(block, c, element):  # type: ignore[no-untyped-def]
    """(of the columns, of the channels): two places where rows are folded, one otherwise."""
    columns = block[slots.SCRATCH]
    channels = columns + 8 * at_channels(c.padded) if c.fold > 1 else columns
    return real_pointer(columns, element), real_pointer(channels, element)


@plain
def _sums(block, c, thread, element):  # type: ignore[no-untyped-def]
    return real_pointer(block[slots.SCRATCH] + 8 * at_sums(c.padded, c.chunks, thread), element)


@plain
def _totals(block, c, thread):  # type: ignore[no-untyped-def]
    return pointer(block[slots.SCRATCH] + 8 * at_totals(c.padded, c.chunks, thread), FLOAT64)


@plain
def _partial(block, c, chunk):  # type: ignore[no-untyped-def]
    return pointer(block[slots.SCRATCH] + 8 * at_partial(c.padded, chunk), FLOAT64)


@pasted
def _measure(block, c, thread, threads, moments, element):  # type: ignore[no-untyped-def]
    """Both halves of the statistics; with ``moments`` only they are wanted, else the coefficients of normalization."""
    channels, phase = block[slots.CHANNELS], block[slots.PHASE]
    if phase != 2:
        sums = _sums(block, c, thread, element)
        find_shift(block, c, sums, element)
        first, last = share(c.chunks, thread, threads)
        for chunk in range(first, last):
            moments_chunk(block, c, chunk, sums, _partial(block, c, chunk), element)
    _wait(block, threads)
    if phase != 1:
        first, last = _my_columns(block, c, thread, threads)
        totals = _totals(block, c, thread)
        columns, of_channels = _coefficients(block, c, element)
        count = add_up(c, block[slots.SCRATCH], totals, channels, first, last)
        w = wide(FLOAT64)
        for j in range(first, min(last, channels), w):
            n = min(w, channels - j)
            mean, m2 = finish_moments(block, c, totals, _sums(block, c, 0, element), j, n, count, element)
            if phase == 0 or thread == 0:
                var = write_statistics(block, j, n, count, mean, m2, moments)
                update_running(block, j, n, count, mean, m2)
            if not moments:
                var = vmul(m2, wide_splat(FLOAT64, inverse(count)))
                write_coefficients(block, of_channels, j, n, mean, var, element)
        if c.fold > 1 and last > 0 and not moments:
            spread(c, channels, of_channels, columns, element)
    _wait(block, threads)


@pasted
def _given_coefficients(block, c, element):  # type: ignore[no-untyped-def]
    """Coefficients from the statistics in the block. Each thread writes them all, the same values, before it reads."""
    channels, w = block[slots.CHANNELS], wide(FLOAT64)
    columns, of_channels = _coefficients(block, c, element)
    for j in range(0, channels, w):
        n = min(w, channels - j)
        mean, var = read_statistics(block, j, n)
        write_coefficients(block, of_channels, j, n, mean, var, element)
    if c.fold > 1:
        spread(c, channels, of_channels, columns, element)


@pasted
def _apply(block, c, thread, threads, element):  # type: ignore[no-untyped-def]
    columns, _ = _coefficients(block, c, element)
    first, last = share(c.chunks, thread, threads)
    for chunk in range(last - 1, first - 1, -1):
        normalize_chunk(block, c, chunk, columns, element)
    if block[slots.STREAM] != 0:
        fence()


@pasted
def _moments(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    _measure(block, cut_of(block, element), thread, threads, True, element)


@pasted
def _normalize(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    _given_coefficients(block, c, element)
    _apply(block, c, thread, threads, element)


@pasted
def _forward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    _measure(block, c, thread, threads, False, element)
    if block[slots.PHASE] != 1:
        _apply(block, c, thread, threads, element)


MOMENTS = kernels("inside_moments", _moments)
NORMALIZE = kernels("inside_normalize", _normalize)
FORWARD = kernels("inside_forward", _forward)


@pasted
def _add_gradients(block, c, thread, threads, element):  # type: ignore[no-untyped-def]
    """Partial sums of dz and dz * (x - hi), after the coefficients of the gate."""
    columns, _ = _coefficients(block, c, element)
    _given_coefficients(block, c, element)
    sums = _sums(block, c, thread, element)
    first, last = share(c.chunks, thread, threads)
    for chunk in range(first, last):
        gradient_chunk(block, c, chunk, columns, sums, _partial(block, c, chunk), element)


@pasted
def _total_gradients(block, c, thread, threads, element):  # type: ignore[no-untyped-def]
    """From partial sums to SUMS, dweight, dbias and the coefficients of dx."""
    channels, w = block[slots.CHANNELS], wide(FLOAT64)
    first, last = _my_columns(block, c, thread, threads)
    totals = _totals(block, c, thread)
    columns, of_channels = _coefficients(block, c, element)
    count = add_up(c, block[slots.SCRATCH], totals, channels, first, last)
    for j in range(first, min(last, channels), w):
        n = min(w, channels - j)
        low, invstd = centre(block, j, n, element)
        sum_dz = wide_load(totals, j, None)
        sum_dz_d = wide_load(totals, c.padded + j, None)
        if wide_any_lost(sum_dz, invstd) or wide_any_lost(sum_dz_d, invstd):
            tell_far(block)
        sum_dz_xhat = vmul(vsub(sum_dz_d, vmul(low, sum_dz)), invstd)
        if block[slots.PHASE] == 0 or thread == 0:
            write_parameter_gradients(block, j, n, sum_dz, sum_dz_xhat)
            if block[slots.SUMS] != 0:
                write_channels(block[slots.SUMS], 1, j, sum_dz, n)
                write_channels(block[slots.SUMS], 1, channels + j, sum_dz_xhat, n)
        write_gradient_coefficients(of_channels, j, n, sum_dz, sum_dz_xhat, count, low, invstd, element)
    if c.fold > 1 and last > 0:
        spread(c, channels, of_channels, columns, element)


@pasted
def _apply_gradients(block, c, thread, threads, training, element):  # type: ignore[no-untyped-def]
    if block[slots.DX] != 0 or block[slots.DRESIDUAL] != 0:
        columns, _ = _coefficients(block, c, element)
        first, last = share(c.chunks, thread, threads)
        for chunk in range(last - 1, first - 1, -1):
            input_chunk(block, c, chunk, columns, training, element)
        if block[slots.STREAM] != 0:
            fence()


@pasted
def _backward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    if block[slots.PHASE] != 2:
        _add_gradients(block, c, thread, threads, element)
    _wait(block, threads)
    if block[slots.PHASE] != 1:
        _total_gradients(block, c, thread, threads, element)
        _wait(block, threads)
        _apply_gradients(block, c, thread, threads, True, element)


@pasted
def _backward_eval(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    measured = block[slots.DWEIGHT] != 0 or block[slots.DBIAS] != 0
    if block[slots.PHASE] != 2:
        if measured:
            _add_gradients(block, c, thread, threads, element)
        else:
            _given_coefficients(block, c, element)
        _apply_gradients(block, c, thread, threads, False, element)
    if measured:
        _wait(block, threads)
        if block[slots.PHASE] != 1:
            _total_gradients(block, c, thread, threads, element)


@pasted
def _backward_sums(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    if block[slots.PHASE] != 2:
        _add_gradients(block, c, thread, threads, element)
    _wait(block, threads)
    if block[slots.PHASE] != 1:
        _total_gradients(block, c, thread, threads, element)


@pasted
def _backward_input(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    c = cut_of(block, element)
    channels, w = block[slots.CHANNELS], wide(FLOAT64)
    columns, of_channels = _coefficients(block, c, element)
    count = slot_float(block, slots.COUNT)
    for j in range(0, channels, w):
        n = min(w, channels - j)
        mean, var = read_statistics(block, j, n)
        low, invstd = write_coefficients(block, of_channels, j, n, mean, var, element)
        sum_dz = read_channels(block[slots.SUMS], 1, j, n)
        sum_dz_xhat = read_channels(block[slots.SUMS], 1, channels + j, n)
        write_gradient_coefficients(of_channels, j, n, sum_dz, sum_dz_xhat, count, low, invstd, element)
    if c.fold > 1:
        spread(c, channels, of_channels, columns, element)
    _apply_gradients(block, c, thread, threads, True, element)


BACKWARD = kernels("inside_backward", _backward)
BACKWARD_EVAL = kernels("inside_backward_eval", _backward_eval)
BACKWARD_SUMS = kernels("inside_backward_sums", _backward_sums)
BACKWARD_INPUT = kernels("inside_backward_input", _backward_input)
