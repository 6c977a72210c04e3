"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def write_whole(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into ``folder``, making it where it is missing.

    All are written beside their places under temporary names before the first is renamed, so that a full disk
    or an interruption leaves what was there before, and no reader ever sees half a file.

    Args:
        folder: where they go.
        contents: name of each file and what goes into it.

    Returns:
        The paths, in the order of ``contents``.

    Raises:
        OSError: the folder cannot be made or a file cannot be written; no half-written file is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            temporary = folder / f".{name}.{os.getpid()}.part"
            staged[temporary] = folder / name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in staged.items():
            temporary.replace(final)
    finally:
        for temporary in staged:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return list(staged.values())


def require_writable(folder: Path) -> None:
    """Make ``folder`` and write a file into it, so that a hopeless place is known before hours of work.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}.part"
    try:
        probe.write_bytes(b".")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
