"""What a benchmark says on a terminal, or in plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from batchnorm.bench.peers import OURS, TITLES
from batchnorm.bench.results import (
    Extreme,
    Group,
    Report,
    ResNet,
    Row,
    lost,
    memory_skipped,
    name_of,
    skipped,
    wrong,
)
from batchnorm.report.table import Table

_SHOWN = ("torch", "compile", "onednn", "flax")


class Screen:
    """Results go to standard output, complaints to standard error.

    Arguments:
        quiet: plain lines even on a terminal
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.plain = quiet or not sys.stdout.isatty()

    def say(self, line: str) -> None:
        print(line, flush=True)

    def complain(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def table(self, caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on a terminal; in plain lines each row says what its numbers are."""
        if not rows:
            return
        table = Table(caption, heads, rows)
        if self.plain:
            self.say("\n" + "\n".join(table.lines()))
            return
        from rich.console import Console

        from batchnorm.report.terminal import print_table

        print_table(Console(), table)


def opening(machine: dict[str, Any]) -> str:
    """On what this runs, in a line."""
    caches = ", ".join(f"{name} {size}" for name, size in (machine["caches"] or {}).items())
    versions = machine["versions"]
    built = f" ({machine['commit']})" if machine["commit"] else ""
    return (
        f"{machine['processor'] or 'unknown processor'}, {machine['usable']} of {machine['cores']} cores"
        f"{f', {caches}' if caches else ''}, {machine['capability']}; batchnorm {versions['batchnorm']}{built}, "
        f"torch {versions['torch']}, Python {versions['python']}"
    )


def row_line(row: Row) -> str:
    """One case as it is measured.

    The name of the peer, then how many times as long as ours it takes; below 1, ours is the slower one.
    """
    start = name_of(row)
    own = row["peers"][OURS]
    if own["median"] is None:
        return f"{start}: NO SPEED, {row['backend']} is wrong: {own['why']}"
    parts = [f"{_time(own['median'])} ({row['backend']})"]
    parts += [f"{TITLES[peer]} {_times(row['times_faster'][peer])}" for peer in _SHOWN if peer in row["times_faster"]]
    parts += [f"{TITLES[peer]} WRONG: {why}" for _, peer, why in wrong([row])]
    if OURS in row["times_copy"]:
        parts.append(f"as long as {row['times_copy'][OURS]:.2f} copies")
    if OURS in row["times_clone"]:
        parts.append(f"{row['times_clone'][OURS]:.2f} to fresh memory")
    if row["lost"] is not None:
        parts.append(f"LOST by {row['lost']:.2f}×")
    return f"{start}: {', '.join(parts)}"


def show(screen: Screen, report: Report) -> None:
    """The groups with mean and worst case, then what was lost, wrong or skipped, memory, and ResNet-50."""
    rows = report["rows"]
    _show_groups(screen, report["groups"])
    screen.table(
        "Lost: cases in which torch or oneDNN is faster by more than 5 %, the worst first",
        ("case", "ours ÷ the fastest"),
        [(name_of(row), f"{row['lost'] or 0:.2f}") for row in lost(rows)],
    )
    screen.table(
        "Wrong: results off against float64, for which no speed is reported",
        ("case", "peer", "error"),
        [(name_of(row), TITLES[peer], why) for row, peer, why in wrong(rows)],
    )
    screen.table(
        "Memory of a step forward and backward, ours ÷ torch's",
        ("case", "kept for backward", "peak"),
        _memory_rows(rows),
    )
    _show_resnet(screen, report["resnet50"])
    for peer, reasons in skipped(rows).items():
        if peer != "memmove":  # part of the yardstick, not a rival
            counted = "; ".join(f"{why} ({_plural(count, 'case')})" for why, count in reasons.items())
            screen.say(f"{TITLES[peer]} skipped: {counted}")
    for why, count in memory_skipped(rows).items():
        screen.say(f"Memory not measured: {why} ({_plural(count, 'case')})")
    if report["left_out"]:
        screen.say(f"Left out for want of time: {_plural(len(report['left_out']), 'case')}, named in the JSON")
    if rows:
        screen.say(_verdict(rows))


def _show_groups(screen: Screen, groups: Iterable[Group]) -> None:
    groups = list(groups)
    peers = [name for name in _SHOWN if any(name in group["times_faster"] for group in groups)]
    heads = ["cases", "threads", "n", *(f"faster than {TITLES[name]}" for name in peers), "÷ copy", "÷ fresh copy"]
    screen.table(
        "Geometric mean over the shapes, and in brackets the worst and where it is",
        heads,
        [
            (
                f"{group['family']} {group['dtype']} {group['layout']} {group['mode']}"
                + ("" if group["extra"] == "plain" else f" {group['extra']}"),
                str(group["threads"]),
                str(group["cases"]) + (f", {group['wrong']} WRONG" if group["wrong"] else ""),
                *(_extreme(group["times_faster"].get(name), "×") for name in peers),
                _extreme(group["times_copy"], ""),
                _extreme(group["times_clone"], ""),
            )
            for group in groups
        ],
    )


def _memory_rows(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    found = []
    for row in rows:
        used = row["memory"]
        if used is None or "torch" not in used:
            continue
        kept, peak = (
            f"{_ratio(used[OURS][key], used['torch'][key])} ({_bytes(used[OURS][key])})" for key in ("kept", "peak")
        )
        found.append((name_of(row), kept, peak))
    return found


def _show_resnet(screen: Screen, networks: Sequence[ResNet]) -> None:
    for network in networks:
        image = f"{network['size']}×{network['size']}"
        title = (
            f"A training step of ResNet-50, batch {network['batch']}, {image}, {network['dtype']} "
            f"{network['layout']}, {_threads(network['threads'])}, {network['rounds']} rounds; "
            f"without batch normalization {_time(network['without'])}"
        )
        names = {"torch": "torch", "ours": "batchnorm", "fused": "batchnorm, fused with ReLU and residual"}
        screen.table(
            title,
            ("layers", "step", "of it batch normalization"),
            [
                (
                    names[name] + (f" ({step['backend']})" if step["backend"] else ""),
                    _time(step["median"]),
                    f"{100 * step['share']:.1f} % ({100 * step['share_p10']:.1f} to {100 * step['share_p90']:.1f})",
                )
                for name, step in network["steps"].items()
            ],
        )


def _verdict(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["peers"][OURS]["status"] == "measured"]
    behind = len(lost(rows))
    text = f"{_plural(len(measured), 'case')} measured, {behind or 'none'} lost."
    missing = len(rows) - len(measured)
    return text + (f" In {_plural(missing, 'case')} our own result was wrong." if missing else "")


def _extreme(found: Extreme | None, unit: str) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}{unit} ({found['worst']:.2f}{unit} at {_size(found['shape'])})"


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _ratio(ours: int, other: int) -> str:
    return f"{ours / other:.2f}" if other else "–"


def _threads(count: int) -> str:
    return _plural(count, "thread")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _time(seconds: float) -> str:
    """
    >>> _time(1.5), _time(0.0123), _time(4.56e-5)
    ('1.50 s', '12.3 ms', '45.6 µs')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds >= 10 * size else f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int) -> str:
    """
    >>> _bytes(512), _bytes(25_690_112)
    ('512 B', '24.5 MiB')
    """
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
