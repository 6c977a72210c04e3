"""The command as a user types it: what it prints, what it leaves, and the code it exits with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from batchnorm.__main__ import main
from idx_files import write_idx_folder
from image_files import write_image_folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"batchnorm {metadata.version('batchnorm')}\n"


def test_help_names_every_option_of_reproduce(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, "reproduce", "--help") == 0
    text = capsys.readouterr().out
    for option in ("data", "steps", "lr", "weight-std", "seed", "seeds", "threads", "out", "quiet"):
        assert f"--{option}" in text


def test_reproduce_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    assert run(monkeypatch, "reproduce", "--steps", "300", "--out", str(tmp_path)) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)

    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "figure1.png", "figure1.svg", "report.html"}
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    (recorded,) = metrics["runs"]
    assert metrics["complete"] is True
    assert metrics["settings"]["steps"] == recorded["steps"][-1] == 300
    assert metrics["data"]["name"] == "scikit-learn digits"
    courses = [
        recorded["plain"]["accuracy"],
        recorded["normalized"]["accuracy"],
        *recorded["accuracy_by_statistics"].values(),
        *recorded["plain"]["percentiles"].values(),
        *recorded["normalized"]["percentiles"].values(),
    ]
    assert {len(course) for course in courses} == {len(recorded["steps"])}
    assert set(recorded["accuracy_by_statistics"]) == {"batch", "running", "paper", "pooled"}
    for network in ("plain", "normalized"):
        percentiles = recorded[network]["percentiles"]
        ordered = zip(percentiles["p15"], percentiles["p50"], percentiles["p85"], strict=True)
        assert all(low < middle < high for low, middle, high in ordered)

    # The paper's effect: with normalization most digits are known after 300 steps, without it none are yet.
    assert all(course[-1] > 0.93 for course in recorded["accuracy_by_statistics"].values())
    assert recorded["plain"]["accuracy"][-1] < 0.3
    reached = metrics["summary"]["steps_to_plain_best"]
    assert reached["normalized"][0] < reached["plain"][0] / 4

    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == (
        f"Written to {tmp_path}: metrics.json, figure1.png, figure1.svg, report.html"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "Settings: expected steps of at least 1, got 0. Take 50000, the paper's, or fewer."),
        (("--lr", "-1"), "Settings: expected a learning rate above 0, got -1.0. The default is 0.1."),
        (("--lr", "nan"), "Settings: expected a learning rate above 0, got nan. The default is 0.1."),
        (("--seeds", "0"), "Settings: expected at least 1 seed, got 0. Each seed is one run of both networks."),
        (
            ("--threads", "0"),
            "Settings: expected threads from 1 to 4, the processors of this machine, got 0. "
            "One is fastest for a network of this size.",
        ),
        (
            ("--data", "nowhere/at/all"),
            'load: expected "digits", "mnist" or a folder with the four IDX files, got \'nowhere/at/all\'. '
            "There is no such folder. Check the path.",
        ),
    ],
)
def test_a_request_that_cannot_be_met(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert run(monkeypatch, "reproduce", "--out", str(tmp_path), *arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"batchnorm: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_of_inception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, "reproduce", "inception", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "data",
        "quick",
        "steps",
        "seeds",
        "ensemble",
        "sweep",
        "width",
        "size",
        "scale",
        "device",
        "resume",
    ):
        assert f"--{option}" in text


def test_options_before_inception_are_refused_and_not_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "reproduce", "--steps", "10", "inception") == 2
    assert "steps before inception: its options go after its name." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "val" / "left" / "1.png").write_bytes(b"none"), "an image that Pillow can read in "),
        (lambda folder: shutil.rmtree(folder / "train" / "left"), "at least 2 folders of classes in "),
        (lambda folder: shutil.rmtree(folder / "val"), "a folder "),
        (lambda folder: shutil.rmtree(folder), '"fashion-mnist", a folder with the four IDX files, or one with '),
    ],
)
def test_images_of_no_use_to_inception(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    break_it: Callable[[Path], object],
    message: str,
) -> None:
    folder, out = write_image_folder(tmp_path / "images"), tmp_path / "out"
    break_it(folder)
    assert run(monkeypatch, "reproduce", "inception", "--data", str(folder), "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"batchnorm: load: expected {message}")
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_inception_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATCHNORM_BACKEND", "eager")
    folder, out = write_image_folder(tmp_path / "images"), tmp_path / "out"
    options = ["--steps", "1", "--seeds", "1", "--ensemble", "0", "--batch-size", "8", "--width", "0.02"]
    options += ["--processes", "1", "--workers", "0", "--data", str(folder), "--out", str(out)]
    assert run(monkeypatch, "reproduce", "inception", *options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["complete"] is True
    assert {path.suffix for path in out.iterdir()} == {".json", ".png", ".svg", ".html"}
    assert printed.out.splitlines()[0] == (
        f"{folder}: 36 training, 4 validation and 10 test images of 12×12, 2 classes; 1 steps, learning rate 0.02"
    )


@pytest.mark.parametrize("arguments", [("--steps", "many"), ("--unknown",), ("surplus",)])
def test_what_cannot_be_parsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, "reproduce", *arguments) == 2
    assert "Usage: batchnorm reproduce" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "below"
    assert run(monkeypatch, "reproduce", "--out", str(out)) == 2
    assert capsys.readouterr().err == (
        f"reproduce: expected a folder to write to, got {out}: Not a directory. Choose another --out.\n"
    )


@pytest.mark.parametrize("package", ["typer", "matplotlib", "sklearn"])
def test_without_the_tools_one_line_says_what_to_install(tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from batchnorm.__main__ import main; main()"
    arguments = ["reproduce", "--steps", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"batchnorm: the command line needs {package}, which is not installed: pip install 'batchnorm[tools]'\n",
    )


def test_control_c_keeps_what_was_recorded(tmp_path: Path) -> None:
    # Small images, so that the first line comes soon; many steps, so that the last one does not.
    data, out = write_idx_folder(tmp_path / "data"), tmp_path / "out"
    command = [sys.executable, "-m", "batchnorm", "reproduce", "--steps", "3000"]
    command += ["--data", str(data), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("seed 0, step "):
                break
        running.send_signal(signal.SIGINT)
        _, complaints = running.communicate(timeout=60)
    assert running.returncode == 130
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    last = metrics["runs"][0]["steps"][-1]
    assert metrics["complete"] is False
    assert 300 <= last < 3000
    assert complaints == (
        f'Interrupted at seed 0, step {last:,} of 3,000: what was recorded until then is kept, marked "complete": '
        "false.\n"
    )
    assert len(list(out.iterdir())) == 4
