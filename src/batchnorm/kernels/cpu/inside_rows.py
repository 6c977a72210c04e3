"""How the channel-inside kernels cut a tensor: rows of channels, chunks of rows, tiles.

A tensor is seen as rows of C channels that lie side by side. Rows are cut into *chunks*, always the same ones
whatever the number of threads: each chunk has partial sums of its own, and these are merged in order, so that
the result has the same bits on any number of threads. A thread takes a run of chunks, the same ones in each
sweep. Inside a chunk, *tiles* of some rows (8 or more, 16 KiB) stay in cache while one wide vector of channels
after the other goes down their rows with its sums in registers; memory some 16 KiB further on is asked for
meanwhile, line by line, because the prefetchers cannot follow such an order.

Rows with few channels are *folded* where memory has no gaps between them: ``fold`` rows are seen as one, so
that rows of 3 channels become rows of 192 columns, and the columns of a channel are added up at the end. The
number of rows is rarely a multiple of ``fold``; what is left makes a last, shorter row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu.channel import counting
from batchnorm.kernels.cpu.inside_wide import byte_at, item_bytes, moved, plain, wide, wide_lanes
from batchnorm.kernels.cpu.scalars import FLOAT64, load, pointer

CHUNK_ROWS = 1024  # at most; a quarter of that where there are more than 256 columns
CHUNKS = 16  # at least, where there are rows enough: work for as many threads
CHUNK_ELEMENTS = 16 * 1024  # a chunk has at least so many, where there are
TILE_BYTES = 16 * 1024
TILE_ROWS = 8  # at least
FOLDED_COLUMNS = 1024  # at most
COEFFICIENTS = 5  # per channel: hi, a, b, k1, k2 (see inside_channels)
ABSENT = -1.0  # the weight of a row that is masked out
PAD = 8  # float64 values: one cache line


class Cut(NamedTuple):
    """How the tensors of a call are cut."""

    merged: bool  # all rows are equally spaced, and outer is 1
    outer: int  # runs of equally spaced rows
    inner: int  # whole (folded) rows in a run
    fold: int  # rows seen as one
    rest: int  # columns of the last, shorter row
    columns: int  # of a whole row: fold * channels
    padded: int  # columns, rounded up to whole wide vectors
    rows: int  # of a chunk
    per_run: int  # chunks in a run
    chunks: int
    tile: int  # rows of a tile
    ahead: int  # how many rows further on memory is asked for


class Rows(NamedTuple):
    """Rows of one tensor."""

    base: Any  # pointer to the first one
    step: int  # elements from one row to the next


@counting
def fold_of(channels, lanes):  # type: ignore[no-untyped-def]
    """How many rows to see as one, so that most lanes of the wide vectors are in use."""
    if channels == 0 or channels >= 0.6 * lanes * ((channels + lanes - 1) // lanes):
        return 1
    divisor, other = channels, lanes
    while other:
        divisor, other = other, divisor % other
    if channels * (lanes // divisor) <= FOLDED_COLUMNS:
        return lanes // divisor
    for fold in range(2, 1 + FOLDED_COLUMNS // channels):
        columns = fold * channels
        if columns >= 0.85 * lanes * ((columns + lanes - 1) // lanes):
            return fold
    return 1


@counting
def cut(merged, gapless, outer, inner, channels, lanes, item_bytes):  # type: ignore[no-untyped-def]
    """The cut of (outer, inner) rows of so many channels."""
    if merged:
        outer, inner = 1, outer * inner
    fold, rest = 1, 0
    if gapless:
        fold = fold_of(channels, lanes)
        if inner < 4 * fold:
            fold = 1
        rest = (inner % fold) * channels
        inner = inner // fold
    columns = fold * channels
    padded = lanes * ((columns + lanes - 1) // lanes)
    least = max(TILE_ROWS, (CHUNK_ELEMENTS + columns - 1) // max(columns, 1))
    most = min(CHUNK_ROWS, max(CHUNK_ROWS // 4, 4 * least))
    rows = min(most, max(least, (outer * inner + CHUNKS - 1) // CHUNKS))
    per_run = (inner + rows - 1) // rows
    ahead = max(TILE_ROWS, TILE_BYTES // max(columns * item_bytes, 1))
    tile = min(rows, ahead)
    return Cut(merged, outer, inner, fold, rest, columns, padded, rows, per_run, outer * per_run, tile, ahead)


@plain
def cut_of(block, element):  # type: ignore[no-untyped-def]
    """The cut that serves all tensors of the block."""
    outer, inner, channels = block[slots.OUTER], block[slots.INNER], block[slots.CHANNELS]
    merged = True
    gapless = block[slots.MASK] == 0 and block[slots.SAMPLE_WEIGHT] == 0
    for tensor in range(6):
        if block[slots.X + tensor] != 0:
            run, row = block[slots.X_OUTER + 2 * tensor], block[slots.X_STEP + 2 * tensor]
            if inner == 1:
                row = run
            elif outer > 1 and run != inner * row:
                merged = False
            if row != channels and outer * inner > 1:
                gapless = False
    return cut(merged, gapless and merged, outer, inner, channels, wide(element), item_bytes(element))


@plain
def rows_in(c, chunk):  # type: ignore[no-untyped-def]
    """How many rows a chunk has, and how many columns the shorter row after them, if any."""
    first = chunk % c.per_run * c.rows
    return min(c.rows, c.inner - first), c.rest if chunk == c.chunks - 1 else 0


@plain
def step_of(block, tensor, c):  # type: ignore[no-untyped-def]
    """Elements from (folded) row to row of a tensor, named by its slot (X, DY, ...)."""
    slot = slots.X_OUTER + 2 * (tensor - slots.X)
    if c.merged and block[slots.INNER] == 1:
        return block[slot] * c.fold
    return block[slot + 1] * c.fold


@plain
def rows_of(block, tensor, c, chunk, element):  # type: ignore[no-untyped-def]
    """The rows of a chunk of a tensor, named by its slot (X, DY, ...)."""
    slot = slots.X_OUTER + 2 * (tensor - slots.X)
    step = step_of(block, tensor, c)
    run = chunk // c.per_run
    at = chunk % c.per_run * c.rows * step
    if not c.merged:
        at += run * block[slot]
    return Rows(pointer(block[tensor] + at * item_bytes(element), element), step)


@plain
def weight_of(block, place):  # type: ignore[no-untyped-def]
    """The weight of a row in the statistics; ABSENT where the mask says so."""
    if block[slots.MASK] != 0 and byte_at(block[slots.MASK] + place) == 0:
        return ABSENT
    if block[slots.SAMPLE_WEIGHT] != 0:
        return load(pointer(block[slots.SAMPLE_WEIGHT], FLOAT64), place)
    return 1.0


@plain
def piece(block, c, chunk, r, rows):  # type: ignore[no-untyped-def]
    """(rows, columns, weight) of what is to be done next in a chunk: at most a tile, and rows of one weight."""
    if r == rows:
        return 1, c.rest, 1.0  # the shorter row after the others
    most = min(c.tile, rows - r)
    if block[slots.MASK] == 0 and block[slots.SAMPLE_WEIGHT] == 0:
        return most, c.columns, 1.0
    place = chunk // c.per_run * c.inner + chunk % c.per_run * c.rows + r
    weight = weight_of(block, place)
    here = 1
    while here < most and weight_of(block, place + here) == weight:
        here += 1
    return here, c.columns, weight


@plain
def ahead_of(c, r, rows):  # type: ignore[no-untyped-def]
    """How many rows after the r-th of a chunk is what to ask for, where the chunk before this one is the next."""
    return c.ahead if r + c.ahead < rows else c.ahead - rows - c.rows


@plain
def below(rows, r):  # type: ignore[no-untyped-def]
    """The rows from the r-th on."""
    return Rows(moved(rows.base, r * rows.step), rows.step)


@plain
def share(total, thread, threads):  # type: ignore[no-untyped-def]
    """This thread's part, [first, last), of so many pieces."""
    return total * thread // threads, total * (thread + 1) // threads


