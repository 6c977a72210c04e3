"""``batchnorm bench`` and ``make bench``: measure a list of entries, say it, and leave files behind."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from batchnorm.bench import machine, plot, results
from batchnorm.bench.cases import MODES, Case, parse_shape, parse_threads
from batchnorm.bench.measure import USER, Plan
from batchnorm.bench.peers import OURS, PEERS
from batchnorm.bench.results import SCHEMA, Report, ResNet, Row
from batchnorm.bench.run import Entry, run
from batchnorm.bench.show import Screen, opening, row_line, show
from batchnorm.errors import ArgumentError, BatchNormError, expected
from batchnorm.report.command import FAILED, INTERRUPTED, REFUSED, SUCCESS
from batchnorm.report.files import require_writable

YARDSTICKS = ("copy", "clone", "memmove")
DEFAULT_PEERS = ("torch", "compile", "onednn")

_SAVE_EVERY = 60.0  # seconds: an interruption by force loses no more


def bench(
    shapes: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    layouts: Sequence[str] | None,
    modes: Sequence[str] | None,
    extras: Sequence[str] | None,
    threads: str,
    peers: str,
    seconds: float,
    json_path: Path | None,
    plot_path: Path | None,
    *,
    quiet: bool,
) -> int:
    """The user's own shapes on the user's own machine.

    Arguments:
        shapes: such as "32,64,56,56", which is the default
        dtypes, layouts, modes, extras: names, see ``cases``. Default: float32, contiguous, every mode, plain
        threads: such as "1,all"
        peers: names from ``peers.PEERS`` with commas between
        seconds: to spend on each case
        json_path, plot_path: files to write
        quiet: plain lines

    Returns:
        the exit code: of ``report.command``; ``FAILED`` where a result of ours was off, networks that should agree
        differ, or the results could not be written

    Raises:
        ArgumentError: one of them is not what it must be; nothing was measured
    """
    if not 0 < seconds < float("inf"):
        raise ArgumentError(expected("bench", "more than 0 seconds for a case", seconds, "Give e.g. 2."))
    # One by one and not by ``product``, which leaves out what does not exist: here that was asked for.
    cases = [
        Case(parse_shape(shape), dtype, layout, mode, extra)
        for shape in shapes or ["32,64,56,56"]
        for dtype in dtypes or ["float32"]
        for layout in layouts or ["contiguous"]
        for extra in extras or ["plain"]
        for mode in modes or MODES
    ]
    for case in cases:
        _fits(case)
    entries = [Entry(case, parse_peers(peers), parse_threads(threads), memory=True) for case in cases]
    plan = Plan(rounds=USER.rounds, enough=USER.enough, budget=seconds)
    return carry_out(entries, plan, "own", Screen(quiet=quiet), json_path=json_path, plot_path=plot_path)


def parse_peers(text: str) -> tuple[str, ...]:
    """The peers named in ``text``, and the copies that are the yardstick.

    >>> parse_peers("torch,onednn")
    ('torch', 'onednn', 'copy', 'clone', 'memmove')
    """
    able = [name for name in PEERS if name not in (OURS, *YARDSTICKS)]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in able:
            raise ArgumentError(expected("bench", f"peers among {', '.join(able)}", repr(name), "Correct the name."))
    return (*dict.fromkeys(names), *YARDSTICKS)


def carry_out(
    entries: Sequence[Entry],
    plan: Plan,
    registry: str,
    screen: Screen,
    *,
    networks: Iterable[Callable[[], ResNet]] = (),
    limit: float = math.inf,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> int:
    """Measure, print, write.

    Arguments:
        entries: what to measure
        plan: how long
        registry: its name, for the JSON
        screen: where it is said
        networks: measurements of ResNet-50, made at the end
        limit: seconds after which no other case is begun; those left out are named in the JSON and counted in print
        json_path: the JSON; written every minute too, with ``complete`` false
        plot_path: a picture, its kind by its suffix

    Returns:
        the exit code, see ``bench``

    Raises:
        ArgumentError: the plot's name has a suffix that says no kind of picture
    """
    if plot_path is not None:
        plot.check(plot_path)
        if plot_path == json_path:
            raise ArgumentError(expected("bench", "two files", f"{plot_path} for both", "Name the JSON otherwise."))
    for path in (json_path, plot_path):
        if path is not None and (why := _unwritable(path)) is not None:
            screen.complain(expected("bench", "a file that can be written", f"{path}: {why}", "Choose another one."))
            return REFUSED
    begun = saved = time.perf_counter()
    finished = failed = False
    report = Report(
        schema=SCHEMA,
        registry=registry,
        complete=False,
        left_out=[],
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=0.0,
        plan=asdict(plan),
        machine=machine.describe(),
        rows=[],
        groups=[],
        resnet50=[],
    )
    here = opening(report["machine"])
    screen.say(here)
    total = sum(len(entry.threads) for entry in entries)

    def in_time() -> Iterator[Entry]:
        for entry in entries:
            if time.perf_counter() - begun < limit:
                yield entry
            else:
                report["left_out"].append(str(entry.case))

    try:
        for row in run(in_time(), plan):
            report["rows"].append(row)
            screen.say(f"[{len(report['rows'])}/{total}] {row_line(row)}")
            if json_path is not None and time.perf_counter() - saved > _SAVE_EVERY:
                saved = time.perf_counter()
                _write(json_path, partial(results.write, report=_closed(report, saved - begun)), screen)
        for network in networks:
            try:
                report["resnet50"].append(network())
            except BatchNormError as error:
                failed = True
                screen.complain(str(error))
        report["complete"] = not report["left_out"]
        finished = True
    except KeyboardInterrupt:
        screen.complain("Interrupted: what was measured until here is kept.")
    report = _closed(report, time.perf_counter() - begun)
    # Files first: what is printed may be lost, and an interruption may come meanwhile.
    lines: list[str | None] = []
    if json_path is not None:
        lines.append(_write(json_path, partial(results.write, report=report), screen))
    if plot_path is not None:
        lines.append(_write(plot_path, partial(plot.draw, rows=report["rows"], machine=here), screen))
    show(screen, report)
    for line in lines:
        if line is not None:
            screen.say(line)
    if None in lines:
        return FAILED
    if not finished:
        return INTERRUPTED
    return FAILED if failed or any(_is_wrong(row) for row in report["rows"]) else SUCCESS


def _write(path: Path, write: Callable[[Path], int], screen: Screen) -> str | None:
    """What to say of the file in the end; None, and a complaint now, where it could not be written."""
    try:
        rows = write(path)
    except OSError as error:
        screen.complain(f"bench: the results could not be written to {path}: {error.strerror}.")
        return None
    return f"Written: {path}" if rows else f"Not written: {path}, since no case has a speed and a copy beside it"


def _fits(case: Case) -> None:
    """Refuse what would end in the middle for want of memory; where its size is unknown, nothing is refused.

    Roughly: the data and what each of the rivals returns in turn, and the two results in float64.
    """
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    needed = 8 * case.bytes + 2 * 8 * case.elements
    if needed > there:
        got = f"{case.size}, which takes about {needed / 2**30:,.0f} GiB of {there / 2**30:,.0f}"
        raise ArgumentError(expected("bench", "a case that fits into memory", got, "Take a smaller batch."))


def _closed(report: Report, seconds: float) -> Report:
    return {**report, "seconds": round(seconds, 1), "groups": results.groups(report["rows"])}


def _is_wrong(row: Row) -> bool:
    return row["peers"][OURS]["status"] == "wrong"


def _unwritable(path: Path) -> str | None:
    try:
        require_writable(path.parent, [path.name])
    except IsADirectoryError:
        return "it is a folder"
    except OSError as error:
        return error.strerror or str(error)
    return None
