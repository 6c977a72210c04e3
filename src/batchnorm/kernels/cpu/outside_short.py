"""Channel outside, short rows: the kernels, as in outside_long. What a thread does with a run of channels; the loops
are in outside_runs.
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
    inlined,
    m2_of,
    may_stream,
    measured,
    merge,
    pasted,
    plain,
    read_statistics,
    write_moments,
)
from batchnorm.kernels.cpu.compiling import kernels, my_share
from batchnorm.kernels.cpu.outside_runs import (
    PLACES,
    SLACK,
    fold,
    gradient_run,
    moments_of_run,
    normalize_run,
    samples_in_chunk,
    shift_of_channel,
    spread,
    sums_of_run,
)
from batchnorm.kernels.cpu.scalars import FLOAT64, load, pointer, real, slot_float, store
from batchnorm.kernels.cpu.vectors import item_bytes, workspace

SLAB = 384 * 1024
"""Bytes of a run's data in all samples: what stays in the second-level cache from one sweep to the next."""


@inlined
def dense(block, operand, step):  # type: ignore[no-untyped-def]
    """Whether the channels of an operand follow one another, or it is not there."""
    return block[operand] == 0 or block[step] == block[slots.INNER]


@plain
def channels_in_run(block, threads, operands, element):  # type: ignore[no-untyped-def]
    """How many channels a run has, where each place has `operands` values: whole cache lines where that is possible."""
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    if not (
        dense(block, slots.X, slots.X_STEP)
        and dense(block, slots.DY, slots.DY_STEP)
        and dense(block, slots.Y, slots.Y_STEP)
        and dense(block, slots.RESIDUAL, slots.RESIDUAL_STEP)
        and dense(block, slots.DX, slots.DX_STEP)
        and dense(block, slots.DRESIDUAL, slots.DRESIDUAL_STEP)
    ):
        return 1
    slab = SLAB // (item_bytes(element) * operands * outer * inner)
    places = PLACES if item_bytes(element) == 2 else 1024
    count = min(places // inner, max(slab, 256 // inner), (channels + threads - 1) // threads)
    line = 64 // item_bytes(element)
    whole = line
    while whole > 1 and whole // 2 * inner % line == 0:
        whole //= 2
    return max(1, count // whole * whole if count > whole else count)


@plain
def measure_run(block, channel, here, row, rows, shifts, sums, squares, element):  # type: ignore[no-untyped-def]
    """Sums about a shift, one for each channel and spread over `shifts`, for one chunk of a run."""
    inner, stride = block[slots.INNER], block[slots.X_OUTER]
    x, start = pointer(block[slots.X], element), row * stride + channel * block[slots.X_STEP]
    for k in range(here):
        shift = shift_of_channel(x, start + k * block[slots.X_STEP], stride, rows, inner, element)
        spread(shifts, k, inner, shift, element)
    moments_of_run(x, start, stride, rows, here * inner, shifts, sums, squares, element)


@plain
def moments_of_place(k, inner, count, shifts, sums, squares, element):  # type: ignore[no-untyped-def]
    """(mean, m2) of a run's k-th channel from the sums of measure_run."""
    total = fold(sums, k, inner, element)
    m2 = m2_of(total, fold(squares, k, inner, element), count)
    return float64(load(shifts, k * inner)) + total / count, m2


@plain
def measure_runs(block, element):  # type: ignore[no-untyped-def]
    """PHASE 1: this thread's chunks of all runs, each measured into SCRATCH."""
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    shifts, sums, squares = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    samples = samples_in_chunk(inner)
    run, chunks = channels_in_run(block, 1, 1, element), (outer + samples - 1) // samples
    units = (channels + run - 1) // run * chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        channel, chunk = unit // chunks * run, unit % chunks
        here, row = min(run, channels - channel), chunk * samples
        rows = min(samples, outer - row)
        measure_run(block, channel, here, row, rows, shifts, sums, squares, element)
        for k in range(here):
            mean, m2 = moments_of_place(k, inner, float64(rows * inner), shifts, sums, squares, element)
            at = 2 * (chunk * channels + channel + k)
            store(scratch, at, mean)
            store(scratch, at + 1, m2)


@plain
def read_moments(block, channel, here, means, m2s):  # type: ignore[no-untyped-def]
    """PHASE 2: means and m2s of a run's channels from SCRATCH."""
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    samples = samples_in_chunk(inner)
    for k in range(here):
        count, mean, m2 = 0.0, 0.0, 0.0
        for row in range(0, outer, samples):
            at = 2 * (row // samples * channels + channel + k)
            part = float64(min(samples, outer - row) * inner)
            count, mean, m2 = merge(count, mean, m2, part, load(scratch, at), load(scratch, at + 1))
        store(means, k, mean)
        store(m2s, k, m2)


@plain
def take_moments(block, channel, here, shifts, sums, squares, means, m2s, element):  # type: ignore[no-untyped-def]
    """PHASE 0: means and m2s of a run's channels, measured chunk by chunk."""
    outer, inner = block[slots.OUTER], block[slots.INNER]
    samples = samples_in_chunk(inner)
    for row in range(0, outer, samples):
        rows = min(samples, outer - row)
        measure_run(block, channel, here, row, rows, shifts, sums, squares, element)
        count = float64(rows * inner)
        for k in range(here):
            mean_b, m2_b = moments_of_place(k, inner, count, shifts, sums, squares, element)
            if row > 0:
                _, mean_b, m2_b = merge(float64(row * inner), load(means, k), load(m2s, k), count, mean_b, m2_b)
            store(means, k, mean_b)
            store(m2s, k, m2_b)


@plain
def normalize_samples(block, channel, here, row, rows, hi, a, b, element):  # type: ignore[no-untyped-def]
    """y of a run in some samples."""
    inner = block[slots.INNER]
    res = -1
    if block[slots.RESIDUAL] != 0:
        res = row * block[slots.RESIDUAL_OUTER] + channel * block[slots.RESIDUAL_STEP]
    to = row * block[slots.Y_OUTER] + channel * block[slots.Y_STEP]
    normalize_run(
        pointer(block[slots.X], element),
        row * block[slots.X_OUTER] + channel * block[slots.X_STEP],
        block[slots.X_OUTER],
        pointer(block[slots.Y], element),
        to,
        block[slots.Y_OUTER],
        pointer(block[slots.RESIDUAL], element),
        res,
        block[slots.RESIDUAL_OUTER],
        rows,
        here * inner,
        hi,
        a,
        b,
        block[slots.ACTIVATION],
        real(element, slot_float(block, slots.SLOPE)),
        may_stream(block, block[slots.Y], block[slots.Y_OUTER], channel * block[slots.Y_STEP], element),
        element,
    )


@plain
def add_up_run(block, channel, here, row, rows, hi, a, b, sums, products, element):  # type: ignore[no-untyped-def]
    """Sums of dz and dz * (x - hi) for each place of a run in some samples."""
    gate = -1
    if block[slots.Y] != 0:
        gate = row * block[slots.Y_OUTER] + channel * block[slots.Y_STEP]
    sums_of_run(
        pointer(block[slots.DY], element),
        row * block[slots.DY_OUTER] + channel * block[slots.DY_STEP],
        block[slots.DY_OUTER],
        pointer(block[slots.X], element),
        row * block[slots.X_OUTER] + channel * block[slots.X_STEP],
        block[slots.X_OUTER],
        pointer(block[slots.Y], element),
        gate,
        block[slots.Y_OUTER],
        rows,
        here * block[slots.INNER],
        hi,
        a,
        b,
        sums,
        products,
        block[slots.ACTIVATION],
        real(element, slot_float(block, slots.SLOPE)),
        element,
    )


@plain
def gradient_samples(block, channel, here, row, rows, hi, a, b, by_dz, by_x, constant, centred, element):  # type: ignore[no-untyped-def]
    """dx and dresidual of a run in some samples."""
    gate, to, res = -1, -1, -1
    if block[slots.Y] != 0:
        gate = row * block[slots.Y_OUTER] + channel * block[slots.Y_STEP]
    if block[slots.DX] != 0:
        to = row * block[slots.DX_OUTER] + channel * block[slots.DX_STEP]
    if block[slots.DRESIDUAL] != 0:
        res = row * block[slots.DRESIDUAL_OUTER] + channel * block[slots.DRESIDUAL_STEP]
    gradient_run(
        pointer(block[slots.DY], element),
        row * block[slots.DY_OUTER] + channel * block[slots.DY_STEP],
        block[slots.DY_OUTER],
        pointer(block[slots.X], element),
        row * block[slots.X_OUTER] + channel * block[slots.X_STEP],
        block[slots.X_OUTER],
        pointer(block[slots.Y], element),
        gate,
        block[slots.Y_OUTER],
        pointer(block[slots.DX], element),
        to,
        block[slots.DX_OUTER],
        pointer(block[slots.DRESIDUAL], element),
        res,
        block[slots.DRESIDUAL_OUTER],
        rows,
        here * block[slots.INNER],
        hi,
        a,
        b,
        by_dz,
        by_x,
        constant,
        centred,
        block[slots.ACTIVATION],
        real(element, slot_float(block, slots.SLOPE)),
        may_stream(block, block[slots.DX], block[slots.DX_OUTER], channel * block[slots.DX_STEP], element),
        element,
    )


@plain
def spread_coefficients(block, channel, here, hi, a, b, element):  # type: ignore[no-untyped-def]
    """hi, a and b of a run's channels from MEAN and VAR, to all their places."""
    inner = block[slots.INNER]
    for k in range(here):
        mean, var = read_statistics(block, channel + k)
        hi_k, a_k, b_k = coefficients(block, channel + k, mean, var, element)
        spread(hi, k, inner, hi_k, element)
        spread(a, k, inner, a_k, element)
        spread(b, k, inner, b_k, element)


@plain
def spread_gradient(block, channel, here, sums, products, count, by_dz, by_x, constant, element):  # type: ignore[no-untyped-def]
    """The coefficients of dx of a run's channels, from their sums of dz and dz * x_hat, to all their places."""
    inner = block[slots.INNER]
    for k in range(here):
        mean, var = read_statistics(block, channel + k)
        by_dz_k, by_x_k, constant_k = gradient_coefficients(
            block, channel + k, mean, var, load(sums, k), load(products, k), count, element
        )
        spread(by_dz, k, inner, by_dz_k, element)
        spread(by_x, k, inner, by_x_k, element)
        spread(constant, k, inner, constant_k, element)


@plain
def take_sums(block, channel, here, hi, a, b, sums, products, totals, totals_d, element):  # type: ignore[no-untyped-def]
    """PHASE 0: totals of dz and dz * (x - hi) of a run's channels, chunk by chunk."""
    outer, inner = block[slots.OUTER], block[slots.INNER]
    samples = samples_in_chunk(inner)
    for k in range(here):
        store(totals, k, 0.0)
        store(totals_d, k, 0.0)
    for row in range(0, outer, samples):
        add_up_run(block, channel, here, row, min(samples, outer - row), hi, a, b, sums, products, element)
        for k in range(here):
            store(totals, k, load(totals, k) + fold(sums, k, inner, element))
            store(totals_d, k, load(totals_d, k) + fold(products, k, inner, element))


@plain
def read_sums(block, channel, here, totals, totals_d):  # type: ignore[no-untyped-def]
    """PHASE 2: totals of a run's channels from SCRATCH."""
    outer, channels = block[slots.OUTER], block[slots.CHANNELS]
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    samples = samples_in_chunk(block[slots.INNER])
    for k in range(here):
        total, total_d = 0.0, 0.0
        for chunk in range((outer + samples - 1) // samples):
            at = 2 * (chunk * channels + channel + k)
            total += load(scratch, at)
            total_d += load(scratch, at + 1)
        store(totals, k, total)
        store(totals_d, k, total_d)


@plain
def finish_run(block, channel, here, totals, totals_d, element):  # type: ignore[no-untyped-def]
    """totals_d becomes the sums of dz * x_hat; SUMS, dweight and dbias are written."""
    for k in range(here):
        mean, var = read_statistics(block, channel + k)
        xhat = finish_sums(block, channel + k, mean, var, load(totals, k), load(totals_d, k), element)
        store(totals_d, k, xhat)


@plain
def add_up_runs(block, element):  # type: ignore[no-untyped-def]
    """PHASE 1 of the backward sums: this thread's chunks of all runs, each into SCRATCH."""
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    sums, products = workspace(element, SLACK), workspace(element, SLACK)
    scratch = pointer(block[slots.SCRATCH], FLOAT64)
    samples = samples_in_chunk(inner)
    run, chunks = channels_in_run(block, 1, 2, element), (outer + samples - 1) // samples
    units = (channels + run - 1) // run * chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        channel, chunk = unit // chunks * run, unit % chunks
        here, row = min(run, channels - channel), chunk * samples
        spread_coefficients(block, channel, here, hi, a, b, element)
        add_up_run(block, channel, here, row, min(samples, outer - row), hi, a, b, sums, products, element)
        for k in range(here):
            at = 2 * (chunk * channels + channel + k)
            store(scratch, at, fold(sums, k, inner, element))
            store(scratch, at + 1, fold(products, k, inner, element))


@pasted
def _forward(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        measure_runs(block, element)
        return
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    # The workspaces of the statistics are those of the coefficients afterwards.
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    means, m2s = workspace(FLOAT64, PLACES), workspace(FLOAT64, PLACES)
    run = channels_in_run(block, threads, 1, element)
    runs = (channels + run - 1) // run
    for r in range(runs * thread // threads, runs * (thread + 1) // threads):
        channel = r * run
        here = min(run, channels - channel)
        if block[slots.PHASE] == 0:
            take_moments(block, channel, here, hi, a, b, means, m2s, element)
        else:
            read_moments(block, channel, here, means, m2s)
        for k in range(here):
            count = float64(outer * inner)
            mean, m2 = measured(block, channel + k, count, load(means, k), load(m2s, k), element)
            var = finish_statistics(block, channel + k, count, mean, m2)
            hi_k, a_k, b_k = coefficients(block, channel + k, mean, var, element)
            spread(hi, k, inner, hi_k, element)
            spread(a, k, inner, a_k, element)
            spread(b, k, inner, b_k, element)
        if block[slots.PHASE] == 0:
            normalize_samples(block, channel, here, 0, outer, hi, a, b, element)


@pasted
def _moments(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        measure_runs(block, element)
        return
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    shifts, sums, squares = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    means, m2s = workspace(FLOAT64, PLACES), workspace(FLOAT64, PLACES)
    run = channels_in_run(block, threads, 1, element)
    runs = (channels + run - 1) // run
    for r in range(runs * thread // threads, runs * (thread + 1) // threads):
        channel = r * run
        here = min(run, channels - channel)
        if block[slots.PHASE] == 0:
            take_moments(block, channel, here, shifts, sums, squares, means, m2s, element)
        else:
            read_moments(block, channel, here, means, m2s)
        for k in range(here):
            count = float64(outer * inner)
            mean, m2 = measured(block, channel + k, count, load(means, k), load(m2s, k), element)
            write_moments(block, channel + k, count, mean, m2)


@pasted
def _normalize(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    outer, channels = block[slots.OUTER], block[slots.CHANNELS]
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    samples = samples_in_chunk(block[slots.INNER])
    run, chunks = channels_in_run(block, 1, 1, element), (outer + samples - 1) // samples
    units = (channels + run - 1) // run * chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        channel, row = unit // chunks * run, unit % chunks * samples
        here = min(run, channels - channel)
        spread_coefficients(block, channel, here, hi, a, b, element)
        normalize_samples(block, channel, here, row, min(samples, outer - row), hi, a, b, element)


@pasted
def _backward(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    outer, channels, inner = block[slots.OUTER], block[slots.CHANNELS], block[slots.INNER]
    # The workspaces of the sums are those of the coefficients of dx afterwards.
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    by_dz, by_x, constant = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    totals, totals_d = workspace(FLOAT64, PLACES), workspace(FLOAT64, PLACES)
    count = slot_float(block, slots.COUNT)
    if count == 0.0:
        count = float64(outer * inner)
    training = not math.isinf(count)
    wants_sums = training or block[slots.DWEIGHT] != 0 or block[slots.DBIAS] != 0 or block[slots.SUMS] != 0
    run = channels_in_run(block, threads, 2, element)
    runs = (channels + run - 1) // run
    for r in range(runs * thread // threads, runs * (thread + 1) // threads):
        channel = r * run
        here = min(run, channels - channel)
        spread_coefficients(block, channel, here, hi, a, b, element)
        if wants_sums:
            take_sums(block, channel, here, hi, a, b, by_dz, by_x, totals, totals_d, element)
            finish_run(block, channel, here, totals, totals_d, element)
        spread_gradient(block, channel, here, totals, totals_d, count, by_dz, by_x, constant, element)
        gradient_samples(block, channel, here, 0, outer, hi, a, b, by_dz, by_x, constant, training, element)


@pasted
def _backward_sums(block, element):  # type: ignore[no-untyped-def]
    if block[slots.PHASE] == 1:
        add_up_runs(block, element)
        return
    thread, threads = my_share(block)
    channels = block[slots.CHANNELS]
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    sums, products = workspace(element, SLACK), workspace(element, SLACK)
    totals, totals_d = workspace(FLOAT64, PLACES), workspace(FLOAT64, PLACES)
    run = channels_in_run(block, threads, 2, element)
    runs = (channels + run - 1) // run
    for r in range(runs * thread // threads, runs * (thread + 1) // threads):
        channel = r * run
        here = min(run, channels - channel)
        if block[slots.PHASE] == 0:
            spread_coefficients(block, channel, here, hi, a, b, element)
            take_sums(block, channel, here, hi, a, b, sums, products, totals, totals_d, element)
        else:
            read_sums(block, channel, here, totals, totals_d)
        finish_run(block, channel, here, totals, totals_d, element)


@pasted
def _backward_input(block, element):  # type: ignore[no-untyped-def]
    thread, threads = my_share(block)
    outer, channels = block[slots.OUTER], block[slots.CHANNELS]
    hi, a, b = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    by_dz, by_x, constant = workspace(element, SLACK), workspace(element, SLACK), workspace(element, SLACK)
    totals, totals_d = workspace(FLOAT64, PLACES), workspace(FLOAT64, PLACES)
    given = pointer(block[slots.SUMS], FLOAT64)
    count = slot_float(block, slots.COUNT)
    centred = not math.isinf(count)
    samples = samples_in_chunk(block[slots.INNER])
    run, chunks = channels_in_run(block, 1, 2, element), (outer + samples - 1) // samples
    units = (channels + run - 1) // run * chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        channel, row = unit // chunks * run, unit % chunks * samples
        here = min(run, channels - channel)
        spread_coefficients(block, channel, here, hi, a, b, element)
        if centred:
            for k in range(here):
                store(totals, k, load(given, channel + k))
                store(totals_d, k, load(given, channels + channel + k))
        spread_gradient(block, channel, here, totals, totals_d, count, by_dz, by_x, constant, element)
        rows = min(samples, outer - row)
        gradient_samples(block, channel, here, row, rows, hi, a, b, by_dz, by_x, constant, centred, element)


FORWARD = kernels("outside_short_forward", _forward)
MOMENTS = kernels("outside_short_moments", _moments)
NORMALIZE = kernels("outside_short_normalize", _normalize)
BACKWARD = kernels("outside_short_backward", _backward)
BACKWARD_SUMS = kernels("outside_short_backward_sums", _backward_sums)
BACKWARD_INPUT = kernels("outside_short_backward_input", _backward_input)
