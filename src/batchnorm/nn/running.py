"""How running statistics follow the batches: their weight, their precision, and which batches they skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from batchnorm.checks import finite_channels, nonfinite_channels, raise_nonfinite
from batchnorm.errors import AutogradError, expected
from batchnorm.kernels import plain
from batchnorm.kernels.contract import Running
from batchnorm.moments import Moments
from batchnorm.nn.naming import described


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
    if torch.compiler.is_compiling() or not plain.is_plain(batches):
        # A tensor, not its value: reading that would end the graph here.
        return Running(mean, var, 1.0 / (batches + 1).to(mean.dtype), batches)
    return Running(mean, var, 1.0 / (int(batches) + 1), batches)


@dataclass(frozen=True)
class Guarded:
    """Running statistics that batches with an Inf or NaN do not reach: the sink of ``nonfinite``."""

    layer: nn.Module
    running: Running | None
    policy: Literal["raise", "skip"]

    def take(self, found: Moments) -> None:
        """Follow the batch if it is finite, else leave everything as it is or raise."""
        if self.policy == "skip":
            if self.running is not None:
                self.running.update(found, where=finite_channels(found, self.running).all())
            return
        bad = self._nonfinite(found)
        if bad:
            batches = None if self.running is None else self.running.batches
            raise_nonfinite(described(self.layer), bad, None if batches is None else int(batches) + 1)
        if self.running is not None:
            self.running.update(found)

    def _nonfinite(self, found: Moments) -> list[int]:
        if found.mean.is_meta:
            return []
        if torch.compiler.is_compiling() or plain.is_plain(found.mean):
            return nonfinite_channels(found, self.running)
        try:
            return nonfinite_channels(found, self.running)
        except RuntimeError as error:
            invariant = 'a call in which nonfinite="raise" can look at values'
            got = plain.why_not(found=found.mean)
            todo = 'Use nonfinite="skip", which needs no look.'
            raise AutogradError(expected(type(self.layer).__name__, invariant, got, todo)) from error


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
