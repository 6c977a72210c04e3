"""Batch normalization for PyTorch, complete: train, watch, diagnose, recalibrate, freeze, fold, export.

>>> import batchnorm as bn, torch
>>> layer = bn.BatchNorm2d(16, activation="relu")
>>> layer(torch.randn(8, 16, 4, 4)).shape
torch.Size([8, 16, 4, 4])
"""

import importlib
from typing import TYPE_CHECKING

from batchnorm import functional
from batchnorm.errors import BatchNormError
from batchnorm.kernels import explain, use_backend, warmup
from batchnorm.moments import Moments
from batchnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormLinear,
    FrozenBatchNorm2d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    Renorm,
    mask_from_lengths,
)

if TYPE_CHECKING:
    from batchnorm.lifecycle.convert import convert, revert
    from batchnorm.lifecycle.domains import domains, keep_domain, use_domain
    from batchnorm.lifecycle.exact import exact_accumulation
    from batchnorm.lifecycle.folding.fold import fold
    from batchnorm.lifecycle.freeze import freeze, unfreeze
    from batchnorm.lifecycle.recalibrate import recalibrate
    from batchnorm.lifecycle.updates import accumulate_statistics, defer_updates

__version__ = "0.1.0"
__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchNormLinear",
    "FrozenBatchNorm2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "accumulate_statistics",
    "convert",
    "defer_updates",
    "domains",
    "exact_accumulation",
    "explain",
    "fold",
    "freeze",
    "functional",
    "keep_domain",
    "mask_from_lengths",
    "recalibrate",
    "revert",
    "unfreeze",
    "use_backend",
    "use_domain",
    "warmup",
]

# Imported on first use: they take longer than all the rest, and a training run may need none of them.
_ON_FIRST_USE = {
    "convert": "batchnorm.lifecycle.convert",
    "revert": "batchnorm.lifecycle.convert",
    "fold": "batchnorm.lifecycle.folding.fold",
    "recalibrate": "batchnorm.lifecycle.recalibrate",
    "accumulate_statistics": "batchnorm.lifecycle.updates",
    "defer_updates": "batchnorm.lifecycle.updates",
    "exact_accumulation": "batchnorm.lifecycle.exact",
    "freeze": "batchnorm.lifecycle.freeze",
    "unfreeze": "batchnorm.lifecycle.freeze",
    "domains": "batchnorm.lifecycle.domains",
    "keep_domain": "batchnorm.lifecycle.domains",
    "use_domain": "batchnorm.lifecycle.domains",
}


def __getattr__(name: str) -> object:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
