"""What is done again in float64: inputs with values so large that float32 sums and differences overflow.

Kernels say so themselves (slot FAR of the block), once they know the statistics. It takes several times as long, and
gives what arithmetic without overflow would have given, rounded once to the tensor's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import eager


def is_far(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether kernels would raise FAR with these statistics: for who must know it before they write."""
    if x.dtype == torch.float64:
        return False
    sizes = torch.stack((mean.to(torch.float64).abs(), var.to(torch.float64).sqrt()))
    return bool((sizes.isfinite() & (sizes > eager.LARGE)).any())


def normalize(x: Tensor, *arguments: Any, residual: Tensor | None, **options: Any) -> Tensor:
    """As ``eager.normalize``."""
    return eager.normalize(x.double(), *arguments, residual=_double(residual), **options).to(x.dtype)


def backward_sums(dy: Tensor, x: Tensor, *arguments: Any, y: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """As ``eager.backward_sums``."""
    return eager.backward_sums(dy.double(), x.double(), *arguments, y=_double(y), **options)


def backward_input(
    dy: Tensor, x: Tensor, *arguments: Any, y: Tensor | None, **options: Any
) -> tuple[Tensor | None, Tensor | None]:
    """As ``eager.backward_input``."""
    dx, dresidual = eager.backward_input(dy.double(), x.double(), *arguments, y=_double(y), **options)
    return _like(x, dx), _like(x, dresidual)


def backward(
    dy: Tensor, x: Tensor, *arguments: Any, y: Tensor | None, **options: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``eager.backward``."""
    dx, dweight, dbias, dresidual = eager.backward(dy.double(), x.double(), *arguments, y=_double(y), **options)
    return _like(x, dx), dweight, dbias, _like(x, dresidual)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _like(x: Tensor, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(x.dtype)
