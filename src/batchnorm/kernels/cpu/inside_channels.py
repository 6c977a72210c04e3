"""Between the sweeps of the channel-inside kernels: the arithmetic per channel, in float64, many channels at a time.

The coefficients of the second sweep stand in SCRATCH as float32 (float64 for float64 tensors), five arrays that take
turns wide vector by wide vector:

hi, a, b    z = (x - hi) * a + b: hi = mean rounded, a = weight / sqrt(var + eps) rounded once, and
            b = bias - (mean - hi) * a rounded once; see ``channel``
k1, k2      dx = (dz - k1 - (x - hi) * k2) * a:  k2 = sum of dz * x_hat / (count * sqrt(var + eps)),
            k1 = sum of dz / count - (mean - hi) * k2
"""

from __future__ import annotations

import math

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import LARGE, count_batch, is_short, tell_far
from batchnorm.kernels.cpu.inside_rows import COEFFICIENTS, at_partial, weight_of
from batchnorm.kernels.cpu.inside_sums import at_column
from batchnorm.kernels.cpu.inside_wide import (
    channels_load,
    channels_store,
    plain,
    wide,
    wide_any_above,
    wide_divide,
    wide_finite,
    wide_load,
    wide_replace,
    wide_rounded,
    wide_splat,
    wide_sqrt,
    wide_store,
    wide_zero,
)
from batchnorm.kernels.cpu.scalars import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    load,
    pointer,
    slot_float,
    stays_a_call,
    store,
)
from batchnorm.kernels.cpu.vectors import vadd, vfma, vmul, vsub

OVERFLOWN = 1e300  # larger than sums of float32 can be: only infinity is
CANCELLED = 3.0  # the squares lost to a bad shift may be this many times those that are left (by chance: 1e-6)


@plain
def read_channels(address, code, j, count):  # type: ignore[no-untyped-def]
    """Channels j to j + count of a vector of any dtype (a code of ``block.CODES``)."""
    stays_a_call()
    if code == 0:
        return channels_load(pointer(address, FLOAT32), j, count)
    if code == 1:
        return channels_load(pointer(address, FLOAT64), j, count)
    if code == 2:
        return channels_load(pointer(address, BFLOAT16), j, count)
    return channels_load(pointer(address, FLOAT16), j, count)


@plain
def write_channels(address, code, j, value, count):  # type: ignore[no-untyped-def]
    """Write channels j to j + count of a vector of any dtype, rounded."""
    stays_a_call()
    if code == 0:
        channels_store(pointer(address, FLOAT32), j, value, count)
    elif code == 1:
        channels_store(pointer(address, FLOAT64), j, value, count)
    elif code == 2:
        channels_store(pointer(address, BFLOAT16), j, value, count)
    else:
        channels_store(pointer(address, FLOAT16), j, value, count)


@plain
def inverse(count):  # type: ignore[no-untyped-def]
    """1 / count, infinite for 0."""
    return 1.0 / count


@plain
def add_up(c, scratch, totals, channels, first, last):  # type: ignore[no-untyped-def]
    """Totals of the columns first to last over all chunks, in order; those of folded rows fall to their channel.

    The totals of the channels are those of the first columns. Gives the count of all rows.
    """
    w = wide(FLOAT64)
    for j in range(first, last, w):
        one, two = wide_zero(FLOAT64), wide_zero(FLOAT64)
        for chunk in range(c.chunks):
            partial = pointer(scratch + 8 * at_partial(c.padded, chunk), FLOAT64)
            one = vadd(one, wide_load(partial, j, None))
            two = vadd(two, wide_load(partial, c.padded + j, None))
        wide_store(totals, j, one, None)
        wide_store(totals, c.padded + j, two, None)
    if c.fold > 1:
        for column in range(channels, c.columns):
            to = column % channels
            store(totals, to, load(totals, to) + load(totals, column))
            store(totals, c.padded + to, load(totals, c.padded + to) + load(totals, c.padded + column))
    count = 0.0
    for chunk in range(c.chunks):
        count += load(pointer(scratch + 8 * at_partial(c.padded, chunk), FLOAT64), 2 * c.padded)
    return count


