"""The keys of the JSON that a benchmark leaves behind, and what is computed from its rows.

Times are seconds for one call. Every ratio is taken round by round and is the median over the rounds. Names of peers
are the keys of ``peers.PEERS``; the one called "ours" is this library.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal, TypedDict

from batchnorm.report.files import write_whole

SCHEMA = 1

# From here on a case counts as lost: slower than the fastest of torch eager and oneDNN by more than this.
LOST = 1.05
RIVALS = ("torch", "onednn")


class Timing(TypedDict):
    """One peer in one case."""

    status: Literal["measured", "wrong", "skipped"]
    why: str | None  # what was wrong, or why it was skipped
    median: float | None  # None unless measured, as the next two
    p10: float | None
    p90: float | None
    rounds: int
    calls: int  # in each sample; its time is divided by that


class Memory(TypedDict):
    """Of one step forward and backward, in bytes."""

    kept: int  # for backward, the input included, parameters not
    peak: int  # most that PyTorch had allocated at any time, beyond what was there before


class Row(TypedDict):
    """One case at one number of threads."""

    family: str
    shape: list[int]
    dtype: str
    layout: str
    mode: str
    extra: str
    threads: int
    bytes: int  # of one tensor
    backend: str  # the kernel of ours that ran
    peers: dict[str, Timing]
    times_faster: dict[str, float]  # peer's time / ours
    times_copy: dict[str, float]  # time of ours and of each peer / a copy into memory that exists, the faster one
    times_clone: dict[str, float]  # the same / a copy into fresh memory
    lost: float | None  # ours / the fastest of torch and oneDNN where that is over LOST
    memory: dict[str, Memory] | None  # ours and torch; measured with "forward+backward"
    memory_skipped: str | None  # why it could not be measured


class Extreme(TypedDict):
    """A ratio over several cases."""

    mean: float  # geometric
    worst: float
    shape: list[int]  # where the worst is
    cases: int


class Group(TypedDict):
    """The rows that differ in nothing but their shape."""

    family: str
    dtype: str
    layout: str
    mode: str
    extra: str
    threads: int
    cases: int
    wrong: int  # rows in which ours was off, which have no speed
    times_faster: dict[str, Extreme]
    times_copy: Extreme | None  # of ours
    times_clone: Extreme | None


class Step(TypedDict):
    """One kind of batch normalization in a training step of ResNet-50."""

    median: float
    p10: float
    p90: float
    share: float  # of the step, that goes when the layers are taken out; median over the rounds
    share_p10: float
    share_p90: float
    backend: str | None  # the kernel of ours, for the first layer's input


class ResNet(TypedDict):
    """A training step of ResNet-50: forward, loss, backward, SGD."""

    batch: int
    size: int  # height and width of the images
    dtype: str
    layout: str
    threads: int
    rounds: int
    without: float  # median seconds of the step without batch normalization
    steps: dict[str, Step]  # "torch", "ours", "fused"


class Report(TypedDict):
    """All of it."""

    schema: int
    registry: str  # "short", "full", or "own" for shapes from the command line
    complete: bool  # False: interrupted, or cases were left out
    left_out: list[str]  # cases for which there was no time
    started: str  # UTC, ISO 8601
    seconds: float
    plan: dict[str, float]  # the fields of measure.Plan
    machine: dict[str, Any]  # see machine.describe
    rows: list[Row]
    groups: list[Group]
    resnet50: list[ResNet]


def name_of(row: Row) -> str:
    """The case in words, as ``Case`` writes it, and the threads."""
    extra = "" if row["extra"] == "plain" else f" {row['extra']}"
    case = f"{'×'.join(map(str, row['shape']))} {row['dtype']} {row['layout']} {row['mode']}{extra}"
    return f"{case}, {row['threads']} thread" + ("" if row["threads"] == 1 else "s")


def groups(rows: Iterable[Row]) -> list[Group]:
    """The rows put together by all that is not their shape, in the order in which they first come."""
    together: dict[tuple[str | int, ...], list[Row]] = {}
    for row in rows:
        key = (row["family"], row["dtype"], row["layout"], row["mode"], row["extra"], row["threads"])
        together.setdefault(key, []).append(row)
    return [_group(some) for some in together.values()]


def lost(rows: Iterable[Row]) -> list[Row]:
    """The rows in which a rival is faster, the worst first."""
    return sorted((row for row in rows if row["lost"] is not None), key=lambda row: -(row["lost"] or 0))


def wrong(rows: Iterable[Row]) -> list[tuple[Row, str, str]]:
    """Row, peer and error of each result that was off."""
    return [
        (row, name, timing["why"] or "")
        for row in rows
        for name, timing in row["peers"].items()
        if timing["status"] == "wrong"
    ]


def skipped(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """For each peer and reason, in how many rows it took no part."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name, timing in row["peers"].items():
            if timing["status"] == "skipped":
                reasons = found.setdefault(name, {})
                why = timing["why"] or ""
                reasons[why] = reasons.get(why, 0) + 1
    return found


def memory_skipped(rows: Iterable[Row]) -> dict[str, int]:
    """For each reason, in how many rows memory could not be measured."""
    return dict(Counter(row["memory_skipped"] for row in rows if row["memory_skipped"] is not None))


def write(path: Path, report: Report) -> int:
    """Strict JSON, whole or not at all.

    Returns:
        how many files were written: one

    Raises:
        OSError: it cannot be written
    """
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return len(write_whole(path.parent, {path.name: text.encode()}))


def _group(rows: Sequence[Row]) -> Group:
    first = rows[0]
    peers = dict.fromkeys(name for row in rows for name in row["times_faster"])
    return Group(
        family=first["family"],
        dtype=first["dtype"],
        layout=first["layout"],
        mode=first["mode"],
        extra=first["extra"],
        threads=first["threads"],
        cases=len(rows),
        wrong=sum(row["peers"]["ours"]["status"] == "wrong" for row in rows),
        times_faster={
            name: extreme
            for name in peers
            if (extreme := _extreme([(row["times_faster"], row["shape"]) for row in rows], name, min)) is not None
        },
        times_copy=_extreme([(row["times_copy"], row["shape"]) for row in rows], "ours", max),
        times_clone=_extreme([(row["times_clone"], row["shape"]) for row in rows], "ours", max),
    )


def _extreme(
    ratios: Iterable[tuple[dict[str, float], list[int]]], peer: str, worst: Callable[..., tuple[float, list[int]]]
) -> Extreme | None:
    """Over the rows that have a ratio for ``peer``; ``worst`` is min or max."""
    found = [(of[peer], shape) for of, shape in ratios if peer in of]
    if not found:
        return None
    number, shape = worst(found, key=lambda pair: pair[0])
    return Extreme(mean=geometric_mean([n for n, _ in found]), worst=number, shape=shape, cases=len(found))
