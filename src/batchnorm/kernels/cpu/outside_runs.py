"""Channel outside, short rows: a run of channels at a time, added up vertically over the batch.

In memory the rows of neighbouring channels follow one another, so a run of channels is one long row in each sample.
Sums are kept for each place of the run and folded by channel at the end of a chunk of samples; per-channel values are
spread out to all places of a channel first. No vector is wasted at the end of a short row, and memory is read in
stretches of kilobytes. A channel's sums do not depend on which run it lies in.
"""

from __future__ import annotations

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import activated, counting, gated, inlined, plain
from batchnorm.kernels.cpu.scalars import load
from batchnorm.kernels.cpu.vectors import (
    lanes,
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
    vstore_some,
    vstream,
    vsub,
    vsum,
    vtake,
    vzeros,
)

PLACES = 1024
"""How many places a run has at most: what keeps its workspaces in the first-level cache."""

SLACK = PLACES + 32
"""Length of a workspace: the last channel is spread out in whole vectors."""

LONGEST = 256
"""Rows up to this length are taken in runs."""


CHUNK = 8192


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
    """The sum over all places of a channel, in float64."""
    step = lanes(element)
    at, end = channel * inner, channel * inner + inner
    total = 0.0
    while at + step <= end:
        total += vsum(vload(places, at))
        at += step
    if at < end:
        total += vsum(vload_some(places, at, end - at))
    return total


@plain
def fold_about_first(places, channel, inner, element):  # type: ignore[no-untyped-def]
    """The mean over all places of a channel: exactly their value where they are all the same."""
    step = lanes(element)
    at, end = channel * inner, channel * inner + inner
    first = load(places, at)
    origin = vsplat(element, first)
    total = 0.0
    while at + step <= end:
        total += vsum(vsub(vload(places, at), origin))
        at += step
    if at < end:
        total += vsum(vfirst(vsub(vload_some(places, at, end - at), origin), end - at))
    return float64(first) + total / inner


@plain
def sample_run(x, start, stride, samples, width, sums, element):  # type: ignore[no-untyped-def]
    """sums = the mean over the first 4, 2 or 1 samples for each place of the run (exact where they are the same)."""
    step = lanes(element)
    quarter, half = vsplat(element, 0.25), vsplat(element, 0.5)
    for i in range(0, width, step):
        size = min(step, width - i)
        v = vload_some(x, start + i, size)
        if samples >= 2:
            v = vadd(v, vload_some(x, start + stride + i, size))
        if samples >= 4:
            w = vload_some(x, start + 2 * stride + i, size)
            w = vadd(w, vload_some(x, start + 3 * stride + i, size))
            vstore(sums, i, vmul(vadd(v, w), quarter))
        elif samples >= 2:
            vstore(sums, i, vmul(v, half))
        else:
            vstore(sums, i, v)


@plain
def moments_of_run(x, start, stride, samples, width, shifts, sums, squares, element):  # type: ignore[no-untyped-def]
    """sums, squares = sum of d and of d * d over the samples, d = x - shift, for each place of the run."""
    step = lanes(element)
    zero = vsplat(element, 0.0)
    for i in range(0, width, step):
        vstore(sums, i, zero)
        vstore(squares, i, zero)
    n = 0
    while n + 4 <= samples:
        p0 = start + n * stride
        p1, p2, p3 = p0 + stride, p0 + 2 * stride, p0 + 3 * stride
        i = 0
        while i + step <= width:
            k = vload(shifts, i)
            prefetch(x, p0 + 4 * stride + i, 0)
            prefetch(x, p1 + 4 * stride + i, 0)
            prefetch(x, p2 + 4 * stride + i, 0)
            prefetch(x, p3 + 4 * stride + i, 0)
            d0, d1 = vsub(vload(x, p0 + i), k), vsub(vload(x, p1 + i), k)
            d2, d3 = vsub(vload(x, p2 + i), k), vsub(vload(x, p3 + i), k)
            vstore(sums, i, vadd(vload(sums, i), vadd(vadd(d0, d1), vadd(d2, d3))))
            q = vfma(d3, d3, vfma(d2, d2, vfma(d1, d1, vmul(d0, d0))))
            vstore(squares, i, vadd(vload(squares, i), q))
            i += step
        if i < width:
            size = width - i
            k = vload(shifts, i)
            d0, d1 = vsub(vload_some(x, p0 + i, size), k), vsub(vload_some(x, p1 + i, size), k)
            d2, d3 = vsub(vload_some(x, p2 + i, size), k), vsub(vload_some(x, p3 + i, size), k)
            vstore(sums, i, vadd(vload(sums, i), vadd(vadd(d0, d1), vadd(d2, d3))))
            q = vfma(d3, d3, vfma(d2, d2, vfma(d1, d1, vmul(d0, d0))))
            vstore(squares, i, vadd(vload(squares, i), q))
        n += 4
    while n < samples:
        p0 = start + n * stride
        for i in range(0, width, step):
            d0 = vsub(vload_some(x, p0 + i, min(step, width - i)), vload(shifts, i))
            vstore(sums, i, vadd(vload(sums, i), d0))
            vstore(squares, i, vfma(d0, d0, vload(squares, i)))
        n += 1


