"""What ``convert`` and ``revert`` did: the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChange:
    """One layer and what became of it.

    Arguments:
        name: its path in the model, "" for the root; several, with commas, where the model holds it in several places
        before: the name of its class
        after: the name of its class now, None where it was left as it was
        reason: why it was left, "" where it was changed
    """

    name: str
    before: str
    after: str | None
    reason: str = ""


@dataclass(frozen=True)
class Fusion:
    """One norm and the activation, or addition and activation, that follows it.

    Arguments:
        name: the norm's path
        followed_by: what the trace saw after it: "relu", "add + relu"
        how: what was done, "" where the two were left apart
        reason: why they were left apart, "" where they were joined
    """

    name: str
    followed_by: str
    how: str
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """What was done to each layer and what was left, with the reason. ``print`` shows it as text.

    Arguments:
        function: "convert" or "revert"
        layers: every batch normalization layer of the model, in its order
        fusions: every activation or sum that follows one, where ``fuse=True`` asked for it or ``revert`` undid it
        check: with ``fuse=True``, in words how the fused model's training step compared with the unfused one's
    """

    function: str
    layers: tuple[LayerChange, ...]
    fusions: tuple[Fusion, ...] = ()
    check: str = ""

    @property
    def changed(self) -> tuple[LayerChange, ...]:
        """The layers that were changed."""
        return tuple(each for each in self.layers if each.after is not None)

    @property
    def left(self) -> tuple[LayerChange, ...]:
        """The layers that were left as they were."""
        return tuple(each for each in self.layers if each.after is None)

    def __str__(self) -> str:
        lines = [f"{self.function}: {len(self.changed)} layers changed, {len(self.left)} left as they were"]
        lines += _aligned(
            (each.name or "(the model)", each.before, "->" if each.after else "left:", each.after or each.reason)
            for each in self.layers
        )
        if self.fusions:
            joined = sum(1 for each in self.fusions if not each.reason)
            apart = len(self.fusions) - joined
            done = "taken apart" if self.function == "revert" else "joined"
            lines.append(f"fusions: {joined} {done}, {apart} left as they were")
            lines += _aligned(
                (each.name, each.followed_by, "left:" if each.reason else "", each.reason or each.how)
                for each in self.fusions
            )
        if self.check:
            lines.append(f"check: {self.check}")
        return "\n".join(lines)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = list(rows)
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    padded = (("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False) if w), row[-1]) for row in cells)
    return [f"  {head}  {last}".rstrip() for head, last in padded]
