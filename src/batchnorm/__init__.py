"""Batch normalization for PyTorch, complete: train, watch, diagnose, recalibrate, freeze, fold, export.

>>> import batchnorm as bn, torch
>>> layer = bn.BatchNorm2d(16, activation="relu")
>>> layer(torch.randn(8, 16, 4, 4)).shape
torch.Size([8, 16, 4, 4])
"""

from batchnorm import functional
from batchnorm.errors import BatchNormError
from batchnorm.kernels import explain, use_backend, warmup
from batchnorm.lifecycle.convert import convert, revert
from batchnorm.lifecycle.folding import fold
from batchnorm.lifecycle.recalibrate import recalibrate
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
)

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
    "convert",
    "explain",
    "fold",
    "functional",
    "recalibrate",
    "revert",
    "use_backend",
    "warmup",
]
