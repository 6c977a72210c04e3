"""Files appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from batchnorm.report.files import require_writable, write_whole


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    written = write_whole(folder, {"one": b"1", "two": b"22"})
    assert written == [folder / "one", folder / "two"]
    assert contents(folder) == {"one": b"1", "two": b"22"}


def test_older_files_are_replaced(tmp_path: Path) -> None:
    write_whole(tmp_path, {"one": b"a longer text than the next"})
    write_whole(tmp_path, {"one": b"new"})
    assert contents(tmp_path) == {"one": b"new"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_the_second_file_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_whole(tmp_path, {"one": b"old", "two": b"old too"})
    fsync = os.fsync
    calls: list[int] = []

    def fail_the_second_time(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise error
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", fail_the_second_time)
    with pytest.raises(type(error)):
        write_whole(tmp_path, {"one": b"new", "two": b"new too"})
    assert contents(tmp_path) == {"one": b"old", "two": b"old too"}


def test_new_files_have_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (path,) = write_whole(tmp_path, {"one": b"1"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    assert contents(tmp_path / "new") == {}


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        require_writable(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        require_writable(tmp_path / "file" / "below")
