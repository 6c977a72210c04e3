"""Run a command as a user does, in a process of its own, with streams that fail, limits and signals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPRODUCE = ("-m", "batchnorm", "reproduce", "--steps", "10")
BENCH = ("-m", "batchnorm", "bench", "--shape", "4,6,5,5", "--peers", "torch", "--threads", "1", "--seconds", "0.01")
BENCHMARKS = ("-m", "benchmarks.run", "--list")
FILES = {"metrics.json", "figure1.png", "figure1.svg", "report.html"}


def command(arguments: Sequence[str | os.PathLike[str]], *, limit: Callable[[], None] | None = None, **others: Any) -> Any:
    """``subprocess.run`` for this interpreter, with the kernels that need no compiling.

    Args:
        arguments: of the interpreter.
        limit: called in the new process before it becomes the interpreter.
        others: ``stdout`` and ``stderr``, both read unless given; ``env``, which is added to the environment.
    """
    environment = {**os.environ, "BATCHNORM_BACKEND": "eager", "PYTHONUTF8": "0", **others.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | others
    return subprocess.run(
        [sys.executable, *map(os.fspath, arguments)], env=environment, preexec_fn=limit, timeout=120, check=False,
        cwd=Path(__file__).parents[1], **streams,
    )  # fmt: skip
