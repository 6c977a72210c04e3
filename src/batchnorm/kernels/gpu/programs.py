"""The Triton programs: one source for both layouts, every dtype and every option.

Tensors of the input's size are dense in the order (groups·outer, channels, inner). In the contiguous format ``inner``
is the number of positions; in channels_last and for matrices it is 1, and positions count as ``outer``.

A program owns C_BLOCK channels of one group (program_id 0) and one part of their values (program_id 1). It walks over
tiles of C_BLOCK channels × O_BLOCK rows × I_BLOCK positions: ``_tile`` is the traversal, the functions after it are
what is done with a tile. Where one tile holds all values of a channel (FUSED) the input is read once. Otherwise one
launch leaves partial results in memory, and each program of the next launch merges those of its channels in the order
of the parts: no atomics, so the same input gives the same bits.

Values are converted to float32 as soon as they are loaded; sums over a tile are float32, what is merged is float64.

The pointers are, in every program that has them, None for an operand that is absent:

===========================  ===========================================  ==========================================
x, dy, y, residual           (groups·outer, channels, inner)              read; y is written by ``normalize_program``
dx, dresidual                (groups·outer, channels, inner)              written
mask (uint8), weights        (groups·outer, channels or 1, inner)         read; with channels if PER_CHANNEL
weight, bias                 (groups·channels,)                           read
mean, var                    (groups·channels,)                           read; written if found here (float64)
running_mean, running_var    (groups·channels,)                           read and written
batches (int64)              ()                                           read and written
dweight, dbias               (groups·channels,)                           written
partial, merged (float64)    (3, parts, groups·channels), (3, stride)     count, mean, M2 or Σdz, Σdz·x̂, count
===========================  ===========================================  ==========================================

``outer`` counts the rows of a group; the last group has ``last``. ``stride`` is groups·channels. ``channels`` and
``inner`` come in units of C_UNIT and I_UNIT, so that the compiler knows what they are multiples of.
"""

import os
from typing import Any, TypeAlias

import triton
import triton.language as tl

fp64: TypeAlias = float  # in quotes as Triton reads it; without it a number would be passed as float32

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
IDENTITY, RELU = tl.constexpr(0), tl.constexpr(1)  # 2: leaky ReLU

if INTERPRETED:

    def _steps(n: Any) -> range:
        """The interpreter's own range() makes a conversion that NumPy 2.4 refuses."""
        return range(n.handle.data.item())
else:
    _steps = tl.range


