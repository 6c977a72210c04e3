"""Which options of a layer go together: the one source of the refusals and of the table in the documentation."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import NamedTuple

from batchnorm.errors import ArgumentError, expected

OPTIONS: dict[str, str] = {
    "process_group": "statistics of the batch over all ranks",
    "virtual_batch_size": "statistics of groups within the batch (ghost batches)",
    "renorm": "batch renormalization",
    "mask": "which values are present",
    "sample_weight": "how often a value counts",
    'too_few="running"': "a batch with one value a channel uses the running statistics",
    "nonfinite": 'batches with Inf or NaN: "raise" or "skip"',
    "activation": "a function after the normalization",
    "residual": "a tensor added before the activation",
    "track_running_stats=False": "no running statistics",
    "momentum=None": "running statistics are a cumulative average",
    "domains": "running statistics for each domain",
    "defer_updates": "running statistics move when committed",
    "accumulate_statistics": "one update for several micro-batches",
    "freeze": "statistics stay as they are",
}
"""Every option, and what it does. The last four are functions around a model, the others are those of a layer."""


class Refusal(NamedTuple):
    """Why two options exclude each other, as the parts of an error message."""

    invariant: str
    got: str
    todo: str


REFUSED: dict[tuple[str, str], Refusal] = {
    ("process_group", "virtual_batch_size"): Refusal(
        "one of process_group and virtual_batch_size",
        "both",
        "A virtual batch is smaller than the batch of a rank, a process group's larger: leave one of them away.",
    ),
    ("renorm", "track_running_stats=False"): Refusal(
        "running statistics for renorm", "none tracked", "Track them, or leave renorm away."
    ),
    ('too_few="running"', "track_running_stats=False"): Refusal(
        'running statistics for too_few="running"', "none tracked", 'Track them, or leave too_few="raise".'
    ),
}
"""Pairs that a layer refuses when it is built, in the order of OPTIONS."""

NOTES: dict[tuple[str, str], str] = {
    ("virtual_batch_size", "renorm"): "each virtual batch has an r and d of its own",
    ("virtual_batch_size", "mask"): "each virtual batch needs more than one present value a channel",
    ("virtual_batch_size", "sample_weight"): "as with a mask: the sum of the weights in each virtual batch",
    ("virtual_batch_size", 'too_few="running"'): "if one virtual batch has too few, the whole batch uses them",
    ("renorm", "nonfinite"): "a skipped batch counts as a step of the warm-up",
    ("renorm", "domains"): "r and d are those of the domain; all domains share one warm-up",
    ("renorm", "defer_updates"): "r and d come from what was committed; discarded steps count in the warm-up",
    ("renorm", "accumulate_statistics"): "r and d stay the same for all micro-batches; each counts in the warm-up",
    ("renorm", "freeze"): "frozen statistics are used as in eval mode, and no step is counted",
    ("mask", 'too_few="running"'): "counting the present values ends a compiled graph",
    ("sample_weight", 'too_few="running"'): "as with a mask: the sum of the weights",
    ("track_running_stats=False", "momentum=None"): "nothing is averaged",
    ("track_running_stats=False", "domains"): "layers without running statistics are left alone",
    ("track_running_stats=False", "defer_updates"): "nothing to defer",
    ("track_running_stats=False", "accumulate_statistics"): "nothing to accumulate",
    ("track_running_stats=False", "freeze"): "nothing to freeze: such a layer keeps using the batch",
}
"""What to know of pairs that work together, in the order of OPTIONS."""


def pairs() -> list[tuple[str, str]]:
    """Every pair of options, in the order of OPTIONS."""
    return list(combinations(OPTIONS, 2))


def check_options(function: str, on: Collection[str]) -> None:
    """Raise if two of the options that are ``on`` exclude each other."""
    for pair in combinations([option for option in OPTIONS if option in on], 2):
        refusal = REFUSED.get(pair)
        if refusal is not None:
            raise ArgumentError(expected(function, *refusal))


def table() -> str:
    """The pairs as a Markdown table, with their notes below it: a part of the documentation."""
    numbers = {pair: i for i, pair in enumerate(NOTES, 1)}
    head = ["| | " + " | ".join(f"`{name}`" for name in OPTIONS) + " |", "| --- |" + " :-: |" * len(OPTIONS)]
    rows = []
    for row in OPTIONS:
        cells = []
        for column in OPTIONS:
            pair = (row, column) if (row, column) in set(pairs()) else (column, row)
            cell = "" if row == column else "**no**" if pair in REFUSED else "yes"
            cells.append(cell + (f" ({numbers[pair]})" if pair in numbers else ""))
        rows.append(f"| `{row}` | " + " | ".join(cells) + " |")
    notes = [f"{i}. `{a}` and `{b}`: {NOTES[a, b]}." for (a, b), i in numbers.items()]
    refused = [f"- `{a}` and `{b}`: `{expected('BatchNorm2d', *refusal)}`" for (a, b), refusal in REFUSED.items()]
    return "\n".join([*head, *rows, "", *notes, "", "Refused when the layer is built:", "", *refused, ""])
