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


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "er", ["one"])
    assert contents(tmp_path) == {}
    (tmp_path / "one").write_bytes(b"old")
    require_writable(tmp_path, ["one", "two"])
    assert contents(tmp_path) == {"one": b"old"}


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        require_writable(tmp_path / "file", ["one"])
    with pytest.raises(NotADirectoryError):
        require_writable(tmp_path / "file" / "below", ["one"])


def test_what_was_made_for_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "there" / "a" / "b", {"one": b"1"})
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(OSError, match="too long"):
        require_writable(tmp_path / "there" / "c" / ("x" * 300), ["one"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_an_interruption_between_two_renames_comes_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path, {"one": b"old", "two": b"old too"})
    replace = Path.replace
    calls: list[Path] = []

    def replace_and_interrupt(self: Path, target: Path) -> Path:
        calls.append(self)
        found = replace(self, target)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path, {"one": b"new", "two": b"new too"})
    assert contents(tmp_path) == {"one": b"new", "two": b"new too"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / f"real {name}")
    (tmp_path / "elsewhere" / "real one").write_bytes(b"old")
    write_whole(tmp_path, {"one": b"1", "two": b"2"})
    assert (tmp_path / "one").is_symlink() and (tmp_path / "two").is_symlink()
    assert contents(tmp_path / "elsewhere") == {"real one": b"1", "real two": b"2"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_writable(tmp_path, ["pipe"])
        write_whole(tmp_path, {"pipe": b"through", "file": b"beside"})
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    with pytest.raises(IsADirectoryError):
        require_writable(tmp_path, ["one", "two"])
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, {"one": b"", "two": b""})
    assert list(tmp_path.iterdir()) == [tmp_path / "two"]
