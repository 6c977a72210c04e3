"""What a case is: a shape, how it lies in memory, and what is computed on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.errors import ArgumentError, expected

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# As torch names them: dimensions in order of size of stride, or channels innermost.
LAYOUTS = ("contiguous", "channels_last")
# Training without and with the backward pass, the graph recorded in both; and eval mode without a graph.
MODES = ("forward", "forward+backward", "inference")
# What follows the normalization: nothing, a ReLU, or a sum with another tensor and then a ReLU.
EXTRAS = ("plain", "relu", "residual+relu")

_MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many as were asked for
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """One thing to measure; the number of threads is not part of it.

    Arguments:
        shape: of the input, channels in dimension 1, 2 to 5 dimensions
        dtype: a key of ``DTYPES``. Weight and bias are float32 beside 16 bits, as under autocast
        layout: one of ``LAYOUTS``; "channels_last" needs 4 or 5 dimensions
        mode: one of ``MODES``
        extra: one of ``EXTRAS``
        family: the cases over which a mean is taken

    >>> print(Case((32, 64, 56, 56), "bfloat16", "channels_last", "forward", "relu"))
    32×64×56×56 bfloat16 channels_last forward relu

    Raises:
        ArgumentError: one of them is something else
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    mode: str = "forward+backward"
    extra: str = "plain"
    family: str = "own"

    def __post_init__(self) -> None:
        sizes = ",".join(map(str, self.shape))
        if not 2 <= len(self.shape) <= 5:
            todo = "Give it as N,C or N,C,H,W, e.g. 32,64,56,56."
            raise ArgumentError(expected("bench", "a shape of 2 to 5 sizes, channels second", sizes, todo))
        if min(self.shape) < 1:
            raise ArgumentError(expected("bench", "sizes of 1 or more", sizes, "Correct the shape."))
        _known("dtype", self.dtype, DTYPES)
        _known("layout", self.layout, LAYOUTS)
        _known("mode", self.mode, MODES)
        _known("extra", self.extra, EXTRAS)
        if self.layout == "channels_last" and len(self.shape) not in _FORMATS:
            todo = "Take the contiguous layout."
            raise ArgumentError(expected("bench", "4 or 5 sizes for the layout channels_last", sizes, todo))
        if self.training and self.values == 1:
            todo = "Take a larger batch, or the mode inference."
            raise ArgumentError(expected("bench", "more than 1 value per channel in training", sizes, todo))

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def values(self) -> int:
        """Per channel."""
        return self.elements // self.channels

    @property
    def elements(self) -> int:
        return math.prod(self.shape)  # of any size: whether it fits into memory is asked before it is made

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return self.elements * self.torch_dtype.itemsize

    @property
    def training(self) -> bool:
        return self.mode != "inference"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return _FORMATS[len(self.shape)] if self.layout == "channels_last" else torch.contiguous_format

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))

    def __str__(self) -> str:
        extra = "" if self.extra == "plain" else f" {self.extra}"
        return f"{self.size} {self.dtype} {self.layout} {self.mode}{extra}"


def parse_shape(text: str) -> tuple[int, ...]:
    """The sizes in ``text``, with commas (or ×) between.

    >>> parse_shape("32,64,56,56")
    (32, 64, 56, 56)
    """
    try:
        return tuple(int(part) for part in text.replace("×", ",").split(","))
    except ValueError:
        todo = "Give it as N,C or N,C,H,W, e.g. 32,64,56,56."
        raise ArgumentError(expected("bench", "a shape of whole numbers and commas", repr(text), todo)) from None


def parse_threads(text: str) -> tuple[int, ...]:
    """Numbers of threads with commas between; "all" is what PyTorch uses now.

    >>> parse_threads("1,3")
    (1, 3)
    """
    counts: list[int] = []
    for part in text.split(","):
        word = part.strip()
        if word == "all":
            count = torch.get_num_threads()
        else:
            count = int(word) if word.isascii() and word.isdigit() else 0
        if not 1 <= count <= _MOST_THREADS:
            todo = 'Give e.g. "1,all".'
            raise ArgumentError(expected("bench", f'threads from 1 to {_MOST_THREADS}, or "all"', repr(text), todo))
        if count not in counts:
            counts.append(count)
    return tuple(counts)


def product(
    shapes: Iterable[tuple[int, ...]],
    dtypes: Iterable[str] = ("float32",),
    layouts: Iterable[str] = ("contiguous",),
    extras: Iterable[str] = ("plain",),
    modes: Iterable[str] = MODES,
    *,
    family: str,
) -> list[Case]:
    """Every combination that exists: channels_last is left out where the rank has none.

    The modes vary fastest, so that those which share their data follow each other.
    """
    layouts, dtypes, extras, modes = tuple(layouts), tuple(dtypes), tuple(extras), tuple(modes)
    return [
        Case(shape, dtype, layout, mode, extra, family)
        for shape in shapes
        for dtype in dtypes
        for layout in layouts
        if layout == "contiguous" or len(shape) in _FORMATS
        for extra in extras
        for mode in modes
    ]


def _known(name: str, value: str, known: Any) -> None:
    if value not in known:
        todo = "Choose one of them."
        raise ArgumentError(expected("bench", f"{name} among {', '.join(known)}", repr(value), todo))
