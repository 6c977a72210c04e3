"""What every experiment's command shares: a writable folder, an interruption that loses nothing, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from batchnorm.report.command import FAILED, INTERRUPTED, REFUSED, SUCCESS
from batchnorm.report.files import require_writable, write_whole
from batchnorm.report.table import Table
from batchnorm.report.terminal import Terminal

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


class Recording(Protocol[M_co]):
    """What was recorded so far."""

    @property
    def empty(self) -> bool:
        """Nothing was recorded yet."""

    def metrics(self) -> M_co:
        """All of it; at least one point is needed."""


@dataclass(frozen=True)
class Report(Generic[M]):
    """How an experiment's metrics are shown.

    Attributes:
        files: names of the files that are written.
        contents: the files' contents, by name.
        tables, headline: for the terminal.
        complete: whether nothing is missing.
        reached: how far it came, such as "seed 1, step 4 of 10".
    """

    files: Sequence[str]
    contents: Callable[[M], Mapping[str, bytes]]
    tables: Callable[[M], Sequence[Table]]
    headline: Callable[[M], str]
    complete: Callable[[M], bool]
    reached: Callable[[M], str]


def conduct(
    report: Report[M],
    folder: Path,
    terminal: Terminal,
    start: Callable[[], Recording[M]],
    work: Callable[[], None],
    kept: str = 'what was recorded until then is kept, marked "complete": false.',
) -> int:
    """Run an experiment and write its report, also where it is interrupted.

    Args:
        report: how its metrics are shown.
        folder: where the files go.
        terminal: where course, results and complaints are shown.
        start: loads the data and gives the recording, which ``work`` fills.
        work: trains. A ``KeyboardInterrupt`` may end it at any time.
        kept: what is said after an interruption.

    Returns:
        The exit code: ``SUCCESS``, ``FAILED`` (the results could not be written), ``REFUSED`` (nothing can be written
        to ``folder``; known before training) or ``INTERRUPTED``.

    Raises:
        BatchNormError: what ``start`` and ``work`` raise.
    """
    try:
        require_writable(folder, report.files)
    except OSError as error:
        terminal.complain(
            f"reproduce: expected a folder to write to, got {folder}: {error.strerror}. Choose another --out."
        )
        return REFUSED
    recording: Recording[M] | None = None
    interrupted = False
    try:
        recording = start()
        work()
    except KeyboardInterrupt:
        interrupted = True
    if recording is None or recording.empty:
        terminal.complain("Interrupted before anything was recorded; nothing is written.")
        return INTERRUPTED
    metrics = recording.metrics()
    try:
        try:
            written = write_whole(folder, report.contents(metrics))
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            # The work is done: it takes a second Ctrl-C to lose it.
            written = write_whole(folder, report.contents(metrics))
    except KeyboardInterrupt:
        terminal.complain("Interrupted again while the results were written; nothing is written.")
        return INTERRUPTED
    except OSError as error:
        terminal.show(report.tables(metrics), report.headline(metrics))
        terminal.complain(f"reproduce: the results could not be written to {folder}: {error.strerror}.")
        return FAILED
    terminal.show(report.tables(metrics), report.headline(metrics))
    terminal.say(f"Written to {folder}: {', '.join(path.name for path in written)}")
    if interrupted:
        if report.complete(metrics):
            kept = "that was the last, and all is written."
        terminal.complain(f"Interrupted at {report.reached(metrics)}: {kept}")
        return INTERRUPTED
    return SUCCESS


def encoded(text: str) -> bytes:
    """UTF-8. A path may hold bytes that are no text: "\\udcff" stands for such a byte, in JSON too."""
    return text.encode(errors="backslashreplace")
