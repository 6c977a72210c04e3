"""What every command shares: streams that take whatever is printed, signals that let it finish, and exit codes.

A run of hours must not be lost because a terminal has no sign for "−", because ``head`` has read enough, or because
the disk behind standard output is full. While ``run`` is at work, standard output and standard error therefore never
raise: signs that a stream cannot hold are replaced by ASCII, and what cannot be written is dropped.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

SUCCESS = 0
FAILED = 1  # the work was done, but a result is wrong or could not be written
REFUSED = 2  # nothing was done: the request cannot be met
INTERRUPTED = 130  # as a shell counts Ctrl-C
_SIGNALLED = 128  # a shell adds the signal's number

ERRORS = "batchnorm.ascii"
"""Name of the error handler that ``ascii_for`` is, for ``str.encode`` and for streams."""

# What Unicode's own decompositions do not give.
_EQUIVALENTS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": "x", "÷": "/", "±": "+-", "·": ".", "→": "->", "…": "...", "‘": "'",
        "’": "'", "“": '"', "”": '"', "≤": "<=", "≥": ">=", "µ": "u", "Σ": "sum", "σ": "sigma", "μ": "mu", "γ": "gamma",
        "β": "beta", "ε": "eps", "√": "sqrt", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "•": "*", "█": "#",
    }
)  # fmt: skip


def run(name: str, command: Callable[[], int]) -> int:
    """The exit code of ``command``, whatever becomes of the streams that it prints to.

    SIGTERM and SIGHUP come to ``command`` as Ctrl-C does, as a ``KeyboardInterrupt``, so that it can keep what it
    has. Where standard output fails otherwise than by its reader's leaving, one line on standard error says so.

    Args:
        name: of the program, for that line.
        command: prints to ``sys.stdout`` and ``sys.stderr``, and may end with ``SystemExit``.

    Returns:
        Its code, but ``FAILED`` where that is ``SUCCESS`` and its output could not be written, and 128 and the
        signal's number where a signal ended it.
    """
    with _lenient_streams() as failure_of_output, _signals_as_interruptions() as received:
        try:
            code = _code_of(command)
        except KeyboardInterrupt:
            code = INTERRUPTED
        failure = failure_of_output()
        if failure is not None:
            print(f"{name}: the output could not be written: {failure.strerror or failure}.", file=sys.stderr)
            code = code or FAILED
        return _SIGNALLED + received[0] if received and code == INTERRUPTED else code


def ascii_for(error: UnicodeError) -> tuple[str | bytes, int]:
    """The nearest ASCII to a character that an encoding lacks; for ``codecs.register_error``.

    A byte of a file's name that was no text is given back as the byte that it was.

    >>> "3×2 − 1 ± 0.5 é ☃".encode("ascii", ERRORS)
    b'3x2 - 1 +- 0.5 e ?'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    text = unicodedata.normalize("NFKD", character.translate(_EQUIVALENTS))
    return text.encode("ascii", "ignore").decode("ascii") or "?", error.start + 1


codecs.register_error(ERRORS, ascii_for)


class _Outlet(io.RawIOBase):
    """Passes bytes on until that fails once, and takes and drops them from then on."""

    def __init__(self, target: io.RawIOBase) -> None:
        self._target = target
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                while (written := self._target.write(data)) is None:  # a pipe that does not block, and is full
                    select.select([], [self._target], [])
                return written
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes

    def fileno(self) -> int:
        return self._target.fileno()

    def isatty(self) -> bool:
        return self._target.isatty()


@contextmanager
def _lenient_streams() -> Iterator[Callable[[], OSError | None]]:
    """Standard output and error never raise; gives what tells why output was lost, if by more than a closed pipe."""
    before = sys.stdout, sys.stderr
    sys.stdout, outlet = _lenient(sys.stdout)
    sys.stderr, _ = _lenient(sys.stderr)

    def failure() -> OSError | None:
        sys.stdout.flush()
        return None if outlet is None or isinstance(outlet.failure, BrokenPipeError) else outlet.failure

    try:
        yield failure
    finally:
        for stream, old in zip((sys.stdout, sys.stderr), before, strict=True):
            stream.flush()
            if old is None:
                stream.close()
        sys.stdout, sys.stderr = before


def _lenient(stream: TextIO | None) -> tuple[TextIO, _Outlet | None]:
    """A stream in the place of one of Python's. One that is in memory only needs none."""
    if stream is None:  # closed before we began; what is opened must not take its descriptor
        return open(os.devnull, "w", encoding="utf-8"), None
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        return stream, None
    with suppress(OSError):
        stream.flush()
    # Past the stream's own buffer, which would try again, and fail, as the process ends.
    outlet = _Outlet(getattr(buffer, "raw", buffer))
    return (
        io.TextIOWrapper(
            io.BufferedWriter(outlet),
            encoding=stream.encoding,
            errors=ERRORS,
            line_buffering=bool(getattr(stream, "line_buffering", False)),
        ),
        outlet,
    )


@contextmanager
def _signals_as_interruptions() -> Iterator[list[int]]:
    """Raise ``KeyboardInterrupt`` at SIGTERM and SIGHUP, unless they are ignored; gives the numbers of those that came.

    In Python only the main thread can; from another, nothing is changed.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {}
    with suppress(ValueError):
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_of(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return FAILED
        return ended.code or SUCCESS
