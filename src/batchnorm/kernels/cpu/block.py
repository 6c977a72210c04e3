"""The argument block: everything a compiled kernel needs, in one run of 8-byte slots.

A kernel is a C function ``void(int64 *block)``. Addresses, sizes and codes are int64; the doubles at the
end are the bits of a float64. Both families (channel outside, channel inside) and all kernels read the same
layout and ignore the slots that they do not use, so that one ``pack`` serves them all. A block is an
immutable ``bytes`` object: each call has its own, which is what makes kernels safe to call from several
Python threads at once.

The first part depends on shapes and options alone and can be packed once and kept (``pack_how``); the
second part changes at each call (``pack_what``). ``block = how + what + far``.

==========================  ================================================================================
slot                        meaning
==========================  ================================================================================
THREAD, THREADS             which thread of how many. ``(-1, 1)``: alone. ``(-1, n)``: ask OpenMP. ``(t,
                            n)``: set by ``threads.launch`` where there is no OpenMP pool
PHASE                       0: the whole kernel; 1: only the partial results into scratch; 2: only their
                            use. Kernels that need every thread to finish first are launched with 1, then
                            with 2
OUTER, CHANNELS, INNER      the tensor seen as (outer, channel, inner)
X_OUTER, X_STEP, ...        strides, in elements, of the two dimensions that are not contiguous: OUTER is
                            that of the outer dimension; STEP that of the channel (channel outside, where
                            inner is contiguous) or of the inner dimension (channel inside, where the
                            channel is contiguous)
PARAMETER_DTYPE             dtype code of weight, bias, dweight, dbias: see ``CODES``
STATISTICS_DTYPE            dtype code of MEAN and VAR
RUNNING_DTYPE               dtype code of RUNNING_MEAN and RUNNING_VAR
ACTIVATION                  0 none, 1 relu, 2 leaky relu with the slope in SLOPE
STREAM                      1: store the outputs around the cache (they are larger than it)
X, DY, Y, RESIDUAL, DX,     addresses of the tensors of x's size; 0 for one that is not there or not wanted.
DRESIDUAL                   In the backward kernels a Y that is not 0 gates dz by the sign of y
WEIGHT, BIAS                (channels,) or 0
MEAN, VAR                   (channels,), read by normalize and the backward kernels; var is biased
STATS                       written, float64: (2, channels) mean and biased var by forward; (3, channels)
                            count, mean and m2 by moments
RUNNING_MEAN, RUNNING_VAR   (channels,), updated in place by forward, or 0
SUMS                        float64 (2, channels): sum of dz, sum of dz * x_hat; written by backward_sums,
                            read by backward_input
DWEIGHT, DBIAS              (channels,) written, or 0
MASK                        uint8 (outer, inner), dense, 1 = present, or 0
SAMPLE_WEIGHT               float64 (outer, inner), dense, or 0
SCRATCH                     float64 workspace; each family's ``scratch`` function says how many values
BATCHES                     int64, raised by one with the running update, or 0
EPS, FACTOR, SLOPE          float64: eps; weight of the new batch in the running update; slope of the leaky
                            relu
COUNT                       float64, read by backward and backward_input: how many values a channel has over all
                            parts; 0: those of this tensor (backward only); inf: evaluation, the statistics are
                            constants and dx = a * dz
FAR                         address of an int64, raised where a channel has numbers that float32 sums and differences
                            cannot hold; what was computed from them is then to be done again. Or 0
==========================  ================================================================================
"""

from __future__ import annotations

import struct
from typing import Final

THREAD: Final = 0
THREADS: Final = 1
PHASE: Final = 2
OUTER: Final = 3
CHANNELS: Final = 4
INNER: Final = 5
X_OUTER: Final = 6
X_STEP: Final = 7
DY_OUTER: Final = 8
DY_STEP: Final = 9
Y_OUTER: Final = 10
Y_STEP: Final = 11
RESIDUAL_OUTER: Final = 12
RESIDUAL_STEP: Final = 13
DX_OUTER: Final = 14
DX_STEP: Final = 15
DRESIDUAL_OUTER: Final = 16
DRESIDUAL_STEP: Final = 17
PARAMETER_DTYPE: Final = 18
STATISTICS_DTYPE: Final = 19
RUNNING_DTYPE: Final = 20
ACTIVATION: Final = 21
STREAM: Final = 22
HOW_SLOTS: Final = 23

X: Final = 23
DY: Final = 24
Y: Final = 25
RESIDUAL: Final = 26
DX: Final = 27
DRESIDUAL: Final = 28
WEIGHT: Final = 29
BIAS: Final = 30
MEAN: Final = 31
VAR: Final = 32
STATS: Final = 33
RUNNING_MEAN: Final = 34
RUNNING_VAR: Final = 35
SUMS: Final = 36
DWEIGHT: Final = 37
DBIAS: Final = 38
MASK: Final = 39
SAMPLE_WEIGHT: Final = 40
SCRATCH: Final = 41
BATCHES: Final = 42
EPS: Final = 43
FACTOR: Final = 44
SLOPE: Final = 45
COUNT: Final = 46
FAR: Final = 47

CODES: Final = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
"""Dtype codes of the per-channel vectors."""

IDENTITY: Final = 0
RELU: Final = 1
LEAKY_RELU: Final = 2

pack_how = struct.Struct(f"{HOW_SLOTS}q").pack
"""Pack slots THREAD to STREAM, in order."""

pack_what = struct.Struct(f"{EPS - HOW_SLOTS}q{FAR - EPS}d").pack
"""Pack slots X to COUNT, in order; the last four are floats."""

pack_far = struct.Struct("q").pack
"""Pack the slot FAR."""