# Where the parts of SCRATCH stand, in float64 values: coefficients of columns, coefficients of channels (where
# rows are folded), partial sums of each chunk, a work area of each thread.


@plain
def at_channels(padded):  # type: ignore[no-untyped-def]
    """Coefficients of the channels, before they are spread over the columns of folded rows."""
    return COEFFICIENTS * padded


@plain
def at_partial(padded, chunk):  # type: ignore[no-untyped-def]
    """Two sums per column, and the count of the chunk's rows."""
    return 2 * COEFFICIENTS * padded + chunk * (2 * padded + PAD)


@plain
def at_sums(padded, chunks, thread):  # type: ignore[no-untyped-def]
    """A shift and two sums per column, in the computing type."""
    return at_partial(padded, chunks) + thread * (5 * padded + PAD)


@plain
def at_totals(padded, chunks, thread):  # type: ignore[no-untyped-def]
    """Two sums per column, over all chunks."""
    return at_sums(padded, chunks, thread) + 3 * padded


def scratch(outer: int, inner: int, channels: int, real_bytes: int, threads: int) -> int:
    """How many float64 values of SCRATCH a call needs; ``real_bytes`` is 8 for float64 tensors, else 4.

    About channels * (10 + 2 * chunks + 5 * threads), where chunks <= 17 + rows / 256.
    """
    lanes = wide_lanes(real_bytes)
    most = 0
    cuts = [(True, False), (True, True)]
    if outer > 1 and inner > 1:
        cuts.append((False, False))
    for merged, gapless in cuts:
        c = cut(merged, gapless, outer, inner, channels, lanes, real_bytes)
        partials = 2 * COEFFICIENTS * c.padded + c.chunks * (2 * c.padded + PAD)
        most = max(most, partials + threads * (5 * c.padded + PAD))
    return most
