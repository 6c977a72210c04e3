"""``LazyBatchNorm1d``, ``LazyBatchNorm2d`` and ``LazyBatchNorm3d``: the channels are those of the first input."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d


class _Lazy(_LazyNormBase):
    """torch's lazy layers with our extras; they turn into ``cls_to_become``."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **extras: Any,
    ) -> None:
        # Not _LazyNormBase.__init__, which does not accept extras. No channels yet, so nothing is allocated.
        LazyModuleMixin.__init__(
            self, 0, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, **extras
        )
        options: Any = {"device": device, "dtype": dtype}
        if affine:
            self.weight = UninitializedParameter(**options)
            if bias:
                self.bias = UninitializedParameter(**options)
        if track_running_stats:
            self.running_mean = UninitializedBuffer(**options)
            self.running_var = UninitializedBuffer(**options)


class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    """``BatchNorm1d`` that takes the number of channels from its first input, and is a ``BatchNorm1d`` from then on.

    Takes ``BatchNorm1d``'s arguments without ``num_features``, ``momentum`` being the weight of the NEW batch.
    Until the first forward the parameters are uninitialized: build the optimizer after it, as with
    ``torch.nn.LazyBatchNorm1d``.

    >>> import torch
    >>> layer = LazyBatchNorm1d(activation="relu")
    >>> y = layer(torch.randn(8, 3))
    >>> layer
    BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True, activation='relu')
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    """``BatchNorm2d`` that takes the number of channels from its first input, see ``LazyBatchNorm1d``.

    >>> import torch
    >>> layer = LazyBatchNorm2d()
    >>> y = layer(torch.randn(8, 3, 5, 5))
    >>> type(layer).__name__, layer.num_features
    ('BatchNorm2d', 3)
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    """``BatchNorm3d`` that takes the number of channels from its first input, see ``LazyBatchNorm1d``.

    >>> import torch
    >>> layer = LazyBatchNorm3d()
    >>> y = layer(torch.randn(8, 3, 4, 5, 5))
    >>> type(layer).__name__, layer.num_features
    ('BatchNorm3d', 3)
    """

    cls_to_become = BatchNorm3d
