"""``batchnorm reproduce``: load the data, train, record, and write a folder of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from batchnorm.experiments.digits import Digits, load
from batchnorm.experiments.mnist import Point, Settings, train
from batchnorm.experiments.record import Recording
from batchnorm.report.command import FAILED, INTERRUPTED, REFUSED, SUCCESS
from batchnorm.report.figure import figure_1
from batchnorm.report.files import require_writable, write_whole
from batchnorm.report.metrics import Metrics, to_json
from batchnorm.report.page import page
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
    with _threads(settings.threads):
        for seed in range(settings.seed, settings.seed + settings.seeds):
            for point in train(settings, digits, seed):
                recording.add(seed, point)
                if on_point is not None:
                    on_point(seed, point)


def write_report(folder: Path, metrics: Metrics) -> list[Path]:
    """Write metrics.json, figure1.png, figure1.svg and report.html into ``folder``, each whole or not at all.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    figure = figure_1(metrics)
    html = page(metrics, figure["svg"])
    # A path may hold bytes that cannot be decoded: "\\udcff" stands for such a byte, in JSON too.
    text, markup = (part.encode(errors="backslashreplace") for part in (to_json(metrics), html))
    return write_whole(folder, dict(zip(FILES, (text, figure["png"], figure["svg"], markup), strict=True)))


def reproduce(settings: Settings, source: str, folder: Path, terminal: Terminal) -> int:
    """Run section 4.1 and write its report.

    Args:
        settings: what to run.
        source: see ``digits.load``.
        folder: where the files go.
        terminal: where course, results and complaints are shown.

    Returns:
        The exit code: ``SUCCESS``, ``FAILED`` (the results could not be written), ``REFUSED`` (nothing can be written
        to ``folder``; known before training) or ``INTERRUPTED``.

    Raises:
        DataError: the data cannot be read.
    """
    try:
        require_writable(folder, FILES)
    except OSError as error:
        terminal.complain(
            f"reproduce: expected a folder to write to, got {folder}: {error.strerror}. Choose another --out."
        )
        return REFUSED
    recording: Recording | None = None
    interrupted = False
    try:
        digits = load(source)
        recording = Recording(settings, digits, source)
        terminal.say(
            f"{digits.name}: {len(digits.train_images):,} training and {len(digits.test_images):,} test images of "
            f"{digits.height}×{digits.width}; {settings.steps:,} steps, learning rate {settings.learning_rate}"
        )
        with terminal.progress(settings.steps, settings.seeds) as update:
            record(
                settings,
                digits,
                recording,
                lambda seed, point: update(seed, point.step, point.plain_accuracy, point.running_accuracy),
            )
    except KeyboardInterrupt:
        interrupted = True
    if recording is None or recording.empty:
        terminal.complain("Interrupted before anything was recorded; nothing is written.")
        return INTERRUPTED
    metrics = recording.metrics()
    try:
        try:
            written = write_report(folder, metrics)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            written = write_report(folder, metrics)  # the training is done: only a second Ctrl-C loses it
    except KeyboardInterrupt:
        terminal.complain("Interrupted again while the results were written; nothing is written.")
        return INTERRUPTED
    except OSError as error:
        terminal.show(metrics)
        terminal.complain(f"reproduce: the results could not be written to {folder}: {error.strerror}.")
        return FAILED
    terminal.show(metrics)
    terminal.say(f"Written to {folder}: {', '.join(path.name for path in written)}")
    if interrupted:
        last = metrics["runs"][-1]
        reached = f"Interrupted at seed {last['seed']}, step {last['steps'][-1]:,} of {settings.steps:,}"
        kept = 'what was recorded until then is kept, marked "complete": false.'
        if metrics["complete"]:
            kept = "that was the last, and all is written."
        terminal.complain(f"{reached}: {kept}")
        return INTERRUPTED
    return SUCCESS


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
