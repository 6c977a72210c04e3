"""A recalibration over the ranks of a process group: each measures its own batches, and all merge what they found."""

from __future__ import annotations

from typing import TypeVar

import torch

from batchnorm.errors import ExchangeError, expected
from batchnorm.lifecycle.recalibration.collect import Collected
from batchnorm.nn.distributed import Wire

T = TypeVar("T")


class Meetings:
    """Where the ranks of a recalibration exchange what they found: at the end of each pass, and before they write.

    A rank that fails comes to the next meeting all the same, so that the others end with an error instead of waiting
    for it.

    Arguments:
        wire: what they exchange over; None where there is one rank
    """

    def __init__(self, wire: Wire | None) -> None:
        self._wire = wire

    @property
    def ranks(self) -> int:
        return 1 if self._wire is None else self._wire.size

    def all(self, found: T) -> list[T]:
        """What every rank found, in the order of the ranks.

        Raises:
            ExchangeError: a rank failed or did not come
        """
        if self._wire is None:
            return [found]
        met: list[tuple[T | None, str | None]] = self._wire.gather_objects((found, None))
        failures = [f"{what} on rank {rank}" for rank, (_, what) in enumerate(met) if what is not None]
        if failures:
            todo = "The error there says what to do. Nothing was changed on any rank."
            invariant = f"every rank of {self._wire.name} to measure its batches"
            raise ExchangeError(expected("recalibrate", invariant, "; ".join(failures), todo))
        return [own for own, _ in met]  # type: ignore[misc]  # None only beside a failure

    def failed(self, error: Exception) -> None:
        """Tell the other ranks that this one cannot go on, unless they know: an exchange failed on all of them."""
        if self._wire is not None and not isinstance(error, ExchangeError):
            self._wire.gather_objects((None, type(error).__name__))

    def collected(self, own: dict[str, Collected], devices: dict[str, torch.device]) -> dict[str, Collected]:
        """What all ranks were shown together, layer by layer, on the layers' devices."""
        if self._wire is None:
            return own
        cpu = torch.device("cpu")
        every = self.all({name: each.to(cpu) for name, each in own.items()})
        return {name: every[0][name].merge(*(e[name] for e in every[1:])).to(devices[name]) for name in own}
