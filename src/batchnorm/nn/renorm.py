"""Batch renormalization: training normalizes nearly as inference will."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.autograd import operators
from batchnorm.checks import can_look
from batchnorm.errors import ArgumentError, expected
from batchnorm.moments import Moments, statistics_dtype


@dataclass(frozen=True)
class Renorm:
    r"""The ``renorm`` option of a layer: batch renormalization (Ioffe 2017, arXiv 1702.03275, Algorithm 1).

    .. math::
        \hat x = \frac{x - \mu_B}{\sigma_B}\, r + d, \qquad
        r = \mathrm{clip}_{[1/r_\max,\, r_\max]}\Big(\frac{\sigma_B}{\sigma}\Big), \quad
        d = \mathrm{clip}_{[-d_\max,\, d_\max]}\Big(\frac{\mu_B - \mu}{\sigma}\Big)

    with the batch's mean and standard deviation :math:`\mu_B, \sigma_B = \sqrt{\mathrm{Var}_B + \epsilon}` and the
    running ones :math:`\mu, \sigma = \sqrt{\text{running\_var} + \epsilon}` before this batch moves them. r and d are
    constants for the gradient. Within the limits :math:`\hat x = (x - \mu)/\sigma`, as in eval mode: small or biased
    batches then train the network that is used later. Eval mode is that of plain batch normalization.

    Training starts plain, with the limits 1 and 0, because the running statistics are not yet of use; then both limits
    grow linearly. The layer counts its training forwards in a buffer ``renorm_steps``, which is part of the state dict
    and starts again with ``reset_running_stats``. A checkpoint without it, as of plain batch normalization, leaves
    the count as it is.

    With :math:`r_\max = 1` and :math:`d_\max = 0` the layer is plain batch normalization, bit for bit.

    Arguments:
        r_max: limit of the scale's correction, 1 or more; a ratio
        d_max: limit of the shift's correction, 0 or more, in running standard deviations
        warmup: three numbers of steps: of plain batch normalization, until r_max is reached, until d_max is reached,
            all from the start of training. The default is the paper's; ``(0, 0, 0)`` is none

    Raises:
        ArgumentError: a limit or schedule outside the above

    Under activation checkpointing run forward and backward inside ``batchnorm.defer_updates``, so that the
    recomputation takes r and d from the statistics that the first forward took them from.

    >>> import torch, batchnorm as bn
    >>> layer = bn.BatchNorm1d(3, renorm=Renorm(warmup=(0, 0, 0)))
    >>> x = torch.randn(8, 3)
    >>> torch.allclose(layer(x), x, atol=1e-4)  # running statistics of 0 and 1, and nothing near the limits
    True
    >>> Renorm().limits(22_500)
    (2.0, 4.375)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: tuple[int, int, int] = (5_000, 40_000, 25_000)

    def __post_init__(self) -> None:
        if not 1 <= self.r_max < float("inf"):
            todo = "1 switches the correction of the scale off."
            raise ArgumentError(expected("Renorm", "a finite r_max of 1 or more", self.r_max, todo))
        if not 0 <= self.d_max < float("inf"):
            todo = "0 switches the correction of the shift off."
            raise ArgumentError(expected("Renorm", "a finite d_max of 0 or more", self.d_max, todo))
        given = self.warmup
        if not (isinstance(given, tuple) and len(given) == 3 and all(isinstance(n, int) for n in given)):
            todo = "Give (plain, steps until r_max, steps until d_max); (0, 0, 0) is no warm-up."
            raise ArgumentError(expected("Renorm", "a warmup of three numbers of steps", given, todo))
        plain, until_r, until_d = given
        if not 0 <= plain <= min(until_r, until_d):
            todo = "All three count from the start of training."
            raise ArgumentError(expected("Renorm", "a warmup whose plain steps come first", given, todo))

    @property
    def is_plain(self) -> bool:
        """True if the limits allow no correction."""
        return self.r_max == 1 and self.d_max == 0

    def limits(self, steps: int) -> tuple[float, float]:
        """r_max and d_max after so many training forwards."""
        plain, until_r, until_d = self.warmup
        share_r, share_d = (
            min(max((steps - plain) / (end - plain), 0.0), 1.0) if end > plain else float(steps >= plain)
            for end in (until_r, until_d)
        )
        return 1 + (self.r_max - 1) * share_r, self.d_max * share_d

    def _limit_tensors(self, steps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``limits`` without reading the value of ``steps``."""
        plain, until_r, until_d = self.warmup
        since = (steps - plain).to(dtype)
        share_r, share_d = (
            (since / (end - plain)).clamp(0, 1) if end > plain else (since >= 0).to(dtype) for end in (until_r, until_d)
        )
        return 1 + (self.r_max - 1) * share_r, self.d_max * share_d

    def correction(self, mean: Tensor, var: Tensor, eps: float, steps: Tensor) -> Correction | None:
        """The step between statistics and use after so many forwards; None where nothing is corrected yet."""
        if self.is_plain:
            return None
        if can_look(steps) and steps.is_cpu:
            r_max, d_max = self.limits(int(steps))
            return None if (r_max, d_max) == (1, 0) else Correction(mean, var, eps, r_max, d_max)
        # On another device a look would wait for it; under a compiler it would end the graph.
        return Correction(mean, var, eps, *self._limit_tensors(steps, statistics_dtype(steps.device)))


class Correction(NamedTuple):
    """The ``correct`` seam: r and d of a batch from the running statistics."""

    mean: Tensor  # running, (channels,)
    var: Tensor  # running, (channels,)
    eps: float
    r_max: float | Tensor
    d_max: float | Tensor

    def __call__(self, batch: Moments) -> tuple[Tensor, Tensor]:
        recorded = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        function = operators.recorded_correction if recorded else operators.correction
        like = {"dtype": batch.mean.dtype, "device": batch.mean.device}
        limits = (torch.as_tensor(limit, **like) for limit in (self.r_max, self.d_max))  # type: ignore[arg-type]
        r, d = function(batch.mean, batch.variance(), self.mean, self.var, self.eps, *limits)
        return r, d


def place_steps(layer: nn.Module, renorm: Renorm | None) -> None:
    """Give the layer the buffer that counts its training forwards; take it away without ``renorm``."""
    if renorm is None:
        layer._buffers.pop("renorm_steps", None)
    elif "renorm_steps" not in layer._buffers:
        beside = layer._buffers.get("running_mean")
        device = None if beside is None else beside.device
        layer.register_buffer("renorm_steps", torch.zeros((), dtype=torch.int64, device=device))


def steps_of(layer: nn.Module) -> Tensor:
    """The count, int64 of shape ()."""
    steps: Tensor = layer.renorm_steps  # type: ignore[assignment]
    return steps


def fill_in_steps(layer: nn.Module, state_dict: dict[str, object], prefix: str) -> None:
    """Let a state dict without the count, as that of plain batch normalization, leave the count as it is."""
    steps = layer._buffers.get("renorm_steps")
    if steps is not None:
        held = steps if not steps.is_meta else torch.zeros((), dtype=torch.int64)
        state_dict.setdefault(prefix + "renorm_steps", held)