@plain
def measure_again(block, channel, element):  # type: ignore[no-untyped-def]
    """(mean, m2) of a channel whose shift was bad: the mean first, squares about it after, all in float64."""
    stays_a_call()
    x = pointer(block[slots.X], element)
    outer, inner = block[slots.OUTER], block[slots.INNER]
    total, count, mean, m2 = 0.0, 0.0, 0.0, 0.0
    for sweep in range(2):
        for n in range(outer):
            for i in range(inner):
                weight = weight_of(block, n * inner + i)
                if weight > 0.0:
                    value = float64(load(x, n * block[slots.X_OUTER] + i * block[slots.X_STEP] + channel))
                    if sweep == 0:
                        total += weight * value
                        count += weight
                    else:
                        m2 += weight * (value - mean) * (value - mean)
        mean = total / count
        if not math.isfinite(mean):
            m2 = mean - mean
            break
    return mean, m2


@plain
def finish_moments(block, c, totals, shifts, j, n, count, element):  # type: ignore[no-untyped-def]
    """(mean, m2) of channels j to j + n."""
    one, two = wide_load(totals, j, None), wide_load(totals, c.padded + j, None)
    offset = vmul(one, wide_splat(FLOAT64, inverse(count) if count > 0.0 else 0.0))
    correction = vmul(one, offset)
    mean = vadd(channels_load(shifts, at_column(j, wide(element), 3), n), offset)
    m2 = vsub(two, correction)
    bound = vmul(m2, wide_splat(FLOAT64, CANCELLED))
    if wide_any_above(correction, bound) or wide_any_above(two, wide_splat(FLOAT64, OVERFLOWN)):
        for channel in range(j, j + n):
            s, q = load(totals, channel), load(totals, c.padded + channel)
            lost = s * (s / count)
            # NaN in q comes from NaN in x alone; in s it also comes from sums that overflow in both directions.
            if q > OVERFLOWN or (math.isfinite(s) and lost > CANCELLED * (q - lost)):
                s, q = measure_again(block, channel, element)
                mean = wide_replace(mean, channel - j, s)
                m2 = wide_replace(m2, channel - j, q)
    return mean, m2


@plain
def read_statistics(block, j, n):  # type: ignore[no-untyped-def]
    """(mean, biased variance) of channels j to j + n, from MEAN and VAR."""
    code = block[slots.STATISTICS_DTYPE]
    return read_channels(block[slots.MEAN], code, j, n), read_channels(block[slots.VAR], code, j, n)


@plain
def write_statistics(block, j, n, count, mean, m2, moments):  # type: ignore[no-untyped-def]
    """STATS: (count, mean, m2) where ``moments``, else (mean, var). Gives the biased variance."""
    stats, channels = block[slots.STATS], block[slots.CHANNELS]
    var = vmul(m2, wide_splat(FLOAT64, inverse(count)))
    if moments:
        write_channels(stats, 1, j, wide_splat(FLOAT64, count), n)
        write_channels(stats, 1, channels + j, mean, n)
        write_channels(stats, 1, 2 * channels + j, m2, n)
    elif stats != 0:
        write_channels(stats, 1, j, mean, n)
        write_channels(stats, 1, channels + j, var, n)
    return var


@plain
def update_running(block, j, n, count, mean, m2):  # type: ignore[no-untyped-def]
    """The running statistics, where there are any: see channel.updated."""
    if j == 0:
        count_batch(block)
    code = block[slots.RUNNING_DTYPE]
    factor = wide_splat(FLOAT64, slot_float(block, slots.FACTOR))
    kept = wide_splat(FLOAT64, 1.0 - slot_float(block, slots.FACTOR))
    address = block[slots.RUNNING_MEAN]
    if address != 0:
        old = read_channels(address, code, j, n)
        write_channels(address, code, j, vfma(factor, mean, vmul(kept, old)), n)
    address = block[slots.RUNNING_VAR]
    if address != 0:
        old = read_channels(address, code, j, n)
        var = vmul(m2, wide_splat(FLOAT64, inverse(count - 1.0)))
        write_channels(address, code, j, vfma(factor, var, vmul(kept, old)), n)