@inlined
def emit(y, at, value, size, step, stream):  # type: ignore[no-untyped-def]
    """Store the first `size` lanes; a whole vector around the cache if `stream`."""
    if size < step:
        vstore_some(y, at, value, size)
    elif stream:
        vstream(y, at, value)
    else:
        vstore(y, at, value)


@plain
def normalize_run(
    x,
    at,
    x_stride,
    y,
    to,
    y_stride,
    residual,
    res,
    res_stride,
    samples,
    width,
    hi,
    a,
    b,
    activation,
    slope,
    stream,
    element,
):  # type: ignore[no-untyped-def]
    """y = activation((x - hi) * a + b [+ residual, where res >= 0]) for a run of channels in all samples, backwards."""
    step = lanes(element)
    slope_ = vsplat(element, slope)
    n = samples
    while n > 0:
        here = 4 if n >= 4 else 1
        n -= here
        p0, r0, s0 = at + n * x_stride, to + n * y_stride, res + n * res_stride
        for i in range(0, width, step):
            size = min(step, width - i)
            hi_, a_, b_ = vload(hi, i), vload(a, i), vload(b, i)
            if here == 4 and size == step:
                if not stream:
                    prefetch(y, r0 - 4 * y_stride + i, 1)
                    prefetch(y, r0 - 3 * y_stride + i, 1)
                    prefetch(y, r0 - 2 * y_stride + i, 1)
                    prefetch(y, r0 - y_stride + i, 1)
                z0 = vfma(vsub(vload(x, p0 + i), hi_), a_, b_)
                z1 = vfma(vsub(vload(x, p0 + x_stride + i), hi_), a_, b_)
                z2 = vfma(vsub(vload(x, p0 + 2 * x_stride + i), hi_), a_, b_)
                z3 = vfma(vsub(vload(x, p0 + 3 * x_stride + i), hi_), a_, b_)
                if res >= 0:
                    z0 = vadd(z0, vload(residual, s0 + i))
                    z1 = vadd(z1, vload(residual, s0 + res_stride + i))
                    z2 = vadd(z2, vload(residual, s0 + 2 * res_stride + i))
                    z3 = vadd(z3, vload(residual, s0 + 3 * res_stride + i))
                if activation != slots.IDENTITY:
                    z0 = activated(z0, activation, slope_)
                    z1 = activated(z1, activation, slope_)
                    z2 = activated(z2, activation, slope_)
                    z3 = activated(z3, activation, slope_)
                emit(y, r0 + i, z0, step, step, stream)
                emit(y, r0 + y_stride + i, z1, step, step, stream)
                emit(y, r0 + 2 * y_stride + i, z2, step, step, stream)
                emit(y, r0 + 3 * y_stride + i, z3, step, step, stream)
            else:
                for j in range(here):
                    z0 = vfma(vsub(vtake(x, p0 + j * x_stride + i, size, step), hi_), a_, b_)
                    if res >= 0:
                        z0 = vadd(z0, vtake(residual, s0 + j * res_stride + i, size, step))
                    emit(y, r0 + j * y_stride + i, activated(z0, activation, slope_), size, step, stream)


