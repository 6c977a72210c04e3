"""The arithmetic of one channel, in float64: merging partial moments, finishing statistics, coefficients.

Normalization is ``z = (x - hi) * a + b`` with hi = mean rounded to the computing type, a = weight / sqrt(var + eps)
rounded once, and b = bias - (mean - hi) * a in float64, rounded once: the low part of the mean goes into the bias.
A constant channel gives exactly the bias (mean = hi), and a mean of 1e6 costs no digits, since x - hi is exact for x
near it.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float64, njit
from numba.extending import register_jitable

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.scalars import (
    FLOAT64,
    INTERNAL,
    increment,
    load,
    load_channel,
    pointer,
    real,
    slot_float,
    stays_a_call,
    store,
    store_channel,
)
from batchnorm.kernels.cpu.vectors import item_bytes, vmul, vwhere_above, vwhere_positive, vzeros

FINITE = 1.7976931348623157e308
"""The largest float64."""

LARGE = 1e18
"""Of float32 arithmetic: with the mean and the standard deviation below, x - mean and sums of dz * (x - mean) stay
finite, and 1 / std is a normal number."""


def plain(function: Any) -> Any:
    """Compile for use in kernels: no Python errors, inlined by LLVM where it pays.

    No fast-math flag: a * b + c contracted in one kernel and not in another would give other bits.
    """
    return njit(error_model="numpy", **INTERNAL)(function)


def inlined(function: Any) -> Any:
    """Like plain, and always inlined."""
    return njit(error_model="numpy", forceinline=True, **INTERNAL)(function)


def pasted(function: Any) -> Any:
    """Copied by Numba into its callers. LLVM optimizes a function anew in each caller of a caller, so fewer levels
    compile in less time; for functions that are called in one place, as the bodies of kernels are."""
    return njit(error_model="numpy", forceinline=False, inline="always", **INTERNAL)(function)


def counting(function: Any) -> Any:
    """For arithmetic on sizes: callable in kernels, and plain Python outside."""
    return register_jitable(error_model="numpy")(function)


@plain
def merge(count, mean, m2, count_b, mean_b, m2_b):  # type: ignore[no-untyped-def]
    """Chan's formula: the moments of two parts together. Inf and NaN give the mean that plain sums would give."""
    if count == 0.0:
        return count_b, mean_b, m2_b
    if count_b == 0.0:
        return count, mean, m2
    total = count + count_b
    delta = mean_b - mean
    if not math.isfinite(delta):
        return total, mean + mean_b, m2 + m2_b
    return total, mean + delta * (count_b / total), m2 + m2_b + delta * delta * (count * (count_b / total))


@plain
def m2_of(total, squares, count):  # type: ignore[no-untyped-def]
    """M2 from the sums of d and d * d: inf where squares overflow (or x has Inf), NaN only where x has NaN."""
    if not math.isfinite(squares):
        return squares
    m2 = squares - total * (total / count)
    if math.isinf(m2):
        return math.inf
    return 0.0 if m2 < 0.0 else m2


@plain
def measured(block, channel, count, mean, m2, element):  # type: ignore[no-untyped-def]
    """mean and m2 as they are or, where they overflowed, measured again: value by value in float64."""
    if m2 <= FINITE or math.isnan(m2):
        return mean, m2
    return measure_again(block, channel, count, element)


@plain
def measure_again(block, channel, count, element):  # type: ignore[no-untyped-def]
    """(mean, m2) of a channel, in float64: the mean first, the squares about it after."""
    stays_a_call()
    x = pointer(block[slots.X], element)
    inner, start = block[slots.INNER], channel * block[slots.X_STEP]
    shift = float64(load(x, start))
    shift = shift if math.isfinite(shift) else 0.0
    total, m2 = 0.0, 0.0
    for n in range(block[slots.OUTER]):
        for i in range(inner):
            total += float64(load(x, start + n * block[slots.X_OUTER] + i)) - shift
    mean = shift + total / count
    if not math.isfinite(mean):
        return mean, math.nan
    for n in range(block[slots.OUTER]):
        for i in range(inner):
            d = float64(load(x, start + n * block[slots.X_OUTER] + i)) - mean
            m2 += d * d
    return mean, m2


@plain
def is_short(element):  # type: ignore[no-untyped-def]
    """Whether elements are computed in float32: a constant to the compiler."""
    return math.isinf(float64(real(element, FINITE)))


@plain
def tell_far(block):  # type: ignore[no-untyped-def]
    """See the slot FAR. Several threads may do so at once: it is raised all the same."""
    if block[slots.FAR] != 0:
        increment(block[slots.FAR])


@plain
def updated(old, factor, value):  # type: ignore[no-untyped-def]
    """A running statistic. Not old + factor * (value - old): where both are inf they stay inf."""
    return (1.0 - factor) * old + factor * value


@plain
def write_moments(block, channel, count, mean, m2):  # type: ignore[no-untyped-def]
    """STATS of the moments kernel: (3, channels) count, mean, m2."""
    channels = block[slots.CHANNELS]
    stats = pointer(block[slots.STATS], FLOAT64)
    store(stats, channel, count)
    store(stats, channels + channel, mean)
    store(stats, 2 * channels + channel, m2)


@plain
def count_batch(block):  # type: ignore[no-untyped-def]
    """One more in BATCHES. For one thread to call, that of the first channel."""
    if block[slots.BATCHES] != 0:
        increment(block[slots.BATCHES])


