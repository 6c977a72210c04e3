"""How running statistics follow the batches: with what weight, and in what precision."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.eager import Running


def following(
    mean: Tensor | None, var: Tensor | None, momentum: float | None, batches: Tensor | None
) -> Running | None:
    """The running statistics with the weight that the next batch gets; None where there are none to update.

    Exponential with a momentum: the weight is the momentum. Cumulative with ``momentum=None``: the k-th batch
    has weight 1/k, so that all count alike. Without a counter nothing can be cumulated and the weight is 0, as
    in torch.
    """
    if mean is None or var is None:
        return None
    if momentum is not None:
        return Running(mean, var, momentum, batches)
    if batches is None:
        return Running(mean, var, 0.0)
    if torch.compiler.is_compiling():
        # A tensor, not its value: reading that would end the compiled graph here.
        return Running(mean, var, 1.0 / (batches + 1).to(mean.dtype), batches)
    return Running(mean, var, 1.0 / (int(batches) + 1), batches)


def at_least_float32(buffer: Tensor, before: Tensor) -> Tensor:
    """``buffer`` as a cast of ``before`` left it, but in no less than float32.

    In bfloat16 with momentum 0.01 a running mean whose true value is 3 sticks at 2.03: the steps get smaller
    than half a unit in the last place. The digits come from ``before``, which the cast did not round.
    """
    if buffer.dtype not in (torch.bfloat16, torch.float16):
        return buffer
    if buffer.is_meta or before.is_meta:
        return buffer.to(torch.float32)
    return before.to(device=buffer.device, dtype=torch.float32)
