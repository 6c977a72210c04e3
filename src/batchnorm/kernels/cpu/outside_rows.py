"""Channel outside, long rows: one channel at a time, a chunk of its rows at a time.

A chunk is what one float32 accumulation spans: at most CHUNK elements, spread over 4 vectors. Where chunks are cut
depends on the shape alone, and partial results are merged in their order, so that any number of threads gives the same
bits. Statistics are taken about a shift near the chunk's mean (the mean of its first elements), in one sweep: with the
mean over m of the n values the error is at worst n/m times that of two sweeps (n/m <= 64 here), whatever the data.
"""

from __future__ import annotations

import math

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import activated, counting, gated, inlined, m2_of, plain
from batchnorm.kernels.cpu.scalars import as_stored, load, real
from batchnorm.kernels.cpu.vectors import (
    address_of,
    item_bytes,
    lanes,
    prefetch_four,
    vadd,
    vfirst,
    vfma,
    vload,
    vload_some,
    vmul,
    vput,
    vsplat,
    vstore,
    vstream_two,
    vsub,
    vsum,
    vtake,
    vzeros,
)

CHUNK = 8192

GROUP = 16
"""After how many steps of 4 vectors the running sums of the statistics are added to those of the chunk. Squares of
values on a coarse grid (16 bits, or float32 far from zero) end in few bit patterns, and most are rounded down: a long
chain of them loses digits that random rounding would keep. In a short one they are nearly exact.
"""


