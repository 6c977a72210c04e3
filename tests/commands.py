"""Run a command as a user does, in a process of its own, with streams that fail, limits and signals."""

from __future__ import annotations

import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPRODUCE = ("-m", "batchnorm", "reproduce", "--steps", "10")
BENCH = ("-m", "batchnorm", "bench", "--shape", "4,6,5,5", "--peers", "torch", "--threads", "1", "--seconds", "0.01")
BENCHMARKS = ("-m", "benchmarks.run", "--list")
_ROOT = Path(__file__).parents[1]
_PATIENCE = 120  # seconds
FILES = {"metrics.json", "figure1.png", "figure1.svg", "report.html"}


@dataclass(frozen=True)
class Ended:
    """A command that ran on a terminal: its exit code, negative for a signal, and all that was shown."""

    code: int
    text: str


def command(
    arguments: Sequence[str | os.PathLike[str]], *, stdout: Any = subprocess.PIPE, **others: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run this interpreter to the end, with the kernels that need no compiling. For ``others`` see ``start``."""
    with start(arguments, stdout=stdout, **others) as running:
        printed, complaints = running.communicate(timeout=_PATIENCE)
    return subprocess.CompletedProcess(running.args, running.returncode, printed, complaints)


def start(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    stdout: Any = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
    limit: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """The same, not waited for.

    Args:
        arguments: of the interpreter.
        stdout: where standard output goes.
        env: is added to the environment.
        limit: called in the new process before it becomes the interpreter.
    """
    return subprocess.Popen(
        [sys.executable, *map(os.fspath, arguments)], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
        env=_environment(env), preexec_fn=limit, cwd=_ROOT,
    )  # fmt: skip


def small_files_only() -> None:
    """No file of this process may grow beyond a kilobyte."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def on_a_terminal(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    columns: int = 100,
    environment: Mapping[str, str] | None = None,
    send: str = "",
    at: str = "",
) -> Ended:
    """Run it on a terminal of its own, and send it the signal named ``send`` once ``at`` is shown."""
    import fcntl
    import pty
    import termios

    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = _environment({"TERM": "xterm-256color", **(environment or {})})
    with subprocess.Popen(
        [sys.executable, *map(os.fspath, arguments)], stdin=terminal, stdout=terminal, stderr=terminal,
        env=variables, cwd=_ROOT, start_new_session=True,
    ) as running:  # fmt: skip
        os.close(terminal)
        shown = b""
        deadline = time.monotonic() + _PATIENCE
        while True:
            if select.select([keyboard], [], [], 0.1)[0]:
                try:
                    piece = os.read(keyboard, 65536)
                except OSError:  # how Linux says that nobody has the terminal open any more
                    break
                if not piece:
                    break
                shown += piece
            if send and at.encode() in shown:
                running.send_signal(getattr(signal, send))
                send = ""
            if time.monotonic() > deadline:
                running.kill()
    os.close(keyboard)
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    return Ended(running.returncode, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(encoding)))


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    """The same everywhere: no setting of the machine that colours, sizes or encodes what is printed."""
    decided = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")
    kept = {name: value for name, value in os.environ.items() if name not in decided}
    return {**kept, "BATCHNORM_BACKEND": "eager", "LC_ALL": "C.UTF-8", **(added or {})}
