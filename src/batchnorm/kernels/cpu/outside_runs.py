"""Channel outside, short rows: a run of channels at a time, added up vertically over the batch.

In memory the rows of neighbouring channels follow one another, so a run of channels is one long row in each sample.
Sums are kept for each place of the run and folded by channel at the end of a chunk of samples; per-channel values are
spread out to all places of a channel first. No vector is wasted at the end of a short row, and memory is read in
stretches of kilobytes. A channel's sums do not depend on which run it lies in.
"""

from __future__ import annotations

import math

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import activated, counting, gated, inlined, plain
from batchnorm.kernels.cpu.scalars import as_stored, load, real
from batchnorm.kernels.cpu.vectors import (
    item_bytes,
    lanes,
    new_line,
    prefetch,
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
    workspace,
)

PLACES = 1600
"""How many places a run has at most, of elements of 16 bits; 1024 for longer ones: what keeps the workspaces in the
first-level cache. (1568 places are whole cache lines of rows of 49 or 196 elements.)
"""

SLACK = PLACES + 32
"""Length of a workspace: the last channel is spread out in whole vectors."""

LONGEST = 256
"""Rows up to this length are taken in runs."""

CHUNK = 8192

GROUP = 64
"""After how many samples the running sums of the statistics are added to those of the chunk: see outside_rows."""


