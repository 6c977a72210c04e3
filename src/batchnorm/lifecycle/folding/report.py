"""What folding did, in numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchnorm.lifecycle.folding.plan import Decision, Where

_WORDS: dict[Where, str] = {
    "layer before": "into {into}, before it",
    "layer after": "into {into}, after it",
    "norm after": "into {into}, after it",
    "inside": "into {into}, around it",
    "scale and shift": "left as scale and shift",
}
# Only this many reasons are printed; all of them are in the report.
_SHOWN = 20


@dataclass(frozen=True)
class Errors:
    """In one dtype: largest |difference| over the largest |value|, 0 to 1.

    Arguments:
        outputs: of all of the model's outputs, folded from unfolded
        layers: of each folded norm's layer, by the norm's name, with all layers before it folded too
        unfolded, folded: of either model's outputs from those of the unfolded model in float64; NaN where that
            cannot be run in float64
    """

    outputs: float
    layers: Mapping[str, float]
    unfolded: float
    folded: float


@dataclass(frozen=True)
class Speed:
    """Seconds for one forward of the example, unfolded and folded, taken in turns.

    Arguments:
        before, after: medians
        ratio: before / after, turn by turn, and the median of that
        turns: how many
        where: device, dtype and threads
    """

    before: float
    after: float
    ratio: float
    turns: int
    where: str


@dataclass(frozen=True)
class FoldReport:
    """What became of each batch norm, how far the folded model is from the unfolded one, and how fast it is.

    Arguments:
        decisions: one for each norm that was replaced, in the order of the forward
        left: name and reason of each norm that was left as it was
        errors: by dtype ("float32", "bfloat16", and the model's own)
        not_run: by dtype, why it could not be measured there
        speed: None where it was not measured
        notes: what else there is to know
    """

    decisions: tuple[Decision, ...]
    left: Mapping[str, str]
    errors: Mapping[str, Errors] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    speed: Speed | None = None
    notes: tuple[str, ...] = ()

    @property
    def folded(self) -> int:
        """How many batch norms went into another layer."""
        return sum(each.where != "scale and shift" for each in self.decisions)

    def __str__(self) -> str:
        total = len(self.decisions) + len(self.left)
        lines = [f"{self.folded} of {total} batch norms folded into another layer", *self._table()]
        reasons = {each.norm: each.why for each in self.decisions if each.why}
        lines += _reasons("left as scale and shift, since no neighbour could take them:", reasons)
        lines += _reasons("left as they were:", self.left)
        for dtype, errors in self.errors.items():
            lines.append(
                f"{dtype}: outputs differ by {errors.outputs:.1e} of the largest; from float64 "
                f"{errors.unfolded:.1e} unfolded, {errors.folded:.1e} folded"
            )
        lines += [f"{dtype}: not measured, {why}" for dtype, why in self.not_run.items()]
        if self.speed is not None:
            s = self.speed
            lines.append(
                f"one forward: {_time(s.before)} unfolded, {_time(s.after)} folded, {s.ratio:.2f} times as fast "
                f"(median of {s.turns} turns; {s.where})"
            )
        return "\n".join([*lines, *self.notes])

    def _table(self) -> list[str]:
        rows = [
            (
                each.norm or "(the model)",
                each.kind,
                _WORDS[each.where].format(into=_beside(each.norm, each.into)),
                *(_error(errors.layers.get(each.norm)) for errors in self.errors.values()),
            )
            for each in self.decisions
        ]
        if not rows:
            return []
        heads = ("norm", "kind", "went", *self.errors)
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        return [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
        ]


def _beside(norm: str, other: str) -> str:
    """``other`` as it is called beside the norm: ``.conv1`` where both have one parent, the whole name elsewhere.

    >>> _beside("layer1.0.bn1", "layer1.0.conv1"), _beside("layer1.0.bn1", "stem")
    ('.conv1', 'stem')
    """
    parent, _, name = other.rpartition(".")
    return f".{name}" if parent and parent == norm.rpartition(".")[0] else other or "(the model)"


def _reasons(head: str, reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    lines = [f"  {name or '(the model)'}: {why}" for name, why in list(reasons.items())[:_SHOWN]]
    more = len(reasons) - len(lines)
    return [head, *lines, *([f"  and {more} more"] if more else [])]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