@triton.jit
def _block(outer, last, channels, inner, C_UNIT: tl.constexpr, I_UNIT: tl.constexpr, C_BLOCK: tl.constexpr):
    """What ``_tile`` asks for; where this program's values a channel are, all groups side by side, and which exist."""
    channels *= C_UNIT
    inner *= I_UNIT
    blocks = tl.cdiv(channels, C_BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * C_BLOCK
    there = c + tl.arange(0, C_BLOCK) < channels
    rows = tl.where(group == tl.num_programs(0) // blocks - 1, last, outer)
    return (group * outer, rows, channels, inner, c, there), group * channels + c + tl.arange(0, C_BLOCK), there


@triton.jit
def _tile(tile, shape, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr):
    """Where a tile is, and how many places it has.

    The first of its values in a tensor of x's size, offsets [channels, places] from there, which of them exist, and
    the same [1, places] of a tensor without channels. ``plan`` sees to it that offsets fit into 32 bits, which takes
    half the registers. Only the first value's has 64, and it is a plain number.
    """
    before, outer, channels, inner, c, there = shape
    across = tl.cdiv(inner, I_BLOCK)
    o = (tile // across).to(tl.int64) * O_BLOCK
    i = (tile % across).to(tl.int64) * I_BLOCK
    row = before + o
    p = tl.arange(0, O_BLOCK * I_BLOCK)[None, :]
    rows = tl.minimum(outer - o, O_BLOCK).to(tl.int32)
    width = tl.minimum(inner - i, I_BLOCK).to(tl.int32)
    exists = (p // I_BLOCK < rows) & (p % I_BLOCK < width)
    at = p // I_BLOCK * (channels * inner) + p % I_BLOCK + tl.arange(0, there.shape[0])[:, None] * inner
    place = p // I_BLOCK * inner + p % I_BLOCK
    return ((row * channels + c) * inner + i, at, exists & there[:, None], row * inner + i, place, exists), rows * width


@triton.jit
def _part(shape, per_part, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr):
    """The first tile of this program, and how many it has."""
    first = tl.program_id(1) * per_part
    return first, tl.minimum(per_part, tl.cdiv(shape[1], O_BLOCK) * tl.cdiv(shape[3], I_BLOCK) - first)


@triton.jit
def _read(pointer, spot):
    """As float32. The interpreter gets subnormal bfloat16 wrong, so there the bits are shifted."""
    value = tl.load(pointer + spot[0] + spot[1], mask=spot[2], other=0.0)
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _write(pointer, spot, value):
    """Rounds to nearest even. The interpreter would cut bfloat16 off, so there the bits are rounded."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointer + spot[0] + spot[1], value.to(pointer.dtype.element_ty), mask=spot[2])


@triton.jit
def _places(pointer, spot, PER_CHANNEL: tl.constexpr):
    """Mask or weights of a tile, 0 where there is no such place."""
    if PER_CHANNEL:
        return _read(pointer, spot)
    else:
        w = tl.load(pointer + spot[3] + spot[4], mask=spot[5], other=0.0)
        return tl.where(spot[2], w.to(tl.float32), 0.0)


# Statistics


@triton.jit
def _tile_moments(x, exists, w, count, shift):
    """Count, mean − shift and M2 of a tile; ``w`` are its weights, or None where all ``count`` values count once.

    The mean to float32, then what is left about it: rounding of the first sum cannot reach M2.
    """
    if w is None:
        n = count.to(tl.float64)
        d = tl.where(exists, x - shift[:, None], 0.0)
        near = tl.sum(d, 1) * (1.0 / n).to(tl.float32)
        e = tl.where(exists, d - near[:, None], 0.0)
        first, second = tl.sum(e, 1).to(tl.float64), tl.sum(e * e, 1).to(tl.float64)
        rest = first * (1.0 / n)
    else:
        n = tl.sum(w, 1).to(tl.float64)
        some = 1.0 / tl.where(n > 0, n, 1.0)
        d = tl.where(w > 0, x - shift[:, None], 0.0)
        near = tl.sum(d * w, 1) * some.to(tl.float32)
        e = tl.where(w > 0, d - near[:, None], 0.0)
        first, second = tl.sum(e * w, 1).to(tl.float64), tl.sum(e * e * w, 1).to(tl.float64)
        rest = first * some
    m2 = second - first * rest
    # An infinite value leaves inf − inf in what is left about the mean: the mean itself is infinite, not NaN.
    return n, near.to(tl.float64) + tl.where(tl.abs(rest) < float("inf"), rest, 0.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _merge(n, mean, m2, more, its_mean, its_m2):
    """Chan's formula. Equal means stay exactly equal, and an infinite one infinite."""
    total = n + more
    share = more / tl.where(total > 0, total, 1.0)
    delta = its_mean - mean
    m2 = m2 + its_m2 + delta * delta * (n * share)
    return total, tl.where(tl.abs(mean) < float("inf"), mean + delta * share, mean + its_mean), m2


@triton.jit
def _count(weights, spot, count, PER_CHANNEL: tl.constexpr):
    """How many values a tile has of each channel; one number where all have as many."""
    if weights is None:
        return count.to(tl.float64)
    else:  # a compiled function may return in one place only, or in each branch
        return tl.sum(_places(weights, spot, PER_CHANNEL), 1).to(tl.float64)


@triton.jit
def _given(mean, var, channel, exists):
    m = tl.load(mean + channel, mask=exists, other=0.0).to(tl.float64)
    return m, tl.load(var + channel, mask=exists, other=1.0).to(tl.float64)


@triton.jit
def _finite_value(x, present):
    """One of the finite values of each channel; 0 where there is none."""
    best = tl.max(tl.where(present & (tl.abs(x) < float("inf")), x, -float("inf")), 1)
    return tl.where(best > -float("inf"), best, 0.0)


@triton.jit
def _parts(partial, channel, exists, parts, stride, PARTS: tl.constexpr):
    """What the parts left, three tensors [channels, parts]; 0 where there is no such part."""
    k = tl.arange(0, PARTS)
    at = partial + (k[None, :] * stride + channel[:, None])
    there = (k < parts)[None, :] & exists[:, None]
    row = parts * stride
    return tl.load(at, there, 0.0), tl.load(at + row, there, 0.0), tl.load(at + 2 * row, there, 0.0)


@triton.jit
def _leave(partial, first, second, third, part, parts, stride, channel, exists):
    """Write what ``_parts`` reads."""
    at = partial + (part * stride + channel)
    tl.store(at, first, mask=exists)
    tl.store(at + parts * stride, second, mask=exists)
    tl.store(at + 2 * parts * stride, third, mask=exists)


@triton.jit
def _merged(n, mean, m2):
    """Count, mean and M2 of the whole, from those of the parts; about a part's mean, so that equal ones stay."""
    origin = _finite_value(mean, n > 0)
    total = tl.sum(n, 1)
    off = tl.where(n > 0, mean - origin[:, None], 0.0)
    whole = tl.sum(n * off, 1) / tl.where(total > 0, total, 1.0)
    off = off - whole[:, None]
    return total, origin + whole, tl.sum(m2, 1) + tl.sum(tl.where(n > 0, n * off * off, 0.0), 1)


@triton.jit
def _follow(r, channel, value, exists, factor):
    """r ← r + factor·(value − r), rounded once; a factor of 1 forgets even a NaN."""
    before = tl.load(r + channel, mask=exists, other=0.0).to(tl.float64)
    after = tl.where(factor == 1.0, value, before * (1.0 - factor) + value * factor)
    tl.store(r + channel, after.to(r.dtype.element_ty), mask=exists)


@triton.jit
def _finish(n, mean, m2, channel, exists, mean_out, var_out, running_mean, running_var, batches, factor):
    """Write the batch's statistics and let the running ones follow; one program for each channel does it."""
    tl.store(mean_out + channel, mean, mask=exists)
    tl.store(var_out + channel, m2 / n, mask=exists)
    if running_mean is not None:
        _follow(running_mean, channel, mean, exists, factor)
        _follow(running_var, channel, m2 / (n - 1.0), exists, factor)
    if batches is not None:
        first = tl.program_id(0) == 0
        tl.store(batches, tl.load(batches, mask=first) + 1, mask=first)


# What is done with each value


@triton.jit
def _across(v):
    """One value a channel, beside the places of a tile.

    A single one as a number: as a tensor the compiler may hand it out in a layout that goes through shared memory.
    """
    if v.shape[0] == 1:
        return tl.sum(v, 0)
    else:
        return v[:, None]


@triton.jit
def _coefficients(mean, var, weight, bias, channel, exists, eps):
    """(hi, a, shift), float32, with y = (x − hi)·a + shift; lo = mean − hi and 1/std (float64).

    Near the mean x − hi is exact, so a mean of 1e6 costs nothing; what float32 leaves of it goes into the shift.
    """
    hi = mean.to(tl.float32)
    lo = mean - hi.to(tl.float64)
    lo = tl.where(tl.abs(lo) < float("inf"), lo, 0.0)
    invstd = 1.0 / tl.sqrt(var + eps)
    a = invstd
    if weight is not None:
        a = a * _read(weight, (0, channel, exists)).to(tl.float64)
    shift = -lo * a
    if bias is not None:
        shift = shift + _read(bias, (0, channel, exists)).to(tl.float64)
    return (_across(hi), _across(a.to(tl.float32)), _across(shift.to(tl.float32))), lo, invstd


@triton.jit
def _before_activation(x, residual, spot, line):
    z = (x - line[0]) * line[1] + line[2]
    if residual is not None:
        z = z + _read(residual, spot)
    return z


@triton.jit
def _result(x, residual, mask, spot, line, slope, ACTIVATION: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """y of a tile. NaN passes both activations."""
    z = _before_activation(x, residual, spot, line)
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION != IDENTITY:
        z = tl.where(z > 0, z, z * slope)
    if mask is not None:
        z = tl.where(_places(mask, spot, PER_CHANNEL) > 0, z, 0.0)
    return z


@triton.jit
def _gradient(dy, x, y, residual, mask, spot, line, slope, ACTIVATION: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """dz = dy·activation'(z) and x − hi of a tile, both 0 where absent; y's sign stands for z's where y is given."""
    dz, value = _read(dy, spot), _read(x, spot)
    if ACTIVATION != IDENTITY:
        if y is not None:
            z = _read(y, spot)
        else:
            z = _before_activation(value, residual, spot, line)
        if ACTIVATION == RELU:
            dz = tl.where(z <= 0, 0.0, dz)
        else:
            dz = tl.where(z > 0, dz, dz * slope)
    present = spot[2]
    if mask is not None:
        present = _places(mask, spot, PER_CHANNEL) > 0
        dz = tl.where(present, dz, 0.0)
    return dz, tl.where(present, value - line[0], 0.0)


@triton.jit
def _through_statistics(sum_dz, sum_dz_xhat, n, lo, invstd, channel, exists, dweight, dbias):
    """slope and constant of dx = a·(dz − w·((x − hi)·slope + constant)); the parameters' gradients are written."""
    if tl.program_id(1) == 0:
        if dweight is not None:
            _write(dweight, (0, channel, exists), sum_dz_xhat.to(tl.float32))
        if dbias is not None:
            _write(dbias, (0, channel, exists), sum_dz.to(tl.float32))
    slope = sum_dz_xhat * invstd / n
    return _across(slope.to(tl.float32)), _across((sum_dz / n - lo * slope).to(tl.float32))


@triton.jit
def _write_gradients(dx, dresidual, dz, centred, weights, spot, a, through, PER_CHANNEL: tl.constexpr):
    """dx and the residual's gradient; ``through`` is None where the statistics are constants."""
    if dresidual is not None:
        _write(dresidual, spot, dz)
    if dx is not None:
        if through is not None:
            share = centred * through[0] + through[1]
            if weights is not None:
                w = _places(weights, spot, PER_CHANNEL)
                share = tl.where(w > 0, share * w, 0.0)
            dz = dz - share
        _write(dx, spot, dz * a)


# The launches


@triton.jit
def moments_program(
    x, weights, partial, outer, last, channels, inner, stride, per_part, C_UNIT: tl.constexpr, I_UNIT: tl.constexpr,
    PER_CHANNEL: tl.constexpr, C_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr,
):  # fmt: skip
    """The moments of a part of the values."""
    shape, channel, there = _block(outer, last, channels, inner, C_UNIT, I_UNIT, C_BLOCK)
    first, tiles = _part(shape, per_part, O_BLOCK, I_BLOCK)
    spot, count = _tile(first, shape, O_BLOCK, I_BLOCK)
    shift = tl.zeros((C_BLOCK,), tl.float32)
    if weights is None:
        # One of the values, so that x − shift is 0 throughout a constant channel. Any finite one will do.
        shift = _read(x, (spot[0], tl.min(spot[1], 1), there & (tiles > 0)))
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    n = tl.zeros((C_BLOCK,), tl.float64)
    mean = tl.zeros((C_BLOCK,), tl.float64)
    m2 = tl.zeros((C_BLOCK,), tl.float64)
    for t in _steps(tiles):
        spot, count = _tile(first + t, shape, O_BLOCK, I_BLOCK)
        value = _read(x, spot)
        w = None
        if weights is not None:
            w = _places(weights, spot, PER_CHANNEL)
            shift = tl.where(n > 0, shift, _finite_value(value, w > 0))
        more, its_mean, its_m2 = _tile_moments(value, spot[2], w, count, shift)
        n, mean, m2 = _merge(n, mean, m2, more, its_mean, its_m2)
    mean = tl.where(n > 0, shift.to(tl.float64) + mean, 0.0)
    _leave(partial, n, mean, m2, tl.program_id(1), tl.num_programs(1), stride, channel, there)


@triton.jit
def merge_program(partial, merged, parts, stride, C_BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The moments of the whole, where there are too many parts for each program of the next launch to merge."""
    channel = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    n, mean, m2 = _parts(partial, channel, channel < stride, parts, stride, PARTS)
    n, mean, m2 = _merged(n, mean, m2)
    _leave(merged, n, mean, m2, 0, 1, stride, channel, channel < stride)


@triton.jit
def normalize_program(
    x, residual, mask, weights, y, weight, bias, mean, var, partial, running_mean, running_var, batches,
    outer, last, channels, inner, stride, per_part, parts, eps: "fp64", slope, factor: "fp64",
    C_UNIT: tl.constexpr, I_UNIT: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr, FUSED: tl.constexpr, C_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr,
):  # fmt: skip
    """y, by statistics that are given, that are merged from parts, or (FUSED) that are those of the only tile."""
    shape, channel, there = _block(outer, last, channels, inner, C_UNIT, I_UNIT, C_BLOCK)
    first, tiles = _part(shape, per_part, O_BLOCK, I_BLOCK)
    if FUSED:
        spot, count = _tile(first, shape, O_BLOCK, I_BLOCK)
        value, w, present = _read(x, spot), None, spot[2]
        if weights is not None:
            w = _places(weights, spot, PER_CHANNEL)
            present = w > 0
        shift = _finite_value(value, present)
        n, m, m2 = _tile_moments(value, spot[2], w, count, shift)
        m = shift.to(tl.float64) + m
        _finish(n, m, m2, channel, there, mean, var, running_mean, running_var, batches, factor)
        line, _lo, _invstd = _coefficients(m, m2 / n, weight, bias, channel, there, eps)
        value = _result(value, residual, mask, spot, line, slope, ACTIVATION, PER_CHANNEL)
        _write(y, spot, value)
    else:
        if partial is None:
            m, v = _given(mean, var, channel, there)
        else:
            n, m, m2 = _parts(partial, channel, there, parts, stride, PARTS)
            n, m, m2 = _merged(n, m, m2)
            v = m2 / n
            if tl.program_id(1) == 0:
                _finish(n, m, m2, channel, there, mean, var, running_mean, running_var, batches, factor)
        line, _lo, _invstd = _coefficients(m, v, weight, bias, channel, there, eps)
        for t in _steps(tiles):
            # Backwards: what was measured last may still be in the second-level cache.
            spot, count = _tile(first + (tiles - 1 - t), shape, O_BLOCK, I_BLOCK)
            value = _result(_read(x, spot), residual, mask, spot, line, slope, ACTIVATION, PER_CHANNEL)
            _write(y, spot, value)


@triton.jit
def sums_program(
    dy, x, y, residual, mask, weights, weight, bias, mean, var, partial,
    outer, last, channels, inner, stride, per_part, eps: "fp64", slope,
    C_UNIT: tl.constexpr, I_UNIT: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    C_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over a part of the values that backward needs."""
    shape, channel, there = _block(outer, last, channels, inner, C_UNIT, I_UNIT, C_BLOCK)
    m, v = _given(mean, var, channel, there)
    line, lo, invstd = _coefficients(m, v, weight, bias, channel, there, eps)
    sum_dz = tl.zeros((C_BLOCK,), tl.float64)
    sum_dz_centred = tl.zeros((C_BLOCK,), tl.float64)
    n = tl.zeros((C_BLOCK,), tl.float64)
    first, tiles = _part(shape, per_part, O_BLOCK, I_BLOCK)
    for t in _steps(tiles):
        spot, count = _tile(first + t, shape, O_BLOCK, I_BLOCK)
        dz, centred = _gradient(dy, x, y, residual, mask, spot, line, slope, ACTIVATION, PER_CHANNEL)
        sum_dz += tl.sum(dz, 1).to(tl.float64)
        sum_dz_centred += tl.sum(dz * centred, 1).to(tl.float64)
        n += _count(weights, spot, count, PER_CHANNEL)
    sum_dz_xhat = (sum_dz_centred - lo * sum_dz) * invstd
    _leave(partial, sum_dz, sum_dz_xhat, n, tl.program_id(1), tl.num_programs(1), stride, channel, there)


@triton.jit
def input_program(
    dy, x, y, residual, mask, weights, weight, bias, mean, var, partial, dx, dresidual, dweight, dbias,
    outer, last, channels, inner, stride, per_part, parts, eps: "fp64", slope,
    C_UNIT: tl.constexpr, I_UNIT: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr, FUSED: tl.constexpr, TRAINING: tl.constexpr,
    C_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients, by sums that are merged from parts or (FUSED) that are those of the only tile.

    Not TRAINING: the statistics are constants.
    """
    shape, channel, there = _block(outer, last, channels, inner, C_UNIT, I_UNIT, C_BLOCK)
    m, v = _given(mean, var, channel, there)
    line, lo, invstd = _coefficients(m, v, weight, bias, channel, there, eps)
    first, tiles = _part(shape, per_part, O_BLOCK, I_BLOCK)
    through = None
    if FUSED:
        spot, count = _tile(first, shape, O_BLOCK, I_BLOCK)
        dz, centred = _gradient(dy, x, y, residual, mask, spot, line, slope, ACTIVATION, PER_CHANNEL)
        n = _count(weights, spot, count, PER_CHANNEL)
        sum_dz = tl.sum(dz, 1).to(tl.float64)
        sum_dz_xhat = (tl.sum(dz * centred, 1).to(tl.float64) - lo * sum_dz) * invstd
        through = _through_statistics(sum_dz, sum_dz_xhat, n, lo, invstd, channel, there, dweight, dbias)
        _write_gradients(dx, dresidual, dz, centred, weights, spot, line[1], through, PER_CHANNEL)
    else:
        if partial is not None:
            sum_dz, sum_dz_xhat, n = _parts(partial, channel, there, parts, stride, PARTS)
            sum_dz, sum_dz_xhat, n = tl.sum(sum_dz, 1), tl.sum(sum_dz_xhat, 1), tl.sum(n, 1)
            through = _through_statistics(sum_dz, sum_dz_xhat, n, lo, invstd, channel, there, dweight, dbias)
            if not TRAINING:
                through = None
        for t in _steps(tiles):
            spot, count = _tile(first + (tiles - 1 - t), shape, O_BLOCK, I_BLOCK)
            dz, centred = _gradient(dy, x, y, residual, mask, spot, line, slope, ACTIVATION, PER_CHANNEL)
            _write_gradients(dx, dresidual, dz, centred, weights, spot, line[1], through, PER_CHANNEL)
