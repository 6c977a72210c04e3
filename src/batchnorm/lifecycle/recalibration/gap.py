"""The gap between training and eval: the same weights on the same batches, normalized by the batch or by statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.recalibration.dependence import tensors_in
from batchnorm.lifecycle.recalibration.observe import Use
from batchnorm.lifecycle.recalibration.passes import Cut, Runner
from batchnorm.moments import Moments


class Gap:
    """Holds the batches and what the model makes of them in training, to be set against eval more than once."""

    def __init__(self, runner: Runner, batches: Sequence[Any]) -> None:
        self._runner = runner
        self._batches: list[Any] = []
        self._outputs: list[list[Tensor]] = []
        for batch in batches:
            whole, output = runner.run(batch, _by_batch)
            if whole:
                self._batches.append(batch)
                self._outputs.append(_values(output))
        if not self._outputs:
            todo = "Give larger batches, or gap_batches=0."
            got = "none that can be normalized by itself"
            raise ArgumentError(expected("recalibrate", "a batch to measure the train/eval gap on", got, todo))

    @property
    def batches(self) -> int:
        return len(self._batches)

    def measure(self) -> tuple[float, dict[str, float]]:
        """The gap of the output, and of each layer that was reached, under the statistics that the layers have now."""
        seen: dict[str, Moments] = {}

        def on_use(use: Use) -> bool:
            if use.input.numel():
                found = use.moments()
                seen[use.name] = seen[use.name].merge(found) if use.name in seen else found
            return False

        difference = size = 0.0
        for batch, trained in zip(self._batches, self._outputs, strict=True):
            _, output = self._runner.run(batch, on_use)
            for now, then in zip(_values(output), trained, strict=True):
                difference += float((now - then).square().sum())
                size += float(then.square().sum())
        output_gap = math.sqrt(difference / size) if size else math.inf if difference else 0.0
        return output_gap, {name: self._of_layer(name, found) for name, found in seen.items()}

    def _of_layer(self, name: str, found: Moments) -> float:
        mean, var = self._runner.observation.statistics(name)
        eps = self._runner.observation.layers[name].eps
        own = found.variance(biased=False)
        shift = (found.mean - mean) / (var + eps).sqrt()
        stretch = own.sqrt() * ((var + eps).rsqrt() - (own + eps).rsqrt())
        return float((shift.square() + stretch.square()).mean().sqrt())


def _by_batch(use: Use) -> bool:
    if use.input.numel():
        found = use.moments()
        if float(found.count.min()) <= 1:
            raise Cut
    return True


def _values(output: object) -> list[Tensor]:
    found = [t.detach().double() for t in tensors_in(output) if t.is_floating_point()]
    if not found:
        todo = "Return the model's output from forward=, or leave gap_batches=0."
        raise ArgumentError(expected("recalibrate", "floating-point output to compare", type(output).__name__, todo))
    return found
