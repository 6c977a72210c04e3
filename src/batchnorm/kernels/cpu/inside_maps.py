"""The second sweep of the channel-inside kernels: y from x, or dx from dy and x, tile by tile.

Chunks are taken in the reverse of the order of the first sweep, so that what it read last is still in cache.
Inside a chunk addresses rise, as the prefetchers like them to.
"""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import activated
from batchnorm.kernels.cpu.inside_rows import ABSENT, COEFFICIENTS, ahead_of, below, piece, rows_in, rows_of
from batchnorm.kernels.cpu.inside_sums import gated
from batchnorm.kernels.cpu.inside_wide import (
    CACHE_LINE,
    inlined,
    item_bytes,
    plain,
    prefetch,
    wide,
    wide_load,
    wide_splat,
    wide_store,
    wide_stream,
    wide_zero,
)
from batchnorm.kernels.cpu.scalars import slot_float
from batchnorm.kernels.cpu.vectors import vadd, vfma, vmul, vsub


class How(NamedTuple):
    """What a backward map is asked for."""

    from_y: bool  # gate dz by the sign of y, not by that of z
    dx: bool
    dresidual: bool
    training: bool  # the statistics depend on x


@inlined
def _write(base, at, value, count, stream):  # type: ignore[no-untyped-def]
    if count is not None:
        wide_store(base, at, value, count)
    elif stream:
        wide_stream(base, at, value)
    else:
        wide_store(base, at, value, None)


@plain
def clear(rows, many, columns, element):  # type: ignore[no-untyped-def]
    """Zeros in so many rows."""
    w = wide(element)
    for r in range(many):
        for j in range(0, columns, w):
            wide_store(rows.base, r * rows.step + j, wide_zero(element), min(w, columns - j))


@inlined
def streamed(block, tensor, rows, element):  # type: ignore[no-untyped-def]
    """Whether to write an output around the cache: asked for, and each of its rows starts a cache line."""
    start, step = block[tensor], rows.step * item_bytes(element)
    return block[slots.STREAM] != 0 and start % CACHE_LINE == 0 and step % CACHE_LINE == 0


@inlined
def _normalize_strip(  # type: ignore[no-untyped-def]
    x, y, residual, added, rows, ahead, coefficients, j, count, activation, slope, stream, element
):
    w = wide(element)
    hi = wide_load(coefficients, COEFFICIENTS * j, None)
    a = wide_load(coefficients, COEFFICIENTS * j + w, None)
    b = wide_load(coefficients, COEFFICIENTS * j + 2 * w, None)
    x_at, y_at, residual_at = j, j, j
    for _ in range(rows):
        prefetch(x.base, x_at + ahead * x.step)
        if not stream:
            prefetch(y.base, y_at + ahead * y.step)
        z = vfma(vsub(wide_load(x.base, x_at, count), hi), a, b)
        if added:
            prefetch(residual.base, residual_at + ahead * residual.step)
            z = vadd(z, wide_load(residual.base, residual_at, count))
            residual_at += residual.step
        _write(y.base, y_at, activated(z, activation, slope), count, stream)
        x_at += x.step
        y_at += y.step


@plain
def _normalize_tile(  # type: ignore[no-untyped-def]
    x, y, residual, added, rows, ahead, columns, coefficients, activation, slope, stream, element
):
    w = wide(element)
    whole = columns - columns % w
    for j in range(0, whole, w):
        _normalize_strip(x, y, residual, added, rows, ahead, coefficients, j, None, activation, slope, stream, element)
    if whole < columns:
        _normalize_strip(
            x, y, residual, added, rows, ahead, coefficients, whole, columns - whole, activation, slope, False, element
        )


@plain
def normalize_chunk(block, c, chunk, coefficients, element):  # type: ignore[no-untyped-def]
    """y of a chunk."""
    x, y = rows_of(block, slots.X, c, chunk, element), rows_of(block, slots.Y, c, chunk, element)
    residual, added = rows_of(block, slots.RESIDUAL, c, chunk, element), block[slots.RESIDUAL] != 0
    stream = streamed(block, slots.Y, y, element)
    activation, slope = block[slots.ACTIVATION], wide_splat(element, slot_float(block, slots.SLOPE))
    rows, rest = rows_in(c, chunk)
    r = 0
    while r < rows + min(rest, 1):
        here, columns, weight = piece(block, c, chunk, r, rows)
        if weight == ABSENT:
            clear(below(y, r), here, columns, element)
        else:
            _normalize_tile(
                below(x, r), below(y, r), below(residual, r), added, here, ahead_of(c, r, rows), columns, coefficients,
                activation, slope, stream, element,
            )  # fmt: skip
        r += here


