"""``batchnorm reproduce``, section 4.1: load, train, record, and leave a folder of files behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from batchnorm.experiments.digits import Digits, load
from batchnorm.experiments.mnist import Point, Settings, train
from batchnorm.experiments.record import Recording
from batchnorm.experiments.session import Report, conduct, encoded
from batchnorm.report.figure import figure_1
from batchnorm.report.metrics import Metrics, to_json
from batchnorm.report.page import page
from batchnorm.report.table import headline, tables
from batchnorm.report.terminal import Terminal

FILES = ("metrics.json", "figure1.png", "figure1.svg", "report.html")


def record(
    settings: Settings,
    digits: Digits,
    recording: Recording,
    on_point: Callable[[int, Point], None] | None = None,
) -> None:
    """Train both networks for every seed, and add each point to ``recording``.

    The caller owns the recording, so an interruption or an error loses no point added before it. PyTorch's number of
    threads is set during the training and restored afterwards.

    Args:
        settings: what to run.
        digits: what to run it on.
        recording: where points are added.
        on_point: called with the seed and the point after each is added.
    """
    with threads(settings.threads):
        for seed in range(settings.seed, settings.seed + settings.seeds):
            for point in train(settings, digits, seed):
                recording.add(seed, point)
                if on_point is not None:
                    on_point(seed, point)


def contents(metrics: Metrics) -> dict[str, bytes]:
    """What goes into each of ``FILES``."""
    figure = figure_1(metrics)
    html = page(metrics, figure["svg"])
    files = (encoded(to_json(metrics)), figure["png"], figure["svg"], encoded(html))
    return dict(zip(FILES, files, strict=True))


def reproduce(settings: Settings, source: str, folder: Path, terminal: Terminal) -> int:
    """Run section 4.1 and write its report.

    Args:
        settings: what to run.
        source: see ``digits.load``.
        folder: where the files go.
        terminal: where course, results and complaints are shown.

    Returns:
        The exit code, see ``session.conduct``.

    Raises:
        DataError: the data cannot be read.
    """
    recording: Recording

    def start() -> Recording:
        nonlocal recording
        digits = load(source)
        terminal.say(
            f"{digits.name}: {len(digits.train_images):,} training and {len(digits.test_images):,} test images of "
            f"{digits.height}×{digits.width}; {settings.steps:,} steps, learning rate {settings.learning_rate}"
        )
        recording = Recording(settings, digits, source)
        return recording

    def work() -> None:
        with terminal.progress(settings.steps, settings.seeds) as update:

            def shown(seed: int, point: Point) -> None:
                with_it, without = (f"{100 * a:.1f} %" for a in (point.running_accuracy, point.plain_accuracy))
                update(f"seed {seed}", point.step, f"test accuracy {with_it} with, {without} without")

            record(settings, recording.digits, recording, shown)

    return conduct(_REPORT, folder, terminal, start, work)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads of PyTorch for the duration."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reached(metrics: Metrics) -> str:
    last = metrics["runs"][-1]
    return f"seed {last['seed']}, step {last['steps'][-1]:,} of {metrics['settings']['steps']:,}"


_REPORT = Report[Metrics](FILES, contents, tables, headline, lambda metrics: metrics["complete"], _reached)
