"""Channel inside, few rows with many channels: a block of columns at a time, all of a pass, in the first-level caches.

The sweeps of ``inside`` keep some 70 bytes a channel between them. For rows of a million channels that is more traffic
than the tensor itself; here it stays in a workspace of a thread. No thread waits for another, and the arithmetic of a
channel does not depend on the block it lies in, so that any number of threads gives the same bits.

FORWARD and BACKWARD, without mask and weights; the other kernels of such tensors are those of ``inside``.
"""

from __future__ import annotations

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import counting, pasted, tell_far
from batchnorm.kernels.cpu.compiling import kernels, my_share
from batchnorm.kernels.cpu.inside_channels import (
    centre,
    finish_moments,
    inverse,
    read_statistics,
    update_running,
    write_coefficients,
    write_gradient_coefficients,
    write_parameter_gradients,
    write_statistics,
)
from batchnorm.kernels.cpu.inside_maps import How, _input_strip, _normalize_strip, streamed
from batchnorm.kernels.cpu.inside_rows import COEFFICIENTS, Cut, Rows, share
from batchnorm.kernels.cpu.inside_sums import _gradient_strip, _moments_strip
from batchnorm.kernels.cpu.inside_wide import (
    fence,
    inlined,
    moved,
    plain,
    wide,
    wide_any_lost,
    wide_as_stored,
    wide_finite,
    wide_load,
    wide_splat,
    wide_store,
    wide_store_float64,
    wide_zero,
)
from batchnorm.kernels.cpu.scalars import FLOAT64, pointer, slot_float
from batchnorm.kernels.cpu.vectors import vfma, vmul, vsub, workspace

ROWS = 32
"""Rows at most: their sums are one short chain."""

CHANNELS = 4096
"""Channels at least."""

BLOCK = 512
"""Columns of a block: a whole number of wide vectors of any element."""

SUMS, TOTALS, FACTORS = 3 * BLOCK, 2 * BLOCK, COEFFICIENTS * BLOCK
"""Lengths of the workspaces."""


@counting
def serves(rows, channels):  # type: ignore[no-untyped-def]
    """Whether a tensor of such rows is for these kernels."""
    return rows <= ROWS and channels >= CHANNELS


@inlined
def _rows(block, tensor, element):  # type: ignore[no-untyped-def]
    """The rows of a tensor, named by its slot; INNER is 1."""
    return Rows(pointer(block[tensor], element), block[slots.X_OUTER + 2 * (tensor - slots.X)])


@inlined
def _find_shift(x, rows, sums, j, count, element):  # type: ignore[no-untyped-def]
    """The shift of a wide vector of columns: as inside_sums.find_shift, over the first four rows."""
    shift = wide_load(x.base, j, count)
    for r in range(1, min(rows, 4)):
        d = vsub(wide_load(x.base, r * x.step + j, count), shift)
        shift = vfma(d, wide_splat(element, 1.0 / (r + 1)), shift)
    w = wide(element)
    wide_store(sums, 3 * j, wide_as_stored(x.base, wide_finite(shift)), None)
    wide_store(sums, 3 * j + w, wide_zero(element), None)
    wide_store(sums, 3 * j + 2 * w, wide_zero(element), None)


@inlined
def _totals(sums, totals, j, element):  # type: ignore[no-untyped-def]
    w = wide(element)
    wide_store_float64(totals, j, wide_load(sums, 3 * j + w, None))
    wide_store_float64(totals, BLOCK + j, wide_load(sums, 3 * j + 2 * w, None))


@plain
def _measure_block(x, rows, first, last, sums, totals, element):  # type: ignore[no-untyped-def]
    w = wide(element)
    one = wide_splat(element, 1.0)
    for j in range(first, last - w + 1, w):
        _find_shift(x, rows, sums, j, None, element)
        _moments_strip(x, rows, 0, one, sums, j, None, element)
        _totals(sums, totals, j, element)
    j = last - (last - first) % w
    if j < last:
        _find_shift(x, rows, sums, j, last - j, element)
        _moments_strip(x, rows, 0, one, sums, j, last - j, element)
        _totals(sums, totals, j, element)


@plain
def _normalize_block(block, rows, first, last, coefficients, element):  # type: ignore[no-untyped-def]
    x, y, residual = (
        _rows(block, slots.X, element),
        _rows(block, slots.Y, element),
        _rows(block, slots.RESIDUAL, element),
    )
    added, stream = block[slots.RESIDUAL] != 0, streamed(block, slots.Y, y, element)
    activation, slope = block[slots.ACTIVATION], wide_splat(element, slot_float(block, slots.SLOPE))
    w = wide(element)
    for j in range(first, last - w + 1, w):
        _normalize_strip(x, y, residual, added, rows, 0, coefficients, j, None, activation, slope, stream, element)
    j = last - (last - first) % w
    if j < last:
        _normalize_strip(x, y, residual, added, rows, 0, coefficients, j, last - j, activation, slope, False, element)


@plain
def _forward_block(block, c, first, last, sums, totals, coefficients, element):  # type: ignore[no-untyped-def]
    rows, count = block[slots.OUTER], float64(block[slots.OUTER])
    _measure_block(_rows(block, slots.X, element), rows, first, last, sums, totals, element)
    w = wide(FLOAT64)
    for j in range(first, last, w):
        n = min(w, last - j)
        mean, m2 = finish_moments(block, c, totals, sums, j, n, count, element)
        write_statistics(block, j, n, count, mean, m2, False)
        update_running(block, j, n, count, mean, m2)
        write_coefficients(block, coefficients, j, n, mean, vmul(m2, wide_splat(FLOAT64, inverse(count))), element)
    _normalize_block(block, rows, first, last, coefficients, element)


