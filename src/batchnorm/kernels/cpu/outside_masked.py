"""Channel outside, with a mask of the places that are present, or sample weights, or both: the kernels.

The same six kernels as in outside_long, written plainly: sums in float64, the mean first and then the centred squares,
channels divided among the threads (PHASE is not looked at). MASK and SAMPLE_WEIGHT are shared by all channels.

An absent place is not measured, and y, dx and dresidual are 0 there, whatever it holds. A weight w counts a place w
times in the statistics, every present place is normalized; in the backward pass its pull at the statistics is w:
``dx = A * dz + w * (B * (x - hi) + D)`` with COUNT = the sum of the weights (0: that sum over this tensor).
"""

from __future__ import annotations

import math

from numba import float64, njit

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import (
    coefficients,
    finish_statistics,
    finish_sums,
    gradient_coefficients,
    pasted,
    plain,
    read_statistics,
    write_moments,
)
from batchnorm.kernels.cpu.compiling import FASTMATH, kernels, my_share
from batchnorm.kernels.cpu.scalars import FLOAT64, load, load_byte, pointer, real, slot_float, store


@plain
def present(block, place):  # type: ignore[no-untyped-def]
    """Whether the place (of outer * inner) is there."""
    if block[slots.MASK] == 0:
        return True
    return load_byte(block[slots.MASK], place) != 0


@plain
def weight_of(block, place):  # type: ignore[no-untyped-def]
    """How many times the place counts in the statistics."""
    if not present(block, place):
        return 0.0
    if block[slots.SAMPLE_WEIGHT] == 0:
        return 1.0
    return load(pointer(block[slots.SAMPLE_WEIGHT], FLOAT64), place)


@plain
def normalized(value, hi, a, b):  # type: ignore[no-untyped-def]
    """(x - hi) * a + b, in one order everywhere: forward and the gate of backward must agree."""
    return (value - hi) * a + b


@plain
def first_counted(block, channel, element):  # type: ignore[no-untyped-def]
    """The first value that counts, for a shift; 0 where there is none or it is not finite."""
    inner = block[slots.INNER]
    x = pointer(block[slots.X], element)
    for place in range(block[slots.OUTER] * inner):
        if weight_of(block, place) > 0.0:
            at = place // inner * block[slots.X_OUTER] + channel * block[slots.X_STEP] + place % inner
            value = float64(load(x, at))
            return value if math.isfinite(value) else 0.0
    return 0.0


@njit(error_model="numpy", fastmath=FASTMATH)
def weighted_sums(block, channel, shift, element):  # type: ignore[no-untyped-def]
    """(sum of w, sum of w * d, sum of w * d * d) of a channel, d = x - shift."""
    inner = block[slots.INNER]
    x = pointer(block[slots.X], element)
    count, total, squares = 0.0, 0.0, 0.0
    for n in range(block[slots.OUTER]):
        at = n * block[slots.X_OUTER] + channel * block[slots.X_STEP]
        for i in range(inner):
            w = weight_of(block, n * inner + i)
            if w > 0.0:
                d = float64(load(x, at + i)) - shift
                count += w
                total += w * d
                squares += w * d * d
    return count, total, squares


@plain
def measure(block, channel, element):  # type: ignore[no-untyped-def]
    """(count, mean, m2) of a channel: the mean, then the squares about it."""
    shift = first_counted(block, channel, element)
    count, total, _ = weighted_sums(block, channel, shift, element)
    if count == 0.0:
        return 0.0, 0.0, 0.0
    mean = shift + total / count
    _, rest, m2 = weighted_sums(block, channel, mean, element)
    if math.isfinite(rest):
        mean += rest / count
        m2 -= rest * (rest / count)
    return count, mean, 0.0 if m2 < 0.0 else m2


@plain
def count_places(block):  # type: ignore[no-untyped-def]
    """The sum of the weights over this tensor."""
    count = 0.0
    for place in range(block[slots.OUTER] * block[slots.INNER]):
        count += weight_of(block, place)
    return count


@plain
def normalize_channel(block, channel, mean, var, element):  # type: ignore[no-untyped-def]
    """y of a channel."""
    inner = block[slots.INNER]
    x, y = pointer(block[slots.X], element), pointer(block[slots.Y], element)
    residual = pointer(block[slots.RESIDUAL], element)
    hi, a, b = coefficients(block, channel, mean, var, element)
    activation, slope, zero = block[slots.ACTIVATION], real(element, slot_float(block, slots.SLOPE)), real(element, 0.0)
    for n in range(block[slots.OUTER]):
        at = n * block[slots.X_OUTER] + channel * block[slots.X_STEP]
        to = n * block[slots.Y_OUTER] + channel * block[slots.Y_STEP]
        res = n * block[slots.RESIDUAL_OUTER] + channel * block[slots.RESIDUAL_STEP]
        for i in range(inner):
            z = normalized(load(x, at + i), hi, a, b)
            if block[slots.RESIDUAL] != 0:
                z = z + load(residual, res + i)
            if activation != slots.IDENTITY and z <= zero:
                z = zero if activation == slots.RELU else z * slope
            store(y, to + i, z if present(block, n * inner + i) else zero)


