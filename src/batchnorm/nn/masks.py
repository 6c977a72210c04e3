"""Masks for batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.checks import can_look
from batchnorm.errors import ArgumentError, DtypeError, expected


def mask_from_lengths(lengths: Tensor | Sequence[int], size: int | None = None) -> Tensor:
    r"""The mask of a padded batch: ``mask[n, t]`` is True where :math:`t < \text{lengths}_n`.

    Give it to a layer's or to ``functional.batch_norm``'s ``mask`` beside an input of shape (N, C, size). For padding
    in front, flip it: ``mask_from_lengths(lengths, size).flip(1)``.

    Arguments:
        lengths: how many positions of each sequence are present, integers from 0 to size, shape (N,)
        size: the padded length. None: the largest length, which reads the values

    Returns:
        bool, shape (N, size), on the device of ``lengths``

    Raises:
        DtypeError: lengths that are no integers
        ArgumentError: lengths of another shape than (N,), below 0 or above size. Their values are checked only where
            that breaks no graph: not under torch.compile, a tracer, a mode or a function transform

    >>> mask_from_lengths([3, 1], 4)
    tensor([[ True,  True,  True, False],
            [ True, False, False, False]])
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        todo = "Convert them first, e.g. lengths.long()."
        raise DtypeError(expected("mask_from_lengths", "integer lengths", lengths.dtype, todo))
    if lengths.dim() != 1:
        todo = "Give one length for each sample."
        raise ArgumentError(expected("mask_from_lengths", "lengths of shape (N,)", tuple(lengths.shape), todo))
    if size is None:
        size = int(lengths.max()) if lengths.numel() else 0
    if can_look(lengths) and lengths.numel():
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0 or longest > size:
            got = f"{shortest} to {longest}"
            todo = "Correct the lengths, or give the padded length as size."
            raise ArgumentError(expected("mask_from_lengths", f"lengths from 0 to {size}", got, todo))
    return torch.arange(size, device=lengths.device) < lengths[:, None]
