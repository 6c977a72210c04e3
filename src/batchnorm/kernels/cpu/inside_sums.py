"""The first sweep of the channel-inside kernels: two sums per column over the rows of a chunk.

Forward: sums of x - shift and of its square, about a shift per channel that is the mean of a few rows spread
over the tensor, so that the second sum keeps its digits. Backward: sums of dz and of dz * (x - hi).

Rows are added up in groups of 16, the groups one after the other, both in the computing type; after some 64 groups
the running sums are added to those of the chunk, which are float64. In so short chains rounding errors come to about
1e-7 of the sum. Where rows differ in weight, a group is as short as a single row, and a chunk is several chains.
"""

from __future__ import annotations

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.inside_rows import ABSENT, COEFFICIENTS, below, piece, rows_in, rows_of, weight_of
from batchnorm.kernels.cpu.inside_wide import (
    inlined,
    plain,
    prefetch,
    wide,
    wide_add_float64,
    wide_as_stored,
    wide_finite,
    wide_keep_unless_negative,
    wide_load,
    wide_splat,
    wide_store,
    wide_store_float64,
    wide_where_above,
    wide_zero,
)
from batchnorm.kernels.cpu.scalars import load, slot_float, store
from batchnorm.kernels.cpu.vectors import vadd, vfirst, vfma, vmul, vsub

SAMPLES = 8  # rows whose mean is the shift
GROUP = 16  # rows whose sum is rounded apart
CHAIN = 64  # groups after which the running sums go to float64 (or a tile's more)


@inlined
def at_column(column, w, arrays):  # type: ignore[no-untyped-def]
    """Where a column stands in the first of so many arrays that take turns, wide vector by wide vector."""
    return (column - column % w) * arrays + column % w


@inlined
def place_of(block, c, x, r):  # type: ignore[no-untyped-def]
    """Elements from the first row to the r-th."""
    return r // c.inner * block[slots.X_OUTER] + r % c.inner * x.step


@plain
def measured_row(block, c, r, total):  # type: ignore[no-untyped-def]
    """The first row from the r-th on, and round again, that has a weight in the statistics; -1 where none has."""
    if block[slots.MASK] == 0 and block[slots.SAMPLE_WEIGHT] == 0:
        return r if r < total else -1
    for i in range(total):
        place = r + i if r + i < total else r + i - total
        if weight_of(block, place) > 0.0:
            return place
    return -1


