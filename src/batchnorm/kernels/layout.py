"""Any tensor as (outer, channel, inner), without a copy where its strides allow.

Batch normalization only needs to know which values share a channel. In the contiguous format NCHW is (N, C, H·W), in
the channels_last format (N·H·W, C, 1). Results have the memory format of PyTorch's own layer: channels_last where the
strides of the input suggest it, else contiguous. So a sequence (N, L, C) transposed to (N, C, L) gives a contiguous
result, which can be viewed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """How the dimensions of a tensor (channels in dimension 1) are grouped."""

    shape: torch.Size  # of the user's tensor
    outer: tuple[int, ...]  # dimensions merged into the first one, in memory order
    inner: tuple[int, ...]  # dimensions merged into the last one, in memory order
    memory_format: torch.memory_format  # of results

    def view(self, t: Tensor) -> Tensor:
        """``t``, broadcast to ``shape``, as (outer, channel, inner); copied only if its strides require it."""
        t = t.expand(self.shape)
        if self.outer == (0,):
            # The common case in one operation instead of two, which counts beside a small kernel.
            return t.flatten(2) if t.dim() > 2 else t.unsqueeze(2)
        sizes = (_product(self.shape, self.outer), self.shape[1], _product(self.shape, self.inner))
        return t.permute(*self.outer, 1, *self.inner).reshape(sizes)

    def unview(self, view: Tensor) -> Tensor:
        """The inverse of ``view``: a tensor of ``shape`` from (outer, channel, inner)."""
        order = (*self.outer, 1, *self.inner)
        unfolded = view.reshape([self.shape[d] for d in order])
        return unfolded.permute([order.index(d) for d in range(len(order))])

    def empty(self, like: Tensor) -> Tensor:
        """A new dense tensor of ``like``'s shape, dtype and device, which ``view`` does not have to copy."""
        return torch.empty_like(like, memory_format=self.memory_format)


def of(x: Tensor) -> Layout:
    """The layout of ``x``, of rank 2 or more with channels in dimension 1, and of the results for it.

    >>> of(torch.empty(8, 3, 5, 5))[1:]
    ((0,), (2, 3), torch.contiguous_format)
    >>> of(torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last))[1:]
    ((0, 2, 3), (), torch.channels_last)
    >>> of(torch.empty(7, 8, 3).permute(1, 2, 0))[1:]  # a sequence (L, N, C) permuted to (N, C, L)
    ((0,), (2,), torch.contiguous_format)
    """
    shape, rank = x.shape, x.dim()
    memory_format = format_of(x)
    if memory_format is torch.contiguous_format:
        return Layout(shape, (0,), tuple(range(2, rank)), memory_format)
    return Layout(shape, (0, *range(2, rank)), (), memory_format)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of results, as in PyTorch: channels_last where x's strides suggest it, else contiguous."""
    suggested = _CHANNELS_LAST.get(x.dim())
    if suggested is None or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=suggested):
        return suggested
    # As at::Tensor::suggest_memory_format: strides increase in the order channel, width, height, (depth,) batch.
    strides, least = x.stride(), 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[d] == 0 and d == 1:
            return torch.contiguous_format
        if x.shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[d] * x.shape[d]
    return suggested


def merged_stride(shape: torch.Size, strides: tuple[int, ...], dims: tuple[int, ...]) -> int | None:
    """The stride of these dimensions merged into one, the last of them fastest; None if there are gaps between them."""
    result = None
    reach = 0
    for d in reversed(dims):
        if shape[d] == 1:
            continue
        if result is None:
            result = strides[d]
        elif strides[d] != reach:
            return None
        reach = strides[d] * shape[d]
    return 1 if result is None else result


def _product(shape: torch.Size, dims: tuple[int, ...]) -> int:
    result = 1
    for d in dims:
        result *= shape[d]
    return result