@plain
def dz_of(block, n, channel, i, hi, a, b, element):  # type: ignore[no-untyped-def]
    """dy times the activation's slope at a present place."""
    g = load(pointer(block[slots.DY], element), n * block[slots.DY_OUTER] + channel * block[slots.DY_STEP] + i)
    activation = block[slots.ACTIVATION]
    if activation == slots.IDENTITY:
        return g
    if block[slots.Y] != 0:
        z = load(pointer(block[slots.Y], element), n * block[slots.Y_OUTER] + channel * block[slots.Y_STEP] + i)
    else:
        at = n * block[slots.X_OUTER] + channel * block[slots.X_STEP] + i
        z = normalized(load(pointer(block[slots.X], element), at), hi, a, b)
    # As PyTorch: where z is NaN relu lets dy through, and leaky relu takes the slope.
    if activation == slots.RELU:
        return real(element, 0.0) if z <= real(element, 0.0) else g
    return g if z > real(element, 0.0) else g * real(element, slot_float(block, slots.SLOPE))


@njit(error_model="numpy", fastmath=FASTMATH)
def add_up(block, channel, hi, a, b, element):  # type: ignore[no-untyped-def]
    """(sum of dz, sum of dz * (x - hi)) of a channel."""
    inner = block[slots.INNER]
    x = pointer(block[slots.X], element)
    sum_dz, sum_dz_d = 0.0, 0.0
    for n in range(block[slots.OUTER]):
        at = n * block[slots.X_OUTER] + channel * block[slots.X_STEP]
        for i in range(inner):
            if present(block, n * inner + i):
                g = float64(dz_of(block, n, channel, i, hi, a, b, element))
                sum_dz += g
                sum_dz_d += g * float64(load(x, at + i) - hi)
    return sum_dz, sum_dz_d


@plain
def gradient_channel(block, channel, hi, a, b, by_dz, by_x, constant, centred, element):  # type: ignore[no-untyped-def]
    """dx and dresidual of a channel."""
    inner, zero = block[slots.INNER], real(element, 0.0)
    x = pointer(block[slots.X], element)
    dx, dresidual = pointer(block[slots.DX], element), pointer(block[slots.DRESIDUAL], element)
    for n in range(block[slots.OUTER]):
        at = n * block[slots.X_OUTER] + channel * block[slots.X_STEP]
        to = n * block[slots.DX_OUTER] + channel * block[slots.DX_STEP]
        res = n * block[slots.DRESIDUAL_OUTER] + channel * block[slots.DRESIDUAL_STEP]
        for i in range(inner):
            g, v = zero, zero
            if present(block, n * inner + i):
                g = dz_of(block, n, channel, i, hi, a, b, element)
                v = by_dz * g
                w = real(element, weight_of(block, n * inner + i))
                if centred and w > zero:
                    v = v + w * (by_x * (load(x, at + i) - hi) + constant)
            if block[slots.DX] != 0:
                store(dx, to + i, v)
            if block[slots.DRESIDUAL] != 0:
                store(dresidual, res + i, g)


@pasted
def _forward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        count, mean, m2 = measure(block, channel, element)
        var = finish_statistics(block, channel, count, mean, m2)
        normalize_channel(block, channel, mean, var, element)


@pasted
def _moments(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        count, mean, m2 = measure(block, channel, element)
        write_moments(block, channel, count, mean, m2)


@pasted
def _normalize(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        normalize_channel(block, channel, mean, var, element)


@pasted
def _backward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    count = slot_float(block, slots.COUNT)
    if count == 0.0:
        count = count_places(block)
    training = not math.isinf(count)
    wants_sums = training or block[slots.DWEIGHT] != 0 or block[slots.DBIAS] != 0 or block[slots.SUMS] != 0
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_xhat = 0.0, 0.0
        if wants_sums:
            sum_dz, sum_dz_d = add_up(block, channel, hi, a, b, element)
            sum_dz_xhat = finish_sums(block, channel, mean, var, sum_dz, sum_dz_d, element)
        by_dz, by_x, constant = gradient_coefficients(block, channel, mean, var, sum_dz, sum_dz_xhat, count, element)
        gradient_channel(block, channel, hi, a, b, by_dz, by_x, constant, training, element)


@pasted
def _backward_sums(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_d = add_up(block, channel, hi, a, b, element)
        finish_sums(block, channel, mean, var, sum_dz, sum_dz_d, element)


@pasted
def _backward_input(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    count = slot_float(block, slots.COUNT)
    sums = pointer(block[slots.SUMS], FLOAT64)
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_xhat = 0.0, 0.0
        if not math.isinf(count):
            sum_dz, sum_dz_xhat = load(sums, channel), load(sums, channels + channel)
        by_dz, by_x, constant = gradient_coefficients(block, channel, mean, var, sum_dz, sum_dz_xhat, count, element)
        gradient_channel(block, channel, hi, a, b, by_dz, by_x, constant, not math.isinf(count), element)


FORWARD = kernels("outside_masked_forward", _forward)
MOMENTS = kernels("outside_masked_moments", _moments)
NORMALIZE = kernels("outside_masked_normalize", _normalize)
BACKWARD = kernels("outside_masked_backward", _backward)
BACKWARD_SUMS = kernels("outside_masked_backward_sums", _backward_sums)
BACKWARD_INPUT = kernels("outside_masked_backward_input", _backward_input)