@plain
def find_shift(block, c, sums, element):  # type: ignore[no-untyped-def]
    """The shift of each column, before its sums: the mean of some rows, or 0 where that is not finite.

    A channel of equal values must have exactly that value, and so variance 0: hence a mean that moves by
    differences. It is rounded to the tensor's dtype: the differences of 16-bit values are then exact, and rounding
    the same few values always the same way would add up.
    """
    x = rows_of(block, slots.X, c, 0, element)
    channels, w = block[slots.CHANNELS], wide(element)
    total = c.outer * c.inner
    first = measured_row(block, c, 0, total)
    for j in range(0, channels, w):
        count = min(w, channels - j)
        shift = wide_zero(element)
        if first >= 0:
            shift = wide_load(x.base, place_of(block, c, x, first) + j, count)
        for sample in range(1, SAMPLES if first >= 0 else 0):
            r = measured_row(block, c, total * sample // SAMPLES, total)
            d = vsub(wide_load(x.base, place_of(block, c, x, r) + j, count), shift)
            shift = vfma(d, wide_splat(element, 1.0 / (sample + 1)), shift)
        wide_store(sums, 3 * j, wide_as_stored(x.base, wide_finite(shift)), None)
    for column in range(channels, c.columns):
        store(sums, at_column(column, w, 3), load(sums, at_column(column - channels, w, 3)))


@plain
def clear_sums(c, sums, element):  # type: ignore[no-untyped-def]
    """Start a chunk."""
    w = wide(element)
    for j in range(0, c.padded, w):
        wide_store(sums, 3 * j + w, wide_zero(element), None)
        wide_store(sums, 3 * j + 2 * w, wide_zero(element), None)


@plain
def keep_sums(c, sums, partial, kept, element):  # type: ignore[no-untyped-def]
    """Write the running sums to those of the chunk; ``kept``: add them to what was written before."""
    w = wide(element)
    for j in range(0, c.padded, w):
        one, two = wide_load(sums, 3 * j + w, None), wide_load(sums, 3 * j + 2 * w, None)
        if kept:
            wide_add_float64(partial, j, one)
            wide_add_float64(partial, c.padded + j, two)
        else:
            wide_store_float64(partial, j, one)
            wide_store_float64(partial, c.padded + j, two)


@plain
def new_chain(c, sums, partial, groups, kept, element):  # type: ignore[no-untyped-def]
    """(groups in the running sums, whether any were kept): where they are too many they are kept, and none are left."""
    if groups < CHAIN:
        return groups, kept
    keep_sums(c, sums, partial, kept, element)
    clear_sums(c, sums, element)
    return 0, True


@plain
def groups_in(rows):  # type: ignore[no-untyped-def]
    """How many additions to the running sums so many rows make."""
    return (rows + GROUP - 1) // GROUP


@inlined
def _moments_strip(x, rows, ahead, scale, sums, j, count, element):  # type: ignore[no-untyped-def]
    """One wide vector of columns down the rows of a tile; ``scale``: their weight."""
    w = wide(element)
    shift = wide_load(sums, 3 * j, None)
    all_total, all_squares = wide_load(sums, 3 * j + w, None), wide_load(sums, 3 * j + 2 * w, None)
    at = j
    for first in range(0, rows, GROUP):
        total, squares = wide_zero(element), wide_zero(element)
        for _ in range(min(GROUP, rows - first)):
            prefetch(x.base, at + ahead * x.step)
            d = vsub(wide_load(x.base, at, count), shift)
            if count is not None:
                d = vfirst(d, count)
            total = vadd(total, d)
            squares = vfma(d, d, squares)
            at += x.step
        all_total, all_squares = vfma(total, scale, all_total), vfma(squares, scale, all_squares)
    wide_store(sums, 3 * j + w, all_total, None)
    wide_store(sums, 3 * j + 2 * w, all_squares, None)


@plain
def _moments_tile(x, rows, ahead, columns, scale, sums, element):  # type: ignore[no-untyped-def]
    w = wide(element)
    whole = columns - columns % w
    for j in range(0, whole, w):
        _moments_strip(x, rows, ahead, scale, sums, j, None, element)
    if whole < columns:
        _moments_strip(x, rows, ahead, scale, sums, whole, columns - whole, element)


@plain
def moments_chunk(block, c, chunk, sums, partial, element):  # type: ignore[no-untyped-def]
    """The partial sums of x - shift and of its square."""
    x = rows_of(block, slots.X, c, chunk, element)
    rows, rest = rows_in(c, chunk)
    channels, count = block[slots.CHANNELS], 0.0
    clear_sums(c, sums, element)
    r, groups, kept = 0, 0, False
    while r < rows + min(rest, 1):
        here, columns, weight = piece(block, c, chunk, r, rows)
        if weight > 0.0:
            groups, kept = new_chain(c, sums, partial, groups, kept, element)
            scale = wide_splat(element, weight)
            _moments_tile(below(x, r), here, c.ahead, columns, scale, sums, element)
            count += here * (columns // channels) * weight
            groups += groups_in(here)
        r += here
    keep_sums(c, sums, partial, kept, element)
    store(partial, 2 * c.padded, count)


@inlined
def gated(dy, z, activation, slope):  # type: ignore[no-untyped-def]
    """dz of z = what the activation was given (or of its output). As PyTorch: relu lets dy through where z is NaN."""
    if activation == slots.RELU:
        dy = wide_keep_unless_negative(z, dy)
    elif activation == slots.LEAKY_RELU:
        dy = wide_where_above(z, dy, vmul(dy, slope))
    return dy


@inlined
def _gradient_strip(  # type: ignore[no-untyped-def]
    dy, x, y, from_y, rows, ahead, coefficients, sums, j, count, activation, slope, element
):
    w = wide(element)
    hi = wide_load(coefficients, COEFFICIENTS * j, None)
    a = wide_load(coefficients, COEFFICIENTS * j + w, None)
    b = wide_load(coefficients, COEFFICIENTS * j + 2 * w, None)
    all_total, all_products = wide_load(sums, 3 * j + w, None), wide_load(sums, 3 * j + 2 * w, None)
    dy_at, x_at, y_at = j, j, j
    for first in range(0, rows, GROUP):
        total, products = wide_zero(element), wide_zero(element)
        for _ in range(min(GROUP, rows - first)):
            prefetch(dy.base, dy_at + ahead * dy.step)
            prefetch(x.base, x_at + ahead * x.step)
            dz = wide_load(dy.base, dy_at, count)
            d = vsub(wide_load(x.base, x_at, count), hi)
            if from_y:
                prefetch(y.base, y_at + ahead * y.step)
                dz = gated(dz, wide_load(y.base, y_at, count), activation, slope)
                y_at += y.step
            else:
                dz = gated(dz, vfma(d, a, b), activation, slope)
            total = vadd(total, dz)
            products = vfma(dz, d, products)
            dy_at += dy.step
            x_at += x.step
        all_total, all_products = vadd(all_total, total), vadd(all_products, products)
    wide_store(sums, 3 * j + w, all_total, None)
    wide_store(sums, 3 * j + 2 * w, all_products, None)


@plain
def _gradient_tile(  # type: ignore[no-untyped-def]
    dy, x, y, from_y, rows, ahead, columns, coefficients, sums, activation, slope, element
):
    w = wide(element)
    whole = columns - columns % w
    for j in range(0, whole, w):
        _gradient_strip(dy, x, y, from_y, rows, ahead, coefficients, sums, j, None, activation, slope, element)
    if whole < columns:
        _gradient_strip(
            dy, x, y, from_y, rows, ahead, coefficients, sums, whole, columns - whole, activation, slope, element
        )


@plain
def gradient_chunk(block, c, chunk, coefficients, sums, partial, element):  # type: ignore[no-untyped-def]
    """The partial sums of dz and of dz * (x - hi)."""
    dy, x = rows_of(block, slots.DY, c, chunk, element), rows_of(block, slots.X, c, chunk, element)
    y, from_y = rows_of(block, slots.Y, c, chunk, element), block[slots.Y] != 0
    activation, slope = block[slots.ACTIVATION], wide_splat(element, slot_float(block, slots.SLOPE))
    rows, rest = rows_in(c, chunk)
    channels, count = block[slots.CHANNELS], 0.0
    clear_sums(c, sums, element)
    r, groups, kept = 0, 0, False
    while r < rows + min(rest, 1):
        here, columns, weight = piece(block, c, chunk, r, rows)
        if weight != ABSENT:
            groups, kept = new_chain(c, sums, partial, groups, kept, element)
            _gradient_tile(
                below(dy, r), below(x, r), below(y, r), from_y, here, c.ahead, columns, coefficients, sums,
                activation, slope, element,
            )  # fmt: skip
            count += here * (columns // channels) * weight
            groups += groups_in(here)
        r += here
    keep_sums(c, sums, partial, kept, element)
    store(partial, 2 * c.padded, count)