@plain
def write_coefficients(block, coefficients, j, n, mean, var, element):  # type: ignore[no-untyped-def]
    """hi, a and b of channels j to j + n. Gives mean - hi and 1 / sqrt(var + eps)."""
    w = wide(element)
    at = at_column(j, w, COEFFICIENTS)
    one = wide_splat(FLOAT64, 1.0)
    invstd = wide_divide(one, wide_sqrt(vadd(var, wide_splat(FLOAT64, slot_float(block, slots.EPS)))))
    if is_short(element):
        limit = wide_splat(FLOAT64, LARGE * LARGE)
        if wide_any_above(wide_finite(vmul(mean, mean)), limit) or wide_any_above(wide_finite(var), limit):
            tell_far(block)
    hi = wide_rounded(element, mean)
    low = wide_finite(vsub(mean, hi))
    a = invstd
    if block[slots.WEIGHT] != 0:
        a = vmul(a, read_channels(block[slots.WEIGHT], block[slots.PARAMETER_DTYPE], j, n))
    a = wide_rounded(element, a)
    b = wide_zero(FLOAT64)
    if block[slots.BIAS] != 0:
        b = read_channels(block[slots.BIAS], block[slots.PARAMETER_DTYPE], j, n)
    b = vsub(b, vmul(low, a))
    channels_store(coefficients, at, hi, n)
    channels_store(coefficients, at + w, a, n)
    channels_store(coefficients, at + 2 * w, b, n)
    return low, invstd


@plain
def centre(block, j, n, element):  # type: ignore[no-untyped-def]
    """(mean - hi, 1 / sqrt(var + eps)) of channels j to j + n."""
    mean, var = read_statistics(block, j, n)
    low = wide_finite(vsub(mean, wide_rounded(element, mean)))
    eps = wide_splat(FLOAT64, slot_float(block, slots.EPS))
    return low, wide_divide(wide_splat(FLOAT64, 1.0), wide_sqrt(vadd(var, eps)))


@plain
def write_gradient_coefficients(coefficients, j, n, sum_dz, sum_dz_xhat, count, low, invstd, element):  # type: ignore[no-untyped-def]
    """k1 and k2 of channels j to j + n."""
    w = wide(element)
    at = at_column(j, w, COEFFICIENTS)
    share = wide_splat(FLOAT64, inverse(count))
    k2 = vmul(vmul(sum_dz_xhat, share), invstd)
    k1 = vsub(vmul(sum_dz, share), vmul(low, k2))
    channels_store(coefficients, at + 3 * w, k1, n)
    channels_store(coefficients, at + 4 * w, k2, n)


@plain
def write_parameter_gradients(block, j, n, sum_dz, sum_dz_xhat):  # type: ignore[no-untyped-def]
    """dbias, dweight and SUMS of channels j to j + n, where wanted."""
    code = block[slots.PARAMETER_DTYPE]
    if block[slots.DBIAS] != 0:
        write_channels(block[slots.DBIAS], code, j, sum_dz, n)
    if block[slots.DWEIGHT] != 0:
        write_channels(block[slots.DWEIGHT], code, j, sum_dz_xhat, n)


@plain
def spread(c, channels, source, target, element):  # type: ignore[no-untyped-def]
    """Coefficients of the channels, repeated for the columns of folded rows."""
    w = wide(element)
    for column in range(c.columns):
        at, to = at_column(column % channels, w, COEFFICIENTS), at_column(column, w, COEFFICIENTS)
        for array in range(COEFFICIENTS):
            store(target, to + array * w, load(source, at + array * w))