@counting
def chunk_rows(inner):  # type: ignore[no-untyped-def]
    """How many whole rows a chunk holds; 1 where a row is cut into segments."""
    return max(1, CHUNK // max(1, inner))


@counting
def chunk_length(inner):  # type: ignore[no-untyped-def]
    """How a row is cut: as evenly as whole cache lines allow, into segments of at most CHUNK elements."""
    segments = max(1, (inner + CHUNK - 1) // CHUNK)
    return inner if segments == 1 else ((inner + segments - 1) // segments + 63) // 64 * 64


@counting
def chunk_count(outer, inner):  # type: ignore[no-untyped-def]
    """How many chunks a channel has."""
    rows, length = chunk_rows(inner), chunk_length(inner)
    return (outer + rows - 1) // rows * ((inner + length - 1) // max(1, length))


@inlined
def chunk_place(chunk, outer, inner):  # type: ignore[no-untyped-def]
    """(first row, how many rows, first element in the row, how many elements) of a chunk."""
    rows, length = chunk_rows(inner), chunk_length(inner)
    segments = (inner + length - 1) // length
    row, at = chunk // segments * rows, chunk % segments * length
    return row, min(rows, outer - row), at, min(length, inner - at)


@plain
def shift_of(x, start, length, element):  # type: ignore[no-untyped-def]
    """The mean of the first elements; exactly their value where they are all the same; 0 where it is not finite.

    Rounded to the tensor's dtype, so that the differences of 16-bit values are exact: rounding the same few values
    always the same way would add up.
    """
    step = lanes(element)
    first = load(x, start)
    origin = vsplat(element, first)
    total = vsplat(element, 0.0)
    sample = min(length, 8 * step)
    i = 0
    while i + step <= sample:
        total = vadd(total, vsub(vload(x, start + i), origin))
        i += step
    if i == 0:
        total = vfirst(vsub(vload_some(x, start, sample), origin), sample)
        i = sample
    shift = as_stored(element, real(element, float64(first) + vsum(total) / i))
    return shift if math.isfinite(shift) else real(element, 0.0)


@plain
def chunk_moments(x, start, stride, rows, length, ahead, element):  # type: ignore[no-untyped-def]
    """(mean, m2) of rows that begin at `start`, `stride` apart."""
    step = lanes(element)
    shift = shift_of(x, start, length, element)
    k = vsplat(element, shift)
    zero = vsplat(element, 0.0)
    all_total, all_squares = zero, zero
    for row in range(rows):
        at = start + row * stride
        end = at + length
        while at < end:
            s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
            stop = min(end, at + GROUP * 4 * step)
            while at + 4 * step <= stop:
                prefetch_four(x, at + ahead, step, 0, element)
                d0 = vsub(vload(x, at), k)
                d1 = vsub(vload(x, at + step), k)
                d2 = vsub(vload(x, at + 2 * step), k)
                d3 = vsub(vload(x, at + 3 * step), k)
                s0 = vadd(s0, d0)
                s1 = vadd(s1, d1)
                s2 = vadd(s2, d2)
                s3 = vadd(s3, d3)
                q0 = vfma(d0, d0, q0)
                q1 = vfma(d1, d1, q1)
                q2 = vfma(d2, d2, q2)
                q3 = vfma(d3, d3, q3)
                at += 4 * step
            while at + step <= stop:
                d0 = vsub(vload(x, at), k)
                s0 = vadd(s0, d0)
                q0 = vfma(d0, d0, q0)
                at += step
            if at < stop:
                d1 = vfirst(vsub(vload_some(x, at, stop - at), k), stop - at)
                s1 = vadd(s1, d1)
                q1 = vfma(d1, d1, q1)
                at = stop
            all_total = vadd(all_total, vadd(vadd(s0, s1), vadd(s2, s3)))
            all_squares = vadd(all_squares, vadd(vadd(q0, q1), vadd(q2, q3)))
    total, squares = vsum(all_total), vsum(all_squares)
    count = float64(rows * length)
    return float64(shift) + total / count, m2_of(total, squares, count)


@plain
def chunk_sums(  # type: ignore[no-untyped-def]
    dy, at_dy, dy_stride, x, at_x, x_stride, y, at_y, y_stride, rows, length, hi, a, b, activation, slope, element
):
    """(sum of dz, sum of dz * (x - hi)) of rows; dz is gated by y where at_y >= 0, else by (x - hi) * a + b."""
    step = lanes(element)
    hi_, a_, b_, slope_ = vsplat(element, hi), vsplat(element, a), vsplat(element, b), vsplat(element, slope)
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = vsplat(element, 0.0)
    for row in range(rows):
        p, q, r = at_dy + row * dy_stride, at_x + row * x_stride, at_y + row * y_stride
        i = 0
        while i + 4 * step <= length:
            prefetch_four(dy, p + i + dy_stride, step, 0, element)
            prefetch_four(x, q + i + x_stride, step, 0, element)
            g0, g1 = vload(dy, p + i), vload(dy, p + i + step)
            g2, g3 = vload(dy, p + i + 2 * step), vload(dy, p + i + 3 * step)
            d0, d1 = vsub(vload(x, q + i), hi_), vsub(vload(x, q + i + step), hi_)
            d2, d3 = vsub(vload(x, q + i + 2 * step), hi_), vsub(vload(x, q + i + 3 * step), hi_)
            if activation != slots.IDENTITY:
                if at_y >= 0:
                    g0 = gated(g0, vload(y, r + i), activation, slope_)
                    g1 = gated(g1, vload(y, r + i + step), activation, slope_)
                    g2 = gated(g2, vload(y, r + i + 2 * step), activation, slope_)
                    g3 = gated(g3, vload(y, r + i + 3 * step), activation, slope_)
                else:
                    g0 = gated(g0, vfma(d0, a_, b_), activation, slope_)
                    g1 = gated(g1, vfma(d1, a_, b_), activation, slope_)
                    g2 = gated(g2, vfma(d2, a_, b_), activation, slope_)
                    g3 = gated(g3, vfma(d3, a_, b_), activation, slope_)
            s0, s1, s2, s3 = vadd(s0, g0), vadd(s1, g1), vadd(s2, g2), vadd(s3, g3)
            t0, t1, t2, t3 = vfma(g0, d0, t0), vfma(g1, d1, t1), vfma(g2, d2, t2), vfma(g3, d3, t3)
            i += 4 * step
        while i < length:
            size = min(step, length - i)
            g0, d0 = vtake(dy, p + i, size, step), vfirst(vsub(vtake(x, q + i, size, step), hi_), size)
            if activation != slots.IDENTITY:
                if at_y >= 0:
                    g0 = gated(g0, vtake(y, r + i, size, step), activation, slope_)
                else:
                    g0 = gated(g0, vfma(d0, a_, b_), activation, slope_)
            s0, t0 = vadd(s0, g0), vfma(g0, d0, t0)
            i += step
    return vsum(vadd(vadd(s0, s1), vadd(s2, s3))), vsum(vadd(vadd(t0, t1), vadd(t2, t3)))


@inlined
def emit_four(y, at, step, v0, v1, v2, v3, stream):  # type: ignore[no-untyped-def]
    """Store four vectors that follow one another, around the cache if `stream`."""
    if stream:
        vstream_two(y, at, v0, v1)
        vstream_two(y, at + 2 * step, v2, v3)
    else:
        vstore(y, at, v0)
        vstore(y, at + step, v1)
        vstore(y, at + 2 * step, v2)
        vstore(y, at + 3 * step, v3)


@inlined
def before_line(y, at, length, stream, element):  # type: ignore[no-untyped-def]
    """How many elements to store one vector at a time before whole cache lines can be streamed; 0 if not `stream`."""
    return min(length, -address_of(y, at) % 64 // item_bytes(element)) if stream else 0


@plain
def normalize_few(x, at, y, to, residual, res, i, end, hi, a, b, activation, slope, element):  # type: ignore[no-untyped-def]
    """normalize_row of the elements i to end, some of a vector at a time."""
    step = lanes(element)
    hi_, a_, b_, slope_ = vsplat(element, hi), vsplat(element, a), vsplat(element, b), vsplat(element, slope)
    while i < end:
        size = min(step, end - i)
        z = vfma(vsub(vtake(x, at + i, size, step), hi_), a_, b_)
        if res >= 0:
            z = vadd(z, vtake(residual, res + i, size, step))
        vput(y, to + i, activated(z, activation, slope_), size, step)
        i += size


@plain
def normalize_row(x, at, y, to, ahead, residual, res, length, hi, a, b, activation, slope, stream, element):  # type: ignore[no-untyped-def]
    """y[to + i] = activation((x[at + i] - hi) * a + b [+ residual[res + i] where res >= 0])."""
    step = lanes(element)
    hi_, a_, b_, slope_ = vsplat(element, hi), vsplat(element, a), vsplat(element, b), vsplat(element, slope)
    i = before_line(y, to, length, stream, element)
    if i > 0:
        normalize_few(x, at, y, to, residual, res, 0, i, hi, a, b, activation, slope, element)
    while i + 4 * step <= length:
        if not stream:
            prefetch_four(y, to + ahead + i, step, 1, element)
        z0 = vfma(vsub(vload(x, at + i), hi_), a_, b_)
        z1 = vfma(vsub(vload(x, at + i + step), hi_), a_, b_)
        z2 = vfma(vsub(vload(x, at + i + 2 * step), hi_), a_, b_)
        z3 = vfma(vsub(vload(x, at + i + 3 * step), hi_), a_, b_)
        if res >= 0:
            z0 = vadd(z0, vload(residual, res + i))
            z1 = vadd(z1, vload(residual, res + i + step))
            z2 = vadd(z2, vload(residual, res + i + 2 * step))
            z3 = vadd(z3, vload(residual, res + i + 3 * step))
        if activation != slots.IDENTITY:
            z0 = activated(z0, activation, slope_)
            z1 = activated(z1, activation, slope_)
            z2 = activated(z2, activation, slope_)
            z3 = activated(z3, activation, slope_)
        emit_four(y, to + i, step, z0, z1, z2, z3, stream)
        i += 4 * step
    normalize_few(x, at, y, to, residual, res, i, length, hi, a, b, activation, slope, element)


@plain
def gradient_few(  # type: ignore[no-untyped-def]
    dy, at_dy, x, at_x, y, at_y, dx, to, dres, res, i, end, hi, a, b, by_dz, by_x, constant, centred, activation, slope,
    element,
):  # fmt: skip
    """gradient_row of the elements i to end, some of a vector at a time."""
    step = lanes(element)
    hi_, a_, b_, slope_ = vsplat(element, hi), vsplat(element, a), vsplat(element, b), vsplat(element, slope)
    e_, f_, h_ = vsplat(element, by_dz), vsplat(element, by_x), vsplat(element, constant)
    while i < end:
        size = min(step, end - i)
        g = vtake(dy, at_dy + i, size, step)
        d = vzeros(g)
        if centred or (activation != slots.IDENTITY and at_y < 0):
            d = vsub(vtake(x, at_x + i, size, step), hi_)
        if activation != slots.IDENTITY:
            z = vtake(y, at_y + i, size, step) if at_y >= 0 else vfma(d, a_, b_)
            g = gated(g, z, activation, slope_)
        if res >= 0:
            vput(dres, res + i, g, size, step)
        if to >= 0:
            vput(dx, to + i, vfma(e_, g, vfma(f_, d, h_)) if centred else vmul(e_, g), size, step)
        i += size


@plain
def gradient_row(  # type: ignore[no-untyped-def]
    dy, at_dy, x, at_x, y, at_y, dx, to, ahead, dres, res, length, hi, a, b, by_dz, by_x, constant, centred, activation,
    slope, stream, element,
):  # fmt: skip
    """dx = by_dz * dz + by_x * (x - hi) + constant where `to` >= 0, and dz itself into dres where `res` >= 0.

    dz is gated by y where at_y >= 0, else by x. x is not read unless `centred` (by_x counts) or it gates dz.
    """
    step = lanes(element)
    i = 0
    if centred and to >= 0:  # all but some frozen layers
        hi_, a_, b_, slope_ = vsplat(element, hi), vsplat(element, a), vsplat(element, b), vsplat(element, slope)
        e_, f_, h_ = vsplat(element, by_dz), vsplat(element, by_x), vsplat(element, constant)
        i = before_line(dx, to, length, stream, element)
        stream_too = stream and i == before_line(dres, res, length, stream, element)
        if i > 0:
            gradient_few(
                dy, at_dy, x, at_x, y, at_y, dx, to, dres, res, 0, i, hi, a, b, by_dz, by_x, constant, centred,
                activation, slope, element,
            )  # fmt: skip
        while i + 4 * step <= length:
            if not stream:
                prefetch_four(dx, to + ahead + i, step, 1, element)
            g0, g1 = vload(dy, at_dy + i), vload(dy, at_dy + i + step)
            g2, g3 = vload(dy, at_dy + i + 2 * step), vload(dy, at_dy + i + 3 * step)
            d0, d1 = vsub(vload(x, at_x + i), hi_), vsub(vload(x, at_x + i + step), hi_)
            d2, d3 = vsub(vload(x, at_x + i + 2 * step), hi_), vsub(vload(x, at_x + i + 3 * step), hi_)
            if activation != slots.IDENTITY:
                if at_y >= 0:
                    g0 = gated(g0, vload(y, at_y + i), activation, slope_)
                    g1 = gated(g1, vload(y, at_y + i + step), activation, slope_)
                    g2 = gated(g2, vload(y, at_y + i + 2 * step), activation, slope_)
                    g3 = gated(g3, vload(y, at_y + i + 3 * step), activation, slope_)
                else:
                    g0 = gated(g0, vfma(d0, a_, b_), activation, slope_)
                    g1 = gated(g1, vfma(d1, a_, b_), activation, slope_)
                    g2 = gated(g2, vfma(d2, a_, b_), activation, slope_)
                    g3 = gated(g3, vfma(d3, a_, b_), activation, slope_)
            if res >= 0:
                emit_four(dres, res + i, step, g0, g1, g2, g3, stream_too)
            v0, v1 = vfma(e_, g0, vfma(f_, d0, h_)), vfma(e_, g1, vfma(f_, d1, h_))
            v2, v3 = vfma(e_, g2, vfma(f_, d2, h_)), vfma(e_, g3, vfma(f_, d3, h_))
            emit_four(dx, to + i, step, v0, v1, v2, v3, stream)
            i += 4 * step
    gradient_few(
        dy, at_dy, x, at_x, y, at_y, dx, to, dres, res, i, length, hi, a, b, by_dz, by_x, constant, centred,
        activation, slope, element,
    )  # fmt: skip
