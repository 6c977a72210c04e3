"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def write_whole(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into ``folder``, making it where it is missing.

    All are written beside their places under temporary names before the first is renamed, so that a full disk
    or an interruption leaves what was there before, and no reader ever sees half a file. A link stays one: the file
    that it leads to is replaced. A device or a pipe, which cannot be replaced, is written to.

    Args:
        folder: where they go.
        contents: name of each file and what goes into it.

    Returns:
        The paths, in the order of ``contents``.

    Raises:
        OSError: the folder cannot be made or a file cannot be written; nothing is left of what was begun.
    """
    made = _make(folder)
    staged: dict[Path, Path] = {}
    try:
        devices = {}
        for name, content in contents.items():
            path = _place(folder / name)
            if path.exists() and not path.is_file():
                devices[path] = content
                continue
            temporary = _beside(path)
            staged[temporary] = path
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, content in devices.items():
            path.write_bytes(content)
        _rename(staged)
    finally:
        for temporary in staged:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _unmake(made)
    return [folder / name for name in contents]


def require_writable(folder: Path, names: Sequence[str]) -> None:
    """Check that files of these names can be written into ``folder``, before a long run. Leaves nothing behind.

    Raises:
        OSError: the folder cannot be made or written to, or a folder has one of the names.
    """
    made = _make(folder)
    try:
        for name in names:
            path = _place(folder / name)
            if path.exists() and not path.is_file():
                continue
            probe = _beside(path)
            try:
                probe.write_bytes(b".")
            finally:
                with suppress(OSError):
                    probe.unlink(missing_ok=True)
    finally:
        _unmake(made)


def _place(path: Path) -> Path:
    """The real path of the file, through symbolic links.

    Raises:
        OSError: a folder is there
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A link such as /dev/stdout leads to something without a path.
    follow = path.is_symlink() and (path.is_file() or not path.exists())
    return Path(os.path.realpath(path)) if follow else path


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _rename(staged: Mapping[Path, Path]) -> None:
    try:
        for temporary, path in staged.items():
            if temporary.exists():
                temporary.replace(path)
    except KeyboardInterrupt:
        _rename(staged)  # finish: a mix of new and old files is no result, and renaming is quick
        raise


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents. Returns the new ones, the deepest first."""
    missing = []
    place = folder
    while not place.exists() and place != place.parent:
        missing.append(place)
        place = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except BaseException:
        _unmake(missing)
        raise
    return missing


def _unmake(folders: Sequence[Path]) -> None:
    """Remove the empty ones."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
