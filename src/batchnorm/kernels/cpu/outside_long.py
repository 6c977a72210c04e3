"""Channel outside, long rows: the kernels. What a thread does with a channel; the loops are in outside_rows.

=================  ===========================================================================  =================
kernel             does                                                                         PHASE
=================  ===========================================================================  =================
FORWARD            statistics (STATS, running update), then y from the cache, channel by         0; 1 and 2 give
                   channel                                                                      statistics alone
MOMENTS            STATS as (count, mean, m2)                                                   0; 1 and 2
NORMALIZE          y from MEAN and VAR                                                          0
BACKWARD           sums (dweight, dbias; SUMS if not 0), then dx from the cache                 0
BACKWARD_SUMS      SUMS, and dweight and dbias if not 0                                         0; 1 and 2
BACKWARD_INPUT     dx, dresidual from SUMS and COUNT                                            0
=================  ===========================================================================  =================

PHASE 0 divides the channels among the threads, and NORMALIZE and BACKWARD_INPUT the chunks of all channels. Where
there are too few channels to go round, launch FORWARD, MOMENTS or BACKWARD_SUMS with PHASE 1 (chunks divided among
the threads, partial results into SCRATCH) and then PHASE 2 (SCRATCH merged), and then NORMALIZE or BACKWARD_INPUT.
The bits are the same either way.
"""

from __future__ import annotations

import math

from numba import float64

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import (
    coefficients,
    finish_statistics,
    finish_sums,
    gradient_coefficients,
    measured,
    merge,
    pasted,
    plain,
    read_statistics,
    write_moments,
)
from batchnorm.kernels.cpu.compiling import kernels, my_share
from batchnorm.kernels.cpu.outside_rows import (
    CHUNK,
    chunk_count,
    chunk_moments,
    chunk_place,
    chunk_sums,
    gradient_row,
    normalize_row,
)
from batchnorm.kernels.cpu.scalars import FLOAT64, load, pointer, real, slot_float, store
from batchnorm.kernels.cpu.vectors import workspace

AT_HAND = 256
"""For how many channels normalization keeps its coefficients at hand."""


@plain
def moments_of_chunk(block, channel, chunk, element):  # type: ignore[no-untyped-def]
    """(count, mean, m2) of one chunk of a channel."""
    row, rows, at, length = chunk_place(chunk, block[slots.OUTER], block[slots.INNER])
    stride = block[slots.X_OUTER]
    start = channel * block[slots.X_STEP] + row * stride + at
    mean, m2 = chunk_moments(pointer(block[slots.X], element), start, stride, rows, length, stride, element)
    return float64(rows * length), mean, m2


@plain
def moments_of_channel(block, channel, element):  # type: ignore[no-untyped-def]
    """(count, mean, m2) of a channel: its chunks measured (PHASE 0) or read from SCRATCH, and merged."""
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    count, mean, m2 = 0.0, 0.0, 0.0
    for chunk in range(chunk_count(outer, inner)):
        if block[slots.PHASE] == 0:
            part, mean_b, m2_b = moments_of_chunk(block, channel, chunk, element)
        else:
            _, rows, _, length = chunk_place(chunk, outer, inner)
            part, at = float64(rows * length), 2 * (chunk * channels + channel)
            mean_b, m2_b = load(scratch, at), load(scratch, at + 1)
        count, mean, m2 = merge(count, mean, m2, part, mean_b, m2_b)
    mean, m2 = measured(block, channel, count, mean, m2, element)
    return count, mean, m2