@plain
def finish_statistics(block, channel, count, mean, m2):  # type: ignore[no-untyped-def]
    """STATS of the forward kernel, (2, channels) mean and biased var, and the running update. Gives var."""
    var = m2 / count
    stats = pointer(block[slots.STATS], FLOAT64)
    store(stats, channel, mean)
    store(stats, block[slots.CHANNELS] + channel, var)
    if channel == 0:
        count_batch(block)
    factor = slot_float(block, slots.FACTOR)
    code = block[slots.RUNNING_DTYPE]
    address = block[slots.RUNNING_MEAN]
    if address != 0:
        old = load_channel(address, code, channel)
        store_channel(address, code, channel, updated(old, factor, mean))
    address = block[slots.RUNNING_VAR]
    if address != 0:
        old = load_channel(address, code, channel)
        store_channel(address, code, channel, updated(old, factor, m2 / (count - 1.0)))
    return var


@plain
def read_statistics(block, channel):  # type: ignore[no-untyped-def]
    """mean and var of the slots MEAN and VAR."""
    code = block[slots.STATISTICS_DTYPE]
    return load_channel(block[slots.MEAN], code, channel), load_channel(block[slots.VAR], code, channel)


@plain
def read_weight(block, channel):  # type: ignore[no-untyped-def]
    """weight, or 1 where there is none."""
    address = block[slots.WEIGHT]
    return 1.0 if address == 0 else load_channel(address, block[slots.PARAMETER_DTYPE], channel)


@plain
def read_bias(block, channel):  # type: ignore[no-untyped-def]
    """bias, or 0 where there is none."""
    address = block[slots.BIAS]
    return 0.0 if address == 0 else load_channel(address, block[slots.PARAMETER_DTYPE], channel)


@plain
def center(mean, element):  # type: ignore[no-untyped-def]
    """The mean as (hi, low): hi in the computing type, low = mean - hi in float64."""
    hi = real(element, mean)
    low = mean - float64(hi)
    return hi, low if math.isfinite(low) else 0.0


@plain
def coefficients(block, channel, mean, var, element):  # type: ignore[no-untyped-def]
    """(hi, a, b) of the normalization above, in the computing type."""
    if is_short(element) and (LARGE < abs(mean) <= FINITE or LARGE * LARGE < var <= FINITE):
        tell_far(block)
    hi, low = center(mean, element)
    a = real(element, read_weight(block, channel) / math.sqrt(var + slot_float(block, slots.EPS)))
    return hi, a, real(element, read_bias(block, channel) - low * float64(a))


@plain
def finish_sums(block, channel, mean, var, sum_dz, sum_dz_d, element):  # type: ignore[no-untyped-def]
    """From the sums of dz and dz * (x - hi): the sum of dz * x_hat; writes SUMS, dbias and dweight where wanted."""
    if not (math.isfinite(sum_dz) and math.isfinite(sum_dz_d)) and math.isfinite(mean) and math.isfinite(var):
        tell_far(block)
    _, low = center(mean, element)
    sum_dz_xhat = (sum_dz_d - low * sum_dz) / math.sqrt(var + slot_float(block, slots.EPS))
    if block[slots.SUMS] != 0:
        sums = pointer(block[slots.SUMS], FLOAT64)
        store(sums, channel, sum_dz)
        store(sums, block[slots.CHANNELS] + channel, sum_dz_xhat)
    code = block[slots.PARAMETER_DTYPE]
    if block[slots.DBIAS] != 0:
        store_channel(block[slots.DBIAS], code, channel, sum_dz)
    if block[slots.DWEIGHT] != 0:
        store_channel(block[slots.DWEIGHT], code, channel, sum_dz_xhat)
    return sum_dz_xhat


@plain
def gradient_coefficients(  # type: ignore[no-untyped-def]
    block, channel, mean, var, sum_dz, sum_dz_xhat, count, element
):
    """(A, B, D) of dx = A * dz + B * (x - hi) + D; B = D = 0 where the count is infinite (evaluation)."""
    _, low = center(mean, element)
    invstd = 1.0 / math.sqrt(var + slot_float(block, slots.EPS))
    by_dz = read_weight(block, channel) * invstd
    if math.isinf(count):
        return real(element, by_dz), real(element, 0.0), real(element, 0.0)
    by_x = -by_dz * invstd * (sum_dz_xhat / count)
    constant = -by_dz * (sum_dz / count) - by_x * low
    return real(element, by_dz), real(element, by_x), real(element, constant)


@plain
def may_stream(block, address, outer, step, element):  # type: ignore[no-untyped-def]
    """Whether STREAM is set and all rows of an output begin with a cache line: parts of lines are slow to stream."""
    item = item_bytes(element)
    return block[slots.STREAM] != 0 and (address | outer * item | step * item) & 63 == 0


@inlined
def activated(z, activation, slope):  # type: ignore[no-untyped-def]
    """The activation of a vector; relu(NaN) is NaN, relu(-inf) is 0."""
    if activation == slots.RELU:
        z = vwhere_positive(z, z, vzeros(z))
    elif activation == slots.LEAKY_RELU:
        z = vwhere_positive(z, z, vmul(z, slope))
    return z


@inlined
def gated(dy, z, activation, slope):  # type: ignore[no-untyped-def]
    """dz = dy * activation'(z) of a vector; z may also be the activation's result, which has the same sign.

    As PyTorch: where z is NaN relu lets dy through, and leaky relu takes the slope.
    """
    if activation == slots.RELU:
        dy = vwhere_positive(z, dy, vzeros(dy))
    elif activation == slots.LEAKY_RELU:
        dy = vwhere_above(z, dy, vmul(dy, slope))
    return dy
