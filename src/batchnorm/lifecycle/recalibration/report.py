"""The report of a recalibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from batchnorm.lifecycle.recalibration.collect import Estimator

Order = Literal["joint", "sequential"]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One layer before and after; tensors of shape (channels,), float64.

    Arguments:
        count: values a channel that were measured, over all batches; 0 where no batch reached the layer,
            whose statistics then stay as they were
        uses: how often the layer was shown values
        mean_before, var_before, mean_after, var_after: its running statistics
        gap_before, gap_after: how far its normalized values in eval mode are from those of training, see
            ``recalibrate``; in units of their standard deviation; None where it was not measured
    """

    count: int
    uses: int
    mean_before: Tensor
    var_before: Tensor
    mean_after: Tensor
    var_after: Tensor
    gap_before: float | None = None
    gap_after: float | None = None

    @property
    def mean_shift(self) -> float:
        """The largest move of a channel's mean, in units of its standard deviation after."""
        shift = (self.mean_after - self.mean_before).abs() / self.var_after.sqrt()
        return float(torch.nan_to_num(shift, nan=0.0, posinf=torch.inf).max()) if shift.numel() else 0.0

    @property
    def variance_ratio(self) -> tuple[float, float]:
        """The smallest and the largest factor by which a channel's variance changed."""
        ratio = torch.where(self.var_after == self.var_before, 1.0, self.var_after / self.var_before)
        return (float(ratio.min()), float(ratio.max())) if ratio.numel() else (1.0, 1.0)


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate`` did; ``print`` shows it as a table.

    Arguments:
        estimator, order: as asked for
        batches: how many were seen
        passes: how often they were gone through
        layers: each layer's statistics by name
        left_alone: layers with running statistics that were not to be measured, and why, by name
        gap_before, gap_after: the train/eval gap of the model's output, see ``recalibrate``; a ratio without
            a unit; None where it was not measured
        notes: in words, what was done otherwise than a reader might take for granted
    """

    estimator: Estimator
    order: Order
    batches: int
    passes: int
    layers: dict[str, LayerStatistics]
    left_alone: dict[str, str] = field(default_factory=dict)
    gap_before: float | None = None
    gap_after: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        measured = sum(layer.count > 0 for layer in self.layers.values())
        lines = [
            f"recalibrated {measured} of {counted(len(self.layers), 'layer')} on {counted(self.batches, 'batch')} "
            f"in {counted(self.passes, 'pass')}, order {self.order!r}, estimator {self.estimator!r}"
        ]
        lines += self._table()
        if self.gap_before is not None and self.gap_after is not None:
            lines.append(
                f"train/eval gap of the output: {_percent(self.gap_before)} before, {_percent(self.gap_after)} after"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        shown = [*self.layers, *self.left_alone]
        width = max([5, *(len(name) for name in shown)])
        with_gap = any(layer.gap_before is not None for layer in self.layers.values())
        head = f"{'layer':<{width}}  {'values':>12}  {'mean moved by':>14}  {'variance times':<20}"
        lines = [(head + (f"  {'gap before':>10}  {'after':>10}" if with_gap else "")).rstrip()]
        for name, layer in self.layers.items():
            if layer.count == 0:
                lines.append(f"{name:<{width}}  {0:>12}  not reached by any batch, left as it was")
                continue
            low, high = layer.variance_ratio
            row = (
                f"{name:<{width}}  {layer.count:>12,}  {layer.mean_shift:>10.3g} std  {f'{low:.3g} to {high:.3g}':<20}"
            )
            if layer.gap_before is not None and layer.gap_after is not None:
                row += f"  {layer.gap_before:>6.3g} std  {layer.gap_after:>6.3g} std"
            lines.append(row.rstrip())
        lines += [f"{name:<{width}}  {'':>12}  left alone: {why}" for name, why in self.left_alone.items()]
        return lines


def counted(number: int, thing: str) -> str:
    """``1 batch``, ``2 batches``."""
    plural = "" if number == 1 else "es" if thing[-1] in "hs" else "s"
    return f"{number} {thing}{plural}"


def _percent(gap: float) -> str:
    return f"{100 * gap:.3g} %"