@counting
def samples_in_chunk(inner):  # type: ignore[no-untyped-def]
    """How many samples one accumulation spans."""
    return min(1024, max(32, CHUNK // inner))


@plain
def spread(places, channel, inner, value, element):  # type: ignore[no-untyped-def]
    """Write the value to all places of the run's channel-th channel, in order of channels."""
    step = lanes(element)
    start = channel * inner
    vector = vsplat(element, value)
    for i in range(0, inner, step):
        vstore(places, start + i, vector)


@plain
def fold(places, channel, inner, element):  # type: ignore[no-untyped-def]
    """The sum over all places of a channel: in as many lanes as a vector has, and these in float64."""
    step = lanes(element)
    at, end = channel * inner, channel * inner + inner
    total = vsplat(element, 0.0)
    while at + step <= end:
        total = vadd(total, vload(places, at))
        at += step
    if at < end:
        total = vadd(total, vload_some(places, at, end - at))
    return vsum(total)


@plain
def shift_of_channel(x, start, stride, samples, inner, element):  # type: ignore[no-untyped-def]
    """The mean of a channel over its first 4, 2 or 1 samples; exactly their value where they are all the same;
    0 where it is not finite. Rounded to the tensor's dtype: see outside_rows.
    """
    step = lanes(element)
    taken = 4 if samples >= 4 else 2 if samples >= 2 else 1
    first = load(x, start)
    origin = vsplat(element, first * taken)
    total = vsplat(element, 0.0)
    for i in range(0, inner, step):
        size = min(step, inner - i)
        v = vtake(x, start + i, size, step)
        if taken > 1:
            v = vadd(v, vtake(x, start + stride + i, size, step))
        if taken > 2:
            w = vtake(x, start + 2 * stride + i, size, step)
            v = vadd(v, vadd(w, vtake(x, start + 3 * stride + i, size, step)))
        v = vsub(v, origin)
        total = vadd(total, v if size == step else vfirst(v, size))
    shift = as_stored(element, real(element, float64(first) + vsum(total) / (taken * inner)))
    return shift if math.isfinite(shift) else real(element, 0.0)


@inlined
def clear(a, b, width, element):  # type: ignore[no-untyped-def]
    """Zero in all places."""
    zero = vsplat(element, 0.0)
    for i in range(0, width, lanes(element)):
        vstore(a, i, zero)
        vstore(b, i, zero)


@inlined
def add(a, b, width, element):  # type: ignore[no-untyped-def]
    """a += b in all places."""
    for i in range(0, width, lanes(element)):
        vstore(a, i, vadd(vload(a, i), vload(b, i)))


@inlined
def copy(a, b, width, element):  # type: ignore[no-untyped-def]
    """a = b in all places."""
    for i in range(0, width, lanes(element)):
        vstore(a, i, vload(b, i))


@inlined
def measure_four(x, at, stride, shifts, sums, squares, i, size, step, element):  # type: ignore[no-untyped-def]
    """Four samples of one vector of places into the sums of d and d * d."""
    k = vload(shifts, i)
    if new_line(i, step, element):
        for ahead in range(4, 8):
            prefetch(x, at + ahead * stride, 0)
    d0, d1 = vsub(vtake(x, at, size, step), k), vsub(vtake(x, at + stride, size, step), k)
    d2, d3 = vsub(vtake(x, at + 2 * stride, size, step), k), vsub(vtake(x, at + 3 * stride, size, step), k)
    vstore(sums, i, vadd(vload(sums, i), vadd(vadd(d0, d1), vadd(d2, d3))))
    q = vfma(d3, d3, vfma(d2, d2, vfma(d1, d1, vmul(d0, d0))))
    vstore(squares, i, vadd(vload(squares, i), q))


@plain
def moments_of_run(x, start, stride, samples, width, shifts, sums, squares, element):  # type: ignore[no-untyped-def]
    """sums, squares = sum of d and of d * d over the samples, d = x - shift, for each place of the run."""
    step = lanes(element)
    whole = width // step * step
    all_sums, all_squares = workspace(element, SLACK), workspace(element, SLACK)
    kept = False
    clear(sums, squares, width, element)
    n = 0
    while n + 4 <= samples:
        at = start + n * stride
        for i in range(0, whole, step):
            measure_four(x, at + i, stride, shifts, sums, squares, i, step, step, element)
        if whole < width:
            measure_four(x, at + whole, stride, shifts, sums, squares, whole, width - whole, step, element)
        n += 4
        if n % GROUP == 0 and n < samples:
            if kept:
                add(all_sums, sums, width, element)
                add(all_squares, squares, width, element)
            else:
                copy(all_sums, sums, width, element)
                copy(all_squares, squares, width, element)
            clear(sums, squares, width, element)
            kept = True
    while n < samples:
        at = start + n * stride
        for i in range(0, width, step):
            d0 = vsub(vtake(x, at + i, min(step, width - i), step), vload(shifts, i))
            vstore(sums, i, vadd(vload(sums, i), d0))
            vstore(squares, i, vfma(d0, d0, vload(squares, i)))
        n += 1
    if kept:
        add(sums, all_sums, width, element)
        add(squares, all_squares, width, element)


@inlined
def emit_two(y, at, stride, step, v, w, stream, element):  # type: ignore[no-untyped-def]
    """Store two vectors that follow one another, around the cache if `stream`; else ask for the place two rows up."""
    if stream:
        vstream_two(y, at, v, w)
    else:
        prefetch(y, at - 2 * stride, 1)
        if step * item_bytes(element) >= 64:
            prefetch(y, at - 2 * stride + step, 1)
        vstore(y, at, v)
        vstore(y, at + step, w)


@plain
def normalize_run(  # type: ignore[no-untyped-def]
    x, at, x_stride, y, to, y_stride, residual, res, res_stride, samples, width, hi, a, b, activation, slope, stream,
    element,
):  # fmt: skip
    """y = activation((x - hi) * a + b [+ residual, where res >= 0]) for a run of channels in all samples, backwards."""
    step = lanes(element)
    pairs = width // (2 * step) * (2 * step)
    slope_ = vsplat(element, slope)
    n = samples
    while n > 0:
        here = 2 if n >= 2 else 1
        n -= here
        done = 0
        if here == 2:  # two vectors of two samples
            p, r, s = at + n * x_stride, to + n * y_stride, res + n * res_stride
            for i in range(0, pairs, 2 * step):
                j = i + step
                hi_i, a_i, b_i, hi_j, a_j, b_j = (
                    vload(hi, i),
                    vload(a, i),
                    vload(b, i),
                    vload(hi, j),
                    vload(a, j),
                    vload(b, j),
                )
                z0, z1 = vfma(vsub(vload(x, p + i), hi_i), a_i, b_i), vfma(vsub(vload(x, p + j), hi_j), a_j, b_j)
                z2 = vfma(vsub(vload(x, p + x_stride + i), hi_i), a_i, b_i)
                z3 = vfma(vsub(vload(x, p + x_stride + j), hi_j), a_j, b_j)
                if res >= 0:
                    z0, z1 = vadd(z0, vload(residual, s + i)), vadd(z1, vload(residual, s + j))
                    z2 = vadd(z2, vload(residual, s + res_stride + i))
                    z3 = vadd(z3, vload(residual, s + res_stride + j))
                if activation != slots.IDENTITY:
                    z0, z1 = activated(z0, activation, slope_), activated(z1, activation, slope_)
                    z2, z3 = activated(z2, activation, slope_), activated(z3, activation, slope_)
                emit_two(y, r + i, y_stride, step, z0, z1, stream, element)
                emit_two(y, r + y_stride + i, y_stride, step, z2, z3, stream, element)
            done = pairs
        for m in range(n, n + here):
            p, r, s = at + m * x_stride, to + m * y_stride, res + m * res_stride
            for i in range(done, width, step):
                size = min(step, width - i)
                z = vfma(vsub(vtake(x, p + i, size, step), vload(hi, i)), vload(a, i), vload(b, i))
                if res >= 0:
                    z = vadd(z, vtake(residual, s + i, size, step))
                vput(y, r + i, activated(z, activation, slope_), size, step)


@inlined
def gate(g, d, y, at_y, a, b, i, size, step, activation, slope):  # type: ignore[no-untyped-def]
    """dz, by the sign of y where at_y >= 0, else by that of d * a + b."""
    if activation != slots.IDENTITY:
        if at_y >= 0:
            g = gated(g, vtake(y, at_y, size, step), activation, slope)
        else:
            g = gated(g, vfma(d, vload(a, i), vload(b, i)), activation, slope)
    return g


@inlined
def add_four(  # type: ignore[no-untyped-def]
    dy,
    p,
    dy_stride,
    x,
    q,
    x_stride,
    y,
    r,
    y_stride,
    hi,
    a,
    b,
    sums,
    products,
    i,
    size,
    step,
    activation,
    slope,
    element,
):
    """Four samples of one vector of places into the sums of dz and dz * (x - hi); r < 0: gated by x."""
    hi_ = vload(hi, i)
    if new_line(i, step, element):
        for ahead in range(4, 8):
            prefetch(dy, p + ahead * dy_stride, 0)
            prefetch(x, q + ahead * x_stride, 0)
    g0, g1 = vtake(dy, p, size, step), vtake(dy, p + dy_stride, size, step)
    g2, g3 = vtake(dy, p + 2 * dy_stride, size, step), vtake(dy, p + 3 * dy_stride, size, step)
    d0, d1 = vsub(vtake(x, q, size, step), hi_), vsub(vtake(x, q + x_stride, size, step), hi_)
    d2, d3 = vsub(vtake(x, q + 2 * x_stride, size, step), hi_), vsub(vtake(x, q + 3 * x_stride, size, step), hi_)
    if activation != slots.IDENTITY:
        hop = y_stride if r >= 0 else 0
        g0 = gate(g0, d0, y, r, a, b, i, size, step, activation, slope)
        g1 = gate(g1, d1, y, r + hop, a, b, i, size, step, activation, slope)
        g2 = gate(g2, d2, y, r + 2 * hop, a, b, i, size, step, activation, slope)
        g3 = gate(g3, d3, y, r + 3 * hop, a, b, i, size, step, activation, slope)
    vstore(sums, i, vadd(vload(sums, i), vadd(vadd(g0, g1), vadd(g2, g3))))
    t = vfma(g3, d3, vfma(g2, d2, vfma(g1, d1, vmul(g0, d0))))
    vstore(products, i, vadd(vload(products, i), t))


@plain
def sums_of_run(  # type: ignore[no-untyped-def]
    dy,
    at_dy,
    dy_stride,
    x,
    at_x,
    x_stride,
    y,
    at_y,
    y_stride,
    samples,
    width,
    hi,
    a,
    b,
    sums,
    products,
    activation,
    slope,
    element,
):
    """sums, products = sum of dz and of dz * (x - hi) over the samples, for each place of the run.

    dz is gated by y where at_y >= 0, else by (x - hi) * a + b.
    """
    step = lanes(element)
    whole = width // step * step
    slope_ = vsplat(element, slope)
    clear(sums, products, width, element)
    n = 0
    while n + 4 <= samples:
        p, q, r = at_dy + n * dy_stride, at_x + n * x_stride, at_y + n * y_stride
        for i in range(0, whole, step):
            add_four(
                dy,
                p + i,
                dy_stride,
                x,
                q + i,
                x_stride,
                y,
                r + i if at_y >= 0 else -1,
                y_stride,
                hi,
                a,
                b,
                sums,
                products,
                i,
                step,
                step,
                activation,
                slope_,
                element,
            )
        if whole < width:
            i = whole
            add_four(
                dy,
                p + i,
                dy_stride,
                x,
                q + i,
                x_stride,
                y,
                r + i if at_y >= 0 else -1,
                y_stride,
                hi,
                a,
                b,
                sums,
                products,
                i,
                width - i,
                step,
                activation,
                slope_,
                element,
            )
        n += 4
    while n < samples:
        p, q, r = at_dy + n * dy_stride, at_x + n * x_stride, at_y + n * y_stride
        for i in range(0, width, step):
            size = min(step, width - i)
            d = vsub(vtake(x, q + i, size, step), vload(hi, i))
            g = vtake(dy, p + i, size, step)
            g = gate(g, d, y, r + i if at_y >= 0 else -1, a, b, i, size, step, activation, slope_)
            vstore(sums, i, vadd(vload(sums, i), g))
            vstore(products, i, vfma(g, d, vload(products, i)))
        n += 1


@plain
def gradient_run(  # type: ignore[no-untyped-def]
    dy, at_dy, dy_stride, x, at_x, x_stride, y, at_y, y_stride, dx, to, dx_stride, dres, res, res_stride, samples,
    width, hi, a, b, by_dz, by_x, constant, centred, activation, slope, stream, element,
):  # fmt: skip
    """dx = by_dz * dz + by_x * (x - hi) + constant where `to` >= 0, and dz into dres where `res` >= 0; backwards.

    dz is gated by y where at_y >= 0, else by x. x is not read unless `centred` (by_x counts) or it gates dz.
    """
    step = lanes(element)
    pairs = width // (2 * step) * (2 * step) if centred and to >= 0 else 0  # none for some frozen layers
    slope_ = vsplat(element, slope)
    n = samples
    while n > 0:
        here = 2 if n >= 2 else 1
        n -= here
        done = 0
        if here == 2:  # two vectors of two samples
            p, q, t = at_dy + n * dy_stride, at_x + n * x_stride, to + n * dx_stride
            r, s = at_y + n * y_stride, res + n * res_stride
            for i in range(0, pairs, 2 * step):
                j = i + step
                g0, g1 = vload(dy, p + i), vload(dy, p + j)
                g2, g3 = vload(dy, p + dy_stride + i), vload(dy, p + dy_stride + j)
                hi_i, hi_j = vload(hi, i), vload(hi, j)
                d0, d1 = vsub(vload(x, q + i), hi_i), vsub(vload(x, q + j), hi_j)
                d2, d3 = vsub(vload(x, q + x_stride + i), hi_i), vsub(vload(x, q + x_stride + j), hi_j)
                if activation != slots.IDENTITY:
                    if at_y >= 0:
                        g0 = gated(g0, vload(y, r + i), activation, slope_)
                        g1 = gated(g1, vload(y, r + j), activation, slope_)
                        g2 = gated(g2, vload(y, r + y_stride + i), activation, slope_)
                        g3 = gated(g3, vload(y, r + y_stride + j), activation, slope_)
                    else:
                        a_i, b_i, a_j, b_j = vload(a, i), vload(b, i), vload(a, j), vload(b, j)
                        g0 = gated(g0, vfma(d0, a_i, b_i), activation, slope_)
                        g1 = gated(g1, vfma(d1, a_j, b_j), activation, slope_)
                        g2 = gated(g2, vfma(d2, a_i, b_i), activation, slope_)
                        g3 = gated(g3, vfma(d3, a_j, b_j), activation, slope_)
                if res >= 0:
                    emit_two(dres, s + i, res_stride, step, g0, g1, False, element)
                    emit_two(dres, s + res_stride + i, res_stride, step, g2, g3, False, element)
                e_i, f_i, h_i = vload(by_dz, i), vload(by_x, i), vload(constant, i)
                e_j, f_j, h_j = vload(by_dz, j), vload(by_x, j), vload(constant, j)
                v0, v1 = vfma(e_i, g0, vfma(f_i, d0, h_i)), vfma(e_j, g1, vfma(f_j, d1, h_j))
                v2, v3 = vfma(e_i, g2, vfma(f_i, d2, h_i)), vfma(e_j, g3, vfma(f_j, d3, h_j))
                emit_two(dx, t + i, dx_stride, step, v0, v1, stream, element)
                emit_two(dx, t + dx_stride + i, dx_stride, step, v2, v3, stream, element)
            done = pairs
        for m in range(n, n + here):
            p, q, t = at_dy + m * dy_stride, at_x + m * x_stride, to + m * dx_stride
            r, s = at_y + m * y_stride, res + m * res_stride
            for i in range(done, width, step):
                size = min(step, width - i)
                g = vtake(dy, p + i, size, step)
                d = vzeros(g)
                if centred or (activation != slots.IDENTITY and at_y < 0):
                    d = vsub(vtake(x, q + i, size, step), vload(hi, i))
                g = gate(g, d, y, r + i if at_y >= 0 else -1, a, b, i, size, step, activation, slope_)
                if res >= 0:
                    vput(dres, s + i, g, size, step)
                if to >= 0:
                    v = vmul(vload(by_dz, i), g)
                    if centred:
                        v = vfma(vload(by_dz, i), g, vfma(vload(by_x, i), d, vload(constant, i)))
                    vput(dx, t + i, v, size, step)
