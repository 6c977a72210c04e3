"""Batch norms folded into the layers around them, for inference."""

from batchnorm.lifecycle.folding.fold import fold
from batchnorm.lifecycle.folding.report import FoldReport

__all__ = ["FoldReport", "fold"]