@plain
def measure_chunks(block, element):  # type: ignore[no-untyped-def]
    """PHASE 1: this thread's chunks of all channels, each measured into SCRATCH."""
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    chunks = chunk_count(block[slots.OUTER], block[slots.INNER])
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    for unit in range(channels * chunks * thread // threads, channels * chunks * (thread + 1) // threads):
        channel, chunk = unit // chunks, unit % chunks
        _, mean, m2 = moments_of_chunk(block, channel, chunk, element)
        store(scratch, 2 * (chunk * channels + channel), mean)
        store(scratch, 2 * (chunk * channels + channel) + 1, m2)


@plain
def normalize_part(block, n, channel, at, length, ahead, hi, a, b, element):  # type: ignore[no-untyped-def]
    """y of part of a row; `ahead` leads to the row that will be written next."""
    res = -1
    if block[slots.RESIDUAL] != 0:
        res = n * block[slots.RESIDUAL_OUTER] + channel * block[slots.RESIDUAL_STEP] + at
    normalize_row(
        pointer(block[slots.X], element),
        n * block[slots.X_OUTER] + channel * block[slots.X_STEP] + at,
        pointer(block[slots.Y], element),
        n * block[slots.Y_OUTER] + channel * block[slots.Y_STEP] + at,
        ahead,
        pointer(block[slots.RESIDUAL], element),
        res,
        length,
        hi,
        a,
        b,
        block[slots.ACTIVATION],
        real(element, slot_float(block, slots.SLOPE)),
        block[slots.STREAM] != 0,
        element,
    )


@plain
def normalize_chunk(block, channel, chunk, hi, a, b, element):  # type: ignore[no-untyped-def]
    """y of one chunk, its rows backwards."""
    row, rows, at, length = chunk_place(chunk, block[slots.OUTER], block[slots.INNER])
    for n in range(row + rows - 1, row - 1, -1):
        normalize_part(block, n, channel, at, length, -block[slots.Y_OUTER], hi, a, b, element)


@plain
def normalize_samples(block, thread, threads, element):  # type: ignore[no-untyped-def]
    """y in the order of memory: the channels of a sample one after the other, their coefficients made before."""
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    hi, a, b = workspace(element, AT_HAND), workspace(element, AT_HAND), workspace(element, AT_HAND)
    width = min(AT_HAND, channels if outer >= threads else max(1, channels // (4 * threads)))
    made = -1
    units = (channels + width - 1) // width * outer
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        first, n = unit // outer * width, unit % outer
        here = min(width, channels - first)
        if made != first:
            made = first
            for k in range(here):
                mean, var = read_statistics(block, first + k)
                hi_k, a_k, b_k = coefficients(block, first + k, mean, var, element)
                store(hi, k, hi_k)
                store(a, k, a_k)
                store(b, k, b_k)
        for k in range(here):
            normalize_part(
                block, n, first + k, 0, inner, block[slots.Y_STEP], load(hi, k), load(a, k), load(b, k), element
            )


@plain
def sums_of_chunk(block, channel, chunk, hi, a, b, element):  # type: ignore[no-untyped-def]
    """(sum of dz, sum of dz * (x - hi)) of one chunk of a channel."""
    row, rows, at, length = chunk_place(chunk, block[slots.OUTER], block[slots.INNER])
    gate = -1
    if block[slots.Y] != 0:
        gate = row * block[slots.Y_OUTER] + channel * block[slots.Y_STEP] + at
    return chunk_sums(
        pointer(block[slots.DY], element),
        row * block[slots.DY_OUTER] + channel * block[slots.DY_STEP] + at,
        block[slots.DY_OUTER],
        pointer(block[slots.X], element),
        row * block[slots.X_OUTER] + channel * block[slots.X_STEP] + at,
        block[slots.X_OUTER],
        pointer(block[slots.Y], element),
        gate,
        block[slots.Y_OUTER],
        rows,
        length,
        hi,
        a,
        b,
        block[slots.ACTIVATION],
        real(element, slot_float(block, slots.SLOPE)),
        element,
    )


@plain
def sums_of_channel(block, channel, hi, a, b, element):  # type: ignore[no-untyped-def]
    """The sums of a channel: its chunks measured (PHASE 0) or read from SCRATCH, and added up in order."""
    channels = block[slots.CHANNELS]
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    sum_dz, sum_dz_d = 0.0, 0.0
    for chunk in range(chunk_count(block[slots.OUTER], block[slots.INNER])):
        if block[slots.PHASE] == 0:
            part, part_d = sums_of_chunk(block, channel, chunk, hi, a, b, element)
        else:
            at = 2 * (chunk * channels + channel)
            part, part_d = load(scratch, at), load(scratch, at + 1)
        sum_dz += part
        sum_dz_d += part_d
    return sum_dz, sum_dz_d


@plain
def add_up_chunks(block, element):  # type: ignore[no-untyped-def]
    """PHASE 1 of the backward sums."""
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    chunks = chunk_count(block[slots.OUTER], block[slots.INNER])
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    for unit in range(channels * chunks * thread // threads, channels * chunks * (thread + 1) // threads):
        channel, chunk = unit // chunks, unit % chunks
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        part, part_d = sums_of_chunk(block, channel, chunk, hi, a, b, element)
        store(scratch, 2 * (chunk * channels + channel), part)
        store(scratch, 2 * (chunk * channels + channel) + 1, part_d)


@plain
def gradient_chunk(block, channel, chunk, hi, a, b, by_dz, by_x, constant, centred, element):  # type: ignore[no-untyped-def]
    """dx and dresidual of one chunk, its rows backwards."""
    row, rows, at, length = chunk_place(chunk, block[slots.OUTER], block[slots.INNER])
    dy, x, y = pointer(block[slots.DY], element), pointer(block[slots.X], element), pointer(block[slots.Y], element)
    dx, dresidual = pointer(block[slots.DX], element), pointer(block[slots.DRESIDUAL], element)
    slope = real(element, slot_float(block, slots.SLOPE))
    stream = block[slots.STREAM] != 0
    for n in range(row + rows - 1, row - 1, -1):
        gate, to, res = -1, -1, -1
        if block[slots.Y] != 0:
            gate = n * block[slots.Y_OUTER] + channel * block[slots.Y_STEP] + at
        if block[slots.DX] != 0:
            to = n * block[slots.DX_OUTER] + channel * block[slots.DX_STEP] + at
        if block[slots.DRESIDUAL] != 0:
            res = n * block[slots.DRESIDUAL_OUTER] + channel * block[slots.DRESIDUAL_STEP] + at
        gradient_row(
            dy,
            n * block[slots.DY_OUTER] + channel * block[slots.DY_STEP] + at,
            x,
            n * block[slots.X_OUTER] + channel * block[slots.X_STEP] + at,
            y,
            gate,
            dx,
            to,
            -block[slots.DX_OUTER],
            dresidual,
            res,
            length,
            hi,
            a,
            b,
            by_dz,
            by_x,
            constant,
            centred,
            block[slots.ACTIVATION],
            slope,
            stream,
            element,
        )


@pasted
def _forward(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        measure_chunks(block, element)
        return
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    chunks = chunk_count(block[slots.OUTER], block[slots.INNER])
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        count, mean, m2 = moments_of_channel(block, channel, element)
        var = finish_statistics(block, channel, count, mean, m2)
        if block[slots.PHASE] == 0:
            hi, a, b = coefficients(block, channel, mean, var, element)
            for chunk in range(chunks - 1, -1, -1):
                normalize_chunk(block, channel, chunk, hi, a, b, element)


@pasted
def _moments(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        measure_chunks(block, element)
        return
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        count, mean, m2 = moments_of_channel(block, channel, element)
        write_moments(block, channel, count, mean, m2)


@pasted
def _normalize(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    if block[slots.INNER] <= CHUNK:
        normalize_samples(block, thread, threads, element)
        return
    channels = block[slots.CHANNELS]
    chunks = chunk_count(block[slots.OUTER], block[slots.INNER])
    for unit in range(channels * chunks * thread // threads, channels * chunks * (thread + 1) // threads):
        channel, chunk = unit // chunks, unit % chunks
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        normalize_chunk(block, channel, chunk, hi, a, b, element)


@pasted
def _backward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    chunks = chunk_count(outer, inner)
    count = slot_float(block, slots.COUNT)
    if count == 0.0:
        count = float64(outer * inner)
    training = not math.isinf(count)
    wants_sums = training or block[slots.DWEIGHT] != 0 or block[slots.DBIAS] != 0 or block[slots.SUMS] != 0
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_xhat = 0.0, 0.0
        if wants_sums:
            sum_dz, sum_dz_d = sums_of_channel(block, channel, hi, a, b, element)
            sum_dz_xhat = finish_sums(block, channel, mean, var, sum_dz, sum_dz_d, element)
        by_dz, by_x, constant = gradient_coefficients(block, channel, mean, var, sum_dz, sum_dz_xhat, count, element)
        for chunk in range(chunks - 1, -1, -1):
            gradient_chunk(block, channel, chunk, hi, a, b, by_dz, by_x, constant, training, element)


@pasted
def _backward_sums(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        add_up_chunks(block, element)
        return
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    for channel in range(channels * thread // threads, channels * (thread + 1) // threads):
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_d = sums_of_channel(block, channel, hi, a, b, element)
        finish_sums(block, channel, mean, var, sum_dz, sum_dz_d, element)


@pasted
def _backward_input(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    chunks = chunk_count(block[slots.OUTER], block[slots.INNER])
    count = slot_float(block, slots.COUNT)
    sums = pointer(block[slots.SUMS], FLOAT64)
    for unit in range(channels * chunks * thread // threads, channels * chunks * (thread + 1) // threads):
        channel, chunk = unit // chunks, unit % chunks
        mean, var = read_statistics(block, channel)
        hi, a, b = coefficients(block, channel, mean, var, element)
        sum_dz, sum_dz_xhat = 0.0, 0.0
        if not math.isinf(count):
            sum_dz, sum_dz_xhat = load(sums, channel), load(sums, channels + channel)
        by_dz, by_x, constant = gradient_coefficients(block, channel, mean, var, sum_dz, sum_dz_xhat, count, element)
        gradient_chunk(block, channel, chunk, hi, a, b, by_dz, by_x, constant, not math.isinf(count), element)


FORWARD = kernels("outside_long_forward", _forward)
MOMENTS = kernels("outside_long_moments", _moments)
NORMALIZE = kernels("outside_long_normalize", _normalize)
BACKWARD = kernels("outside_long_backward", _backward)
BACKWARD_SUMS = kernels("outside_long_backward_sums", _backward_sums)
BACKWARD_INPUT = kernels("outside_long_backward_input", _backward_input)
