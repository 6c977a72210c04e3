"""A command ends as it would have, whatever becomes of the streams it prints to, and learns of signals in time."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchnorm.report.command import ERRORS, FAILED, INTERRUPTED, SUCCESS, run

FULL = Path("/dev/full")


def printing(code: int = SUCCESS) -> int:
    print("1 − 0.5 ± 0.1: ✓")
    sys.stdout.flush()
    print("complaint: 3×2", file=sys.stderr)
    return code


def bytes_stream(encoding: str) -> tuple[io.TextIOWrapper, io.BytesIO]:
    buffer = io.BytesIO()
    return io.TextIOWrapper(buffer, encoding=encoding, newline="\n"), buffer


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", "1 − 0.5 ± 0.1: ✓\n".encode()),
        ("cp1252", b"1 - 0.5 \xb1 0.1: ?\n"),
        ("ascii", b"1 - 0.5 +- 0.1: ?\n"),
        ("utf-16-le", "1 − 0.5 ± 0.1: ✓\n".encode("utf-16-le")),
    ],
)
def test_what_a_stream_cannot_encode_is_said_in_ascii(
    monkeypatch: pytest.MonkeyPatch, encoding: str, line: bytes
) -> None:
    stream, written = bytes_stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("batchnorm", printing) == SUCCESS
    assert written.getvalue().replace(os.linesep.encode(), b"\n") == line
    assert sys.stdout is stream


def test_letters_lose_their_accents_and_bytes_of_names_come_back() -> None:
    assert "naïve é, Ångström, … ¼ ½ \udcff".encode("ascii", ERRORS) == b"naive e, Angstrom, ... 14 12 \xff"
    assert "−\udcff−".encode("cp1252", ERRORS) == b"-\xff-"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", ERRORS)


def test_nothing_is_said_of_a_pipe_whose_reader_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("batchnorm", printing) == SUCCESS
        assert run("batchnorm", lambda: printing(7)) == 7
    assert capsys.readouterr().err == "complaint: 3×2\n" * 2


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_behind_standard_output_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FULL.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("batchnorm", printing) == FAILED
        said = "complaint: 3×2\nbatchnorm: the output could not be written: No space left on device.\n"
        assert capsys.readouterr().err == said
        assert run("batchnorm", lambda: printing(7)) == 7
        monkeypatch.setattr(sys, "stderr", stream)
        assert run("batchnorm", printing) == FAILED


def test_closed_streams_are_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("batchnorm", printing) == SUCCESS


@pytest.mark.skipif(os.name == "nt", reason="pipes always block on Windows")
def test_a_pipe_that_does_not_block_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "0123456789" * 50_000  # more than the pipe holds
    received: list[bytes] = []

    def read() -> None:
        while piece := os.read(reader, 4096):
            received.append(piece)

    thread = threading.Thread(target=read)

    def command() -> int:
        while select.select([], [writer], [], 0)[1]:
            os.write(writer, b"#" * 4096)
        thread.start()
        print(text)
        return SUCCESS

    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("batchnorm", command) == SUCCESS
    thread.join()
    os.close(reader)
    assert b"".join(received).lstrip(b"#").decode() == text + "\n"


def ended(code: object) -> Callable[[], int]:
    def command() -> int:
        raise SystemExit(code)

    return command


def test_codes_of_a_command_that_ends_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run("batchnorm", ended(code)) for code in (None, 0, 2)] == [0, 0, 2]
    assert run("batchnorm", ended("in words")) == FAILED
    assert capsys.readouterr().err == "in words\n"


def test_errors_come_through_and_streams_and_signals_are_put_back() -> None:
    def fail() -> int:
        raise KeyError("on purpose")

    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError):
        run("batchnorm", fail)
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_interrupts_and_shows_in_the_code(name: str, code: int) -> None:
    def caught() -> int:
        try:
            signal.raise_signal(getattr(signal, name))
        except KeyboardInterrupt:
            return INTERRUPTED  # as a command does that keeps what it has
        return SUCCESS

    def not_caught() -> int:
        signal.raise_signal(getattr(signal, name))
        return SUCCESS

    assert (run("batchnorm", caught), run("batchnorm", not_caught)) == (code, code)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_signal_that_is_ignored_stays_so() -> None:
    def command() -> int:
        signal.raise_signal(signal.SIGHUP)
        return SUCCESS

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert run("batchnorm", command) == SUCCESS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_from_another_thread_signals_are_left_alone() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run("batchnorm", lambda: SUCCESS)))
    thread.start()
    thread.join()
    assert codes == [SUCCESS]
