"""What a layer was shown, and the population statistics that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from batchnorm import checks
from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.recalibration.observe import Use
from batchnorm.moments import Moments

Estimator = Literal["pooled", "paper"]


@dataclass(frozen=True, eq=False)
class Population:
    """Mean and unbiased variance of shape (channels,), float64; of how many values a channel, over how many uses."""

    count: int
    uses: int
    mean: Tensor
    var: Tensor


@dataclass
class Collected:
    """The moments of a layer's input, use by use, as the estimator needs them."""

    name: str
    estimator: Estimator
    uses: int = 0
    pooled: Moments | None = None
    # Under "paper": the uses by their number of values a channel, those of a single sample apart.
    parts: dict[int, list[Moments]] = field(default_factory=dict)
    singles: dict[int, list[Moments]] = field(default_factory=dict)

    def add(self, use: Use, batch: int) -> Moments | None:
        """Measure one use and count it in; None where it holds no values.

        Raises:
            NonFiniteError: an Inf or NaN is among them
            ArgumentError: its size does not go with the others' under "paper"
        """
        if use.input.numel() == 0:
            return None
        found = use.moments()
        if not bool((found.count > 0).any()):
            return None
        bad = checks.nonfinite_channels(found, None)
        if bad:
            checks.raise_nonfinite(f"recalibrate: {use.name} ({type(use.layer).__name__})", bad, batch)
        self.uses += 1
        if self.estimator == "pooled":
            self.pooled = found if self.pooled is None else self.pooled.merge(found)
        else:
            (self.parts if len(use.input) > 1 else self.singles).setdefault(_size(found), []).append(found)
            if len(self.parts) > 1:
                self._unequal(self.parts)
        return found

    def population(self) -> Population | None:
        """The statistics of all that was shown; None if that was nothing.

        Raises:
            ArgumentError: one value a channel has no variance; or sizes that "paper" cannot combine
        """
        if self.estimator == "paper":
            return self._population_of_the_paper()
        if self.pooled is None:
            return None
        if float(self.pooled.count.min()) <= 1:
            self._too_few(self.pooled)
        return Population(_size(self.pooled), self.uses, self.pooled.mean, self.pooled.variance(biased=False))

    def merge(self, *others: Collected) -> Collected:
        """What all of them were shown together, in this order.

        Raises:
            ArgumentError: sizes that do not go together under "paper"
        """
        every = (self, *others)
        pooled = [each.pooled for each in every if each.pooled is not None]
        whole = Collected(self.name, self.estimator, sum(each.uses for each in every))
        whole.pooled = pooled[0].merge(*pooled[1:]) if pooled else None
        for each in every:
            for into, part in ((whole.parts, each.parts), (whole.singles, each.singles)):
                for size, found in part.items():
                    into.setdefault(size, []).extend(found)
        if len(whole.parts) > 1:
            whole._unequal(whole.parts)
        return whole

    def to(self, device: torch.device) -> Collected:
        """The same with its moments on ``device``."""
        parts, singles = (
            {size: [each.to(device) for each in found] for size, found in kept.items()}
            for kept in (self.parts, self.singles)
        )
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Collected(self.name, self.estimator, self.uses, pooled, parts, singles)

    @property
    def left_out(self) -> int:
        """How many uses of a single sample "paper" has to leave out, beside batches of more."""
        sizes = list(self.parts) or [size for size in self.singles if size > 1][:1]
        return sum(len(found) for size, found in self.singles.items() if size not in sizes)

    def _population_of_the_paper(self) -> Population | None:
        if not self.parts and not self.singles:
            return None
        if not self.parts and len(self.singles) > 1 + (1 in self.singles):
            self._unequal(self.singles)
        sizes = list(self.parts) or [size for size in self.singles if size > 1]
        if not sizes or sizes == [1]:
            self._too_few(next(iter((self.parts or self.singles).values()))[0])
        (size,) = sizes
        found = [*self.parts.get(size, []), *self.singles.get(size, [])]
        mean = torch.stack([f.mean for f in found]).mean(0)
        var = torch.stack([f.variance(biased=False) for f in found]).mean(0)
        return Population(size * len(found), len(found), mean, var)

    def _unequal(self, sizes: dict[int, list[Moments]]) -> None:
        invariant = f'mini-batches of one size for {self.name or "the layer"} under estimator="paper"'
        got = f"values a channel from {min(sizes)} to {max(sizes)}"
        todo = 'Drop the last batch, or use estimator="pooled".'
        raise ArgumentError(expected("recalibrate", invariant, got, todo))

    def _too_few(self, found: Moments) -> None:
        invariant = f"more than one value a channel for {self.name or 'the layer'}"
        todo = "Give larger or more batches: a single value has no variance."
        raise ArgumentError(expected("recalibrate", invariant, f"{float(found.count.min()):g}", todo))


def _size(found: Moments) -> int:
    return round(float(found.count.max()))
