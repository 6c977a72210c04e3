"""Shared by every command: output streams that never raise, signals as interruptions, and exit codes.

A run of several hours must not be lost because the terminal's encoding lacks "−", because ``head`` has closed the
pipe, or because the disk behind standard output is full. Inside ``run``, standard output and standard error therefore
never raise: characters that a stream cannot encode are replaced by ASCII, and output that cannot be written is dropped.
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
"""The name under which ``ascii_for`` is registered as an error handler of encodings."""

# ASCII for characters that Unicode does not decompose.
_EQUIVALENTS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": "x", "÷": "/", "±": "+-", "·": ".", "→": "->", "…": "...", "‘": "'",
        "’": "'", "“": '"', "”": '"', "≤": "<=", "≥": ">=", "µ": "u", "Σ": "sum", "σ": "sigma", "μ": "mu", "γ": "gamma",
        "β": "beta", "ε": "eps", "√": "sqrt", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "•": "*", "█": "#",
    }
)  # fmt: skip


def run(name: str, command: Callable[[], int]) -> int:
    """Run ``command`` and return its exit code, even if the streams that it prints to fail.

    SIGTERM and SIGHUP raise ``KeyboardInterrupt`` in ``command``, as Ctrl-C does, so that it can save its results. If
    standard output fails, other than by a closed pipe, one line on standard error says so.

    Args:
        name: of the program, for that line.
        command: prints to ``sys.stdout`` and ``sys.stderr``, and may end with ``SystemExit``.

    Returns:
        The command's code; ``FAILED`` if that is ``SUCCESS`` but the output could not be written; 128 plus the number
        of the signal if a signal ended it.
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

    A byte of a file name that could not be decoded is written as the original byte.

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
    """Passes bytes on. After the first failure it accepts and drops them."""

    def __init__(self, target: io.RawIOBase) -> None:
        self._target = target
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                while (written := self._target.write(data)) is None:  # a full pipe in non-blocking mode
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
    """Make standard output and error never raise. Yields a function: why output was lost, None for a closed pipe."""
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
    """A stream that replaces one of Python's. A stream in memory is returned as it is."""
    if stream is None:  # closed before the start; a file opened later must not take its descriptor
        return open(os.devnull, "w", encoding="utf-8"), None
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        return stream, None
    with suppress(OSError):
        stream.flush()
    # Bypass the stream's own buffer, which would try to write again at exit, and fail.
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
    """Raise ``KeyboardInterrupt`` at SIGTERM and SIGHUP, unless they are ignored. Yields the signals received.

    Python allows this in the main thread only; in other threads nothing is changed.
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