@inlined
def _input_strip(  # type: ignore[no-untyped-def]
    dy, x, y, dx, dresidual, how, rows, ahead, weight, coefficients, j, count, activation, slope, stream, element
):
    w = wide(element)
    at = COEFFICIENTS * j
    hi, a = wide_load(coefficients, at, None), wide_load(coefficients, at + w, None)
    b = wide_load(coefficients, at + 2 * w, None)
    k1 = vmul(wide_load(coefficients, at + 3 * w, None), weight)
    k2 = vmul(wide_load(coefficients, at + 4 * w, None), weight)
    dy_at, x_at, y_at, dx_at, dresidual_at = j, j, j, j, j
    for _ in range(rows):
        prefetch(dy.base, dy_at + ahead * dy.step)
        prefetch(x.base, x_at + ahead * x.step)
        dz = wide_load(dy.base, dy_at, count)
        d = vsub(wide_load(x.base, x_at, count), hi)
        if how.from_y:
            dz = gated(dz, wide_load(y.base, y_at, count), activation, slope)
            y_at += y.step
        else:
            dz = gated(dz, vfma(d, a, b), activation, slope)
        if how.dresidual:
            _write(dresidual.base, dresidual_at, dz, count, stream)
            dresidual_at += dresidual.step
        if how.dx:
            if not stream:
                prefetch(dx.base, dx_at + ahead * dx.step)
            if how.training:
                dz = vsub(vsub(dz, k1), vmul(d, k2))
            _write(dx.base, dx_at, vmul(dz, a), count, stream)
            dx_at += dx.step
        dy_at += dy.step
        x_at += x.step


@plain
def _input_tile(  # type: ignore[no-untyped-def]
    dy, x, y, dx, dresidual, how, rows, ahead, columns, weight, coefficients, activation, slope, stream, element
):
    w = wide(element)
    whole = columns - columns % w
    for j in range(0, whole, w):
        _input_strip(
            dy, x, y, dx, dresidual, how, rows, ahead, weight, coefficients, j, None, activation, slope, stream, element
        )
    if whole < columns:
        _input_strip(
            dy, x, y, dx, dresidual, how, rows, ahead, weight, coefficients, whole, columns - whole,
            activation, slope, False, element,
        )  # fmt: skip


@plain
def input_chunk(block, c, chunk, coefficients, training, element):  # type: ignore[no-untyped-def]
    """dx and dresidual of a chunk, where wanted."""
    dy = rows_of(block, slots.DY, c, chunk, element)
    x = rows_of(block, slots.X if block[slots.X] != 0 else slots.DY, c, chunk, element)
    y = rows_of(block, slots.Y, c, chunk, element)
    dx = rows_of(block, slots.DX, c, chunk, element)
    dresidual = rows_of(block, slots.DRESIDUAL, c, chunk, element)
    how = How(block[slots.Y] != 0, block[slots.DX] != 0, block[slots.DRESIDUAL] != 0, training)
    stream = True
    if how.dx:
        stream = streamed(block, slots.DX, dx, element)
    if how.dresidual:
        stream = stream and streamed(block, slots.DRESIDUAL, dresidual, element)
    activation, slope = block[slots.ACTIVATION], wide_splat(element, slot_float(block, slots.SLOPE))
    rows, rest = rows_in(c, chunk)
    r = 0
    while r < rows + min(rest, 1):
        here, columns, weight = piece(block, c, chunk, r, rows)
        if weight == ABSENT:
            if how.dx:
                clear(below(dx, r), here, columns, element)
            if how.dresidual:
                clear(below(dresidual, r), here, columns, element)
        else:
            _input_tile(
                below(dy, r), below(x, r), below(y, r), below(dx, r), below(dresidual, r), how, here,
                ahead_of(c, r, rows), columns, wide_splat(element, weight), coefficients,
                activation, slope, stream, element,
            )  # fmt: skip
        r += here
