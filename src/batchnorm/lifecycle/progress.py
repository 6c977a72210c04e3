"""How far a long run is and how long it will take: a bar of rich where it is installed, else a line of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Called with the work done and the work there is, in batches; None where that is not known.
OnProgress = Callable[[float, float | None], None]

_SECONDS_BETWEEN_LINES = 0.1


@contextmanager
def shown(what: str, progress: bool | OnProgress) -> Iterator[OnProgress]:
    """Where progress goes: to the function given, to standard error, or nowhere."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        # A bar redraws itself: in a file it would be noise.
        drawn = _bar(what) if sys.stderr.isatty() else None
        with drawn or _line(what) as update:
            yield update


def _bar(what: str) -> AbstractContextManager[OnProgress] | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn())

    @contextmanager
    def drawn() -> Iterator[OnProgress]:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return drawn()


@contextmanager
def _line(what: str) -> Iterator[OnProgress]:
    start, written, width = time.monotonic(), -1.0, 0

    def update(done: float, total: float | None) -> None:
        nonlocal written, width
        now = time.monotonic()
        if total is None:
            text = f"{done:.0f} batch{'' if round(done) == 1 else 'es'}"
        else:
            text = f"{100 * done / total:.0f} %, {_duration((now - start) * (total - done) / done)} left"
        if done == total or now - written >= _SECONDS_BETWEEN_LINES:
            print(f"\r{what}: {text:<{width}}", end="", file=sys.stderr, flush=True)
            written, width = now, len(text)

    try:
        yield update
    finally:
        if width:
            print(file=sys.stderr)


def _duration(seconds: float) -> str:
    """``8 s``, ``2 min 5 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
