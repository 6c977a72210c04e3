"""What may happen between the statistics of a batch and their use.

A plain training forward measures the batch and normalizes with what it measured, in one fused kernel. Each seam takes
a step in between, so the kernel runs in two phases: moments, then normalize; backward_sums, then backward_input. Every
seam is None in the plain case, which then never looks at them again.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.kernels.contract import Groups
from batchnorm.moments import Moments


class Reducer(Protocol):
    """From the local part of a batch to the whole batch."""

    def moments(self, local: Moments) -> Moments:
        """The moments of the whole batch; differentiable where those of the local part are."""

    def sums(self, local: Tensor) -> Tensor:
        """Σdz and Σdz·x̂ over the whole batch, (2, channels), from those of the local part."""


class Correct(Protocol):
    """Constants r and d in y = ((x − mean)/√(var + eps)·r + d)·weight + bias."""

    def __call__(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """r and d, of the shape of the moments' tensors; no gradient flows through them."""


class Seams(NamedTuple):
    """The steps of one forward, each None where there is none."""

    reducer: Reducer | None = None
    correct: Correct | None = None
    groups: Groups | None = None

    @property
    def is_fused(self) -> bool:
        """True if nothing happens between statistics and use: groups alone, or nothing at all."""
        return self.reducer is None and self.correct is None


PLAIN = Seams()


def corrected(
    weight: Tensor | None, bias: Tensor | None, correction: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias with r and d folded in: weight·r and weight·d + bias.

    ``dtype`` is the input's. The results are float32 or wider, as the kernels take parameters.
    """
    if correction is None:
        return weight, bias
    r, d = correction
    if weight is not None:
        r, d = weight.detach() * r, weight.detach() * d
    if bias is not None:
        d = d + bias.detach()
    wide = torch.promote_types(dtype, torch.float32)
    return r.to(wide), d.to(wide)