@plain
def sums_of_run(
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
):  # type: ignore[no-untyped-def]
    """sums, products = sum of dz and of dz * (x - hi) over the samples, for each place of the run.

    dz is gated by y where at_y >= 0, else by (x - hi) * a + b.
    """
    step = lanes(element)
    slope_ = vsplat(element, slope)
    zero = vsplat(element, 0.0)
    for i in range(0, width, step):
        vstore(sums, i, zero)
        vstore(products, i, zero)
    n = 0
    while n < samples:
        here = 2 if n + 2 <= samples else 1
        p0, q0, r0 = at_dy + n * dy_stride, at_x + n * x_stride, at_y + n * y_stride
        for i in range(0, width, step):
            size = min(step, width - i)
            hi_ = vload(hi, i)
            s, t = vload(sums, i), vload(products, i)
            if here == 2:  # in the last vector too: the order of additions must not depend on where a run ends
                prefetch(dy, p0 + 2 * dy_stride + i, 0)
                prefetch(dy, p0 + 3 * dy_stride + i, 0)
                prefetch(x, q0 + 2 * x_stride + i, 0)
                prefetch(x, q0 + 3 * x_stride + i, 0)
                g0, g1 = vtake(dy, p0 + i, size, step), vtake(dy, p0 + dy_stride + i, size, step)
                d0, d1 = vsub(vtake(x, q0 + i, size, step), hi_), vsub(vtake(x, q0 + x_stride + i, size, step), hi_)
                if activation != slots.IDENTITY:
                    if at_y >= 0:
                        g0 = gated(g0, vtake(y, r0 + i, size, step), activation, slope_)
                        g1 = gated(g1, vtake(y, r0 + y_stride + i, size, step), activation, slope_)
                    else:
                        a_, b_ = vload(a, i), vload(b, i)
                        g0 = gated(g0, vfma(d0, a_, b_), activation, slope_)
                        g1 = gated(g1, vfma(d1, a_, b_), activation, slope_)
                s = vadd(s, vadd(g0, g1))
                t = vadd(t, vfma(g1, d1, vmul(g0, d0)))
            else:
                g0 = vtake(dy, p0 + i, size, step)
                d0 = vsub(vtake(x, q0 + i, size, step), hi_)
                if activation != slots.IDENTITY:
                    if at_y >= 0:
                        g0 = gated(g0, vtake(y, r0 + i, size, step), activation, slope_)
                    else:
                        g0 = gated(g0, vfma(d0, vload(a, i), vload(b, i)), activation, slope_)
                s = vadd(s, g0)
                t = vfma(g0, d0, t)
            vstore(sums, i, s)
            vstore(products, i, t)
        n += here


@plain
def gradient_run(
    dy,
    at_dy,
    dy_stride,
    x,
    at_x,
    x_stride,
    y,
    at_y,
    y_stride,
    dx,
    to,
    dx_stride,
    dres,
    res,
    res_stride,
    samples,
    width,
    hi,
    a,
    b,
    by_dz,
    by_x,
    constant,
    centred,
    activation,
    slope,
    stream,
    element,
):  # type: ignore[no-untyped-def]
    """dx = by_dz * dz + by_x * (x - hi) + constant where `to` >= 0, and dz itself into dres where `res` >= 0; backwards.

    x is not read unless `centred` (by_x counts) or it gates dz.
    """
    step = lanes(element)
    slope_ = vsplat(element, slope)
    common = centred and to >= 0 and res < 0 and at_y < 0
    n = samples
    while n > 0:
        here = 2 if n >= 2 else 1
        n -= here
        for i in range(0, width, step):
            size = min(step, width - i)
            hi_, e_, f_, h_ = vload(hi, i), vload(by_dz, i), vload(by_x, i), vload(constant, i)
            if common and here == 2 and size == step:
                p0, q0, r0 = at_dy + n * dy_stride + i, at_x + n * x_stride + i, to + n * dx_stride + i
                if not stream:
                    prefetch(dx, r0 - dx_stride, 1)
                    prefetch(dx, r0 - 2 * dx_stride, 1)
                g0, g1 = vload(dy, p0), vload(dy, p0 + dy_stride)
                d0, d1 = vsub(vload(x, q0), hi_), vsub(vload(x, q0 + x_stride), hi_)
                if activation != slots.IDENTITY:
                    a_, b_ = vload(a, i), vload(b, i)
                    g0 = gated(g0, vfma(d0, a_, b_), activation, slope_)
                    g1 = gated(g1, vfma(d1, a_, b_), activation, slope_)
                emit(dx, r0, vfma(e_, g0, vfma(f_, d0, h_)), step, step, stream)
                emit(dx, r0 + dx_stride, vfma(e_, g1, vfma(f_, d1, h_)), step, step, stream)
            else:
                for m in range(n, n + here):
                    g0 = vtake(dy, at_dy + m * dy_stride + i, size, step)
                    d0 = vzeros(g0)
                    if centred or (activation != slots.IDENTITY and at_y < 0):
                        d0 = vsub(vtake(x, at_x + m * x_stride + i, size, step), hi_)
                    if activation != slots.IDENTITY:
                        if at_y >= 0:
                            g0 = gated(g0, vtake(y, at_y + m * y_stride + i, size, step), activation, slope_)
                        else:
                            g0 = gated(g0, vfma(d0, vload(a, i), vload(b, i)), activation, slope_)
                    if res >= 0:
                        vput(dres, res + m * res_stride + i, g0, size, step)
                    if to >= 0:
                        v0 = vfma(e_, g0, vfma(f_, d0, h_)) if centred else vmul(e_, g0)
                        emit(dx, to + m * dx_stride + i, v0, size, step, stream)
