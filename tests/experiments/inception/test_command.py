"""The whole experiment on a folder of images: its files, its interruption, and that it goes on bit for bit."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchnorm.errors import ArgumentError
from batchnorm.experiments.inception import command
from batchnorm.experiments.inception.record import Event, Recording, jobs, sweep_jobs
from batchnorm.experiments.inception.settings import Settings
from batchnorm.experiments.inception.training import Job
from batchnorm.report.terminal import Terminal

FILES = {"metrics.json", "figure2.png", "figure2.svg", "figure4.png", "figure4.svg", "report.html"}
TINY = Settings(steps=2, seeds=1, ensemble=2, batch_size=8, width=1 / 64)
TIMES = ("started", "seconds", "cpu_seconds")


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_BACKEND", "eager")


def reproduced(settings: Settings, folder: Path, out: Path, **options: Any) -> tuple[int, str, str]:
    results, complaints = io.StringIO(), io.StringIO()
    terminal = Terminal(Console(file=results), Console(file=complaints))
    code = command.reproduce(settings, str(folder), out, terminal, **options)
    return code, results.getvalue(), complaints.getvalue()


def without_times(metrics: Any) -> Any:
    if isinstance(metrics, dict):
        return {name: without_times(value) for name, value in metrics.items() if name not in TIMES}
    return [without_times(each) for each in metrics] if isinstance(metrics, list) else metrics


def metrics_of(out: Path) -> Any:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_thirty_steps_of_every_variant_end_to_end(folder: Path, tmp_path: Path) -> None:
    settings = replace(TINY, steps=30, width=1 / 16, sweep=True, processes=1)
    out = tmp_path / "out"
    code, results, complaints = reproduced(settings, folder, out)
    assert (code, complaints) == (0, "")
    assert {path.name for path in out.iterdir()} == FILES
    metrics = metrics_of(out)
    assert metrics["complete"] is True
    keys = ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid", "inception-sigmoid"]
    assert [(run["variant"], run["seed"]) for run in metrics["runs"]] == [*((key, 0) for key in keys), ("bn-x5", 1)]
    for run in metrics["runs"]:
        assert run["complete"] and run["steps"][-1] == 30
        assert len(run["loss"]) == len(run["accuracy"]) == len(run["steps"]) == 21
        assert (run["recalibrated"] is None) == run["variant"].startswith("inception")
        assert 0 <= run["test_accuracy"] <= 1
    assert len(metrics["sweep"]) == 7
    best = max(metrics["sweep"], key=lambda row: row["best"])
    chosen = metrics["settings"]["learning_rate"], metrics["settings"]["decay"]
    assert chosen == (best["learning_rate"], best["decay"])
    assert set(metrics["summary"]["variants"]) == set(keys)
    assert metrics["summary"]["ensemble"]["seeds"] == [0, 1]
    assert metrics["summary"]["ensemble"]["together"][0] == metrics["summary"]["ensemble"]["single"][0]
    # The effect on images that anyone can tell apart: recalibrated, BN-x5 knows them after thirty steps.
    assert metrics["summary"]["variants"]["bn-x5"]["test_recalibrated"]["mean"] > 0.8
    for name in ("figure2", "figure4"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "</svg>" in (out / f"{name}.svg").read_text()
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.rstrip().endswith("</html>")
    assert "Removing Dropout from Modified BN-Inception speeds up training" in html
    assert "Figure 3: steps to the plain network" in results
    assert results.splitlines()[-1].startswith(f"Written to {out}: metrics.json, figure2.png")


@pytest.mark.slow
@pytest.mark.parametrize("where", [("inception", 0, 1), ("bn-x5", 1, 2)])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, int, int]
) -> None:
    assert reproduced(TINY, folder, tmp_path / "whole")[0] == 0
    add = Recording.add

    def add_and_interrupt(self: Recording, job: Job, event: Event) -> None:
        add(self, job, event)
        if (job.variant, job.seed, event.point.step) == where:
            raise KeyboardInterrupt

    out = tmp_path / "parts"
    with monkeypatch.context() as patched:
        patched.setattr(Recording, "add", add_and_interrupt)
        code, _, complaints = reproduced(TINY, folder, out)
    assert code == 130
    assert complaints.startswith("Interrupted at ")
    last = where == ("bn-x5", 1, 2)
    assert metrics_of(out)["complete"] is last
    assert (out / "resume").is_dir()
    with pytest.raises(ArgumentError):
        reproduced(TINY, folder, out)
    code, results, complaints = reproduced(TINY, folder, out, resume=True)
    assert (code, complaints) == (0, "")
    assert f"Going on with the run in {out}." in results
    assert {path.name for path in out.iterdir()} == FILES
    assert without_times(metrics_of(out)) == without_times(metrics_of(tmp_path / "whole"))
    assert (out / "figure2.svg").read_bytes() == (tmp_path / "whole" / "figure2.svg").read_bytes()


def test_a_report_can_be_made_before_the_first_network_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Recording.add

    def add_and_interrupt(self: Recording, job: Job, event: Event) -> None:
        add(self, job, event)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "add", add_and_interrupt)
    for settings, where in ((TINY, "Inception, seed 0, step 0 of 2"), (replace(TINY, sweep=True), "the sweep, 0 ")):
        out = tmp_path / where
        code, results, complaints = reproduced(settings, folder, out)
        assert code == 130
        assert complaints.startswith(f"Interrupted at {where}")
        assert "No plain network was trained to its end yet" in results
        assert "Incomplete." in (out / "report.html").read_text(encoding="utf-8")


def test_networks_are_trained_seed_by_seed_and_the_ensembles_last() -> None:
    found = jobs(replace(TINY, seeds=2, ensemble=4), TINY.base)
    assert [job.seed for job in found] == [0] * 6 + [1] * 6 + [2, 3]
    assert {job.variant for job in found[-2:]} == {"bn-x5"}
    assert len({job.file for job in [*found, *sweep_jobs(TINY)]}) == len(found) + 7


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for processes in (1, 2):
        assert reproduced(replace(TINY, processes=processes), folder, tmp_path / str(processes))[0] == 0
    one, two = (without_times(metrics_of(tmp_path / name)) for name in ("1", "2"))
    one["settings"]["processes"] = 2
    assert one == two