@inlined
def _cut(rows):  # type: ignore[no-untyped-def]
    """What finish_moments asks of a cut: where the second of two arrays of totals begins."""
    return Cut(True, 1, rows, 1, 0, BLOCK, BLOCK, rows, 1, 1, rows, 0)


@pasted
def _forward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    c = _cut(block[slots.OUTER])
    own = workspace(element, SUMS), workspace(FLOAT64, TOTALS), workspace(element, FACTORS)
    begin, end = share((channels + BLOCK - 1) // BLOCK, thread, threads)
    for b in range(begin, end):
        first = b * BLOCK
        # Pointers moved back, so that a channel's number is its place.
        sums, totals = moved(own[0], -3 * first), moved(own[1], -first)
        coefficients = moved(own[2], -COEFFICIENTS * first)
        _forward_block(block, c, first, min(channels, first + BLOCK), sums, totals, coefficients, element)
    if block[slots.STREAM] != 0:
        fence()


@plain
def _add_up_block(block, rows, first, last, sums, totals, coefficients, element):  # type: ignore[no-untyped-def]
    dy, x, y = _rows(block, slots.DY, element), _rows(block, slots.X, element), _rows(block, slots.Y, element)
    from_y, activation = block[slots.Y] != 0, block[slots.ACTIVATION]
    slope = wide_splat(element, slot_float(block, slots.SLOPE))
    w = wide(element)
    for j in range(first, last, w):
        wide_store(sums, 3 * j + w, wide_zero(element), None)
        wide_store(sums, 3 * j + 2 * w, wide_zero(element), None)
        if j + w <= last:
            _gradient_strip(dy, x, y, from_y, rows, 0, coefficients, sums, j, None, activation, slope, element)
        else:
            _gradient_strip(dy, x, y, from_y, rows, 0, coefficients, sums, j, last - j, activation, slope, element)
        _totals(sums, totals, j, element)


@plain
def _input_block(block, rows, first, last, coefficients, element):  # type: ignore[no-untyped-def]
    dy, x, y = _rows(block, slots.DY, element), _rows(block, slots.X, element), _rows(block, slots.Y, element)
    dx, dresidual = _rows(block, slots.DX, element), _rows(block, slots.DRESIDUAL, element)
    how = How(block[slots.Y] != 0, block[slots.DX] != 0, block[slots.DRESIDUAL] != 0, True)
    stream = True
    if how.dx:
        stream = streamed(block, slots.DX, dx, element)
    if how.dresidual:
        stream = stream and streamed(block, slots.DRESIDUAL, dresidual, element)
    activation, slope = block[slots.ACTIVATION], wide_splat(element, slot_float(block, slots.SLOPE))
    one = wide_splat(element, 1.0)
    w = wide(element)
    for j in range(first, last - w + 1, w):
        _input_strip(
            dy, x, y, dx, dresidual, how, rows, 0, one, coefficients, j, None, activation, slope, stream, element
        )
    j = last - (last - first) % w
    if j < last:
        _input_strip(
            dy, x, y, dx, dresidual, how, rows, 0, one, coefficients, j, last - j, activation, slope, False, element
        )


@plain
def _backward_block(block, first, last, sums, totals, coefficients, element):  # type: ignore[no-untyped-def]
    rows, count = block[slots.OUTER], float64(block[slots.OUTER])
    w = wide(FLOAT64)
    for j in range(first, last, w):
        n = min(w, last - j)
        mean, var = read_statistics(block, j, n)
        write_coefficients(block, coefficients, j, n, mean, var, element)
    _add_up_block(block, rows, first, last, sums, totals, coefficients, element)
    for j in range(first, last, w):
        n = min(w, last - j)
        low, invstd = centre(block, j, n, element)
        sum_dz, sum_dz_d = wide_load(totals, j, None), wide_load(totals, BLOCK + j, None)
        if wide_any_lost(sum_dz, invstd) or wide_any_lost(sum_dz_d, invstd):
            tell_far(block)
        sum_dz_xhat = vmul(vsub(sum_dz_d, vmul(low, sum_dz)), invstd)
        write_parameter_gradients(block, j, n, sum_dz, sum_dz_xhat)
        write_gradient_coefficients(coefficients, j, n, sum_dz, sum_dz_xhat, count, low, invstd, element)
    if block[slots.DX] != 0 or block[slots.DRESIDUAL] != 0:
        _input_block(block, rows, first, last, coefficients, element)


@pasted
def _backward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    own = workspace(element, SUMS), workspace(FLOAT64, TOTALS), workspace(element, FACTORS)
    begin, end = share((channels + BLOCK - 1) // BLOCK, thread, threads)
    for b in range(begin, end):
        first = b * BLOCK
        sums, totals = moved(own[0], -3 * first), moved(own[1], -first)
        coefficients = moved(own[2], -COEFFICIENTS * first)
        _backward_block(block, first, min(channels, first + BLOCK), sums, totals, coefficients, element)
    if block[slots.STREAM] != 0:
        fence()


FORWARD = kernels("inside_few_forward", _forward)
BACKWARD = kernels("inside_few_backward", _backward)
