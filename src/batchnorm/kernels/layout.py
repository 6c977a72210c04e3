"""Any tensor seen as (outer, channel, inner), without a copy where its strides allow.

Batch normalization only asks which values share a channel; the order of the other dimensions is free.
So they are sorted as they lie in memory: those with larger strides than the channel's become ``outer``,
the others ``inner``. NCHW gives (N, C, H·W); channels_last gives (N·H·W, C, 1); a transposed sequence or
any other dense permutation finds its own two runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How the dimensions of a tensor (channels in dimension 1) are grouped."""

    shape: torch.Size  # of the tensor as its user sees it
    strides: tuple[int, ...]
    outer: tuple[int, ...]  # dimensions merged into the first one, in memory order
    inner: tuple[int, ...]  # dimensions merged into the last one, in memory order
    dense: bool  # whether the tensor fills its memory, so that empty_like keeps its strides

    def view(self, t: Tensor) -> Tensor:
        """``t``, which broadcasts to ``shape``, as (outer, channel, inner); copied only where strides demand it."""
        t = t.expand(self.shape)
        if self.outer == (0,) and self.inner == tuple(range(2, t.dim())):
            # The common case spelt out: one operation instead of two on the way to small kernels.
            return t.flatten(2) if t.dim() > 2 else t.unsqueeze(2)
        sizes = (_product(self.shape, self.outer), self.shape[1], _product(self.shape, self.inner))
        return t.permute(*self.outer, 1, *self.inner).reshape(sizes)

    def empty(self, like: Tensor) -> Tensor:
        """A new tensor of ``shape``, of ``like``'s dtype and device, that ``view`` sees without a copy.

        It has the strides of the tensor that the layout was taken of, where that was dense.
        """
        if self.dense and like.stride() == self.strides:
            return torch.empty_like(like)
        order = (*self.outer, 1, *self.inner)
        packed = torch.empty([self.shape[d] for d in order], dtype=like.dtype, device=like.device)
        return packed.permute([order.index(d) for d in range(len(order))])


def of(x: Tensor) -> Layout:
    """The layout in which ``x``, of rank 2 or more with channels in dimension 1, is seen without a copy.

    Where no grouping is free of copies (gaps inside a group, overlapping strides), the natural one is
    given, and ``Layout.view`` copies.

    >>> of(torch.empty(8, 3, 5, 5))[2:]
    ((0,), (2, 3), True)
    >>> of(torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last))[2:]
    ((0, 2, 3), (), True)
    >>> of(torch.empty(7, 8, 3).permute(1, 2, 0))[2:]  # a sequence (L, N, C) seen as (N, C, L)
    ((2, 0), (), True)
    """
    shape, strides = x.shape, x.stride()
    natural = tuple(range(2, len(shape)))
    if x.is_contiguous():
        return Layout(shape, strides, (0,), natural, True)
    others = sorted((d for d in range(len(shape)) if d != 1), key=lambda d: (-strides[d], d))
    outer = tuple(d for d in others if strides[d] > strides[1] or shape[d] == 1)
    inner = tuple(d for d in others if d not in outer)
    if merged_stride(shape, strides, outer) is None or merged_stride(shape, strides, inner) is None:
        return Layout(shape, strides, (0,), natural, False)
    return Layout(shape, strides, outer, inner, _is_dense(shape, strides))


def merged_stride(shape: torch.Size, strides: tuple[int, ...], dims: tuple[int, ...]) -> int | None:
    """The stride of these dimensions seen as one, the last of them fastest; None where they have gaps between them."""
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


def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the elements fill one block of memory, each once."""
    step = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _product(shape: torch.Size, dims: tuple[int, ...]) -> int:
    result = 1
    for d in dims:
        result *= shape[d]
    return result
