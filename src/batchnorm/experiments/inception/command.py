"""``batchnorm reproduce inception``: load, train the variants, record, and leave a folder of files behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from batchnorm.experiments.inception.images import ImageSet, load
from batchnorm.experiments.inception.record import Event, Recording, jobs, sweep_jobs
from batchnorm.experiments.inception.settings import Settings
from batchnorm.experiments.inception.training import Job, Point, Training
from batchnorm.experiments.processes import run
from batchnorm.experiments.reproduce import threads
from batchnorm.experiments.session import Report, conduct, encoded
from batchnorm.experiments.store import Store
from batchnorm.report.inception.figures import figure_2, figure_4
from batchnorm.report.inception.metrics import Metrics
from batchnorm.report.inception.page import page
from batchnorm.report.inception.tables import headline, tables
from batchnorm.report.metrics import to_json
from batchnorm.report.terminal import OnProgress, Terminal

FILES = ("metrics.json", "figure2.png", "figure2.svg", "figure4.png", "figure4.svg", "report.html")


@dataclass(frozen=True)
class Trainer:
    """Trains one network after another, keeping the state of each at every point.

    Attributes:
        settings: of the run.
        source: see ``images.load``.
        workers: processes that decode image files.
        folder: of the results.
    """

    settings: Settings
    source: str | None
    workers: int
    folder: Path

    def __call__(self, job: Job) -> Iterator[Event]:
        training = Training(job, self.settings, _images(self.source, self.settings.size, self.workers))
        store = Store(self.folder)
        state = store.load(job.file)
        if state is not None:
            training.restore(state)
            for point in training.points:
                yield _event(training, point)
        for point in training.run():
            store.save(job.file, training.state())
            yield _event(training, point)


def _event(training: Training, point: Point) -> Event:
    tested = training.tested if point is training.points[-1] else None
    return Event(point, tested, training.seconds, training.cpu_seconds)


def reproduce(
    settings: Settings, source: str | None, folder: Path, terminal: Terminal, *, resume: bool = False, workers: int = 0
) -> int:
    """Run section 4.2 and write its report.

    Args:
        settings: what to run.
        source: see ``images.load``.
        folder: where the files go, and until the run is complete also what it needs to go on.
        terminal: where course, results and complaints are shown.
        resume: go on with the unfinished run in ``folder``, if there is one.
        workers: processes that decode image files, for each network in training.

    Returns:
        The exit code, see ``session.conduct``.

    Raises:
        DataError: the data cannot be read.
        ArgumentError: there is an unfinished run in ``folder`` that must not or cannot be gone on with.
    """
    store = Store(folder)
    recording: Recording

    def start() -> Recording:
        nonlocal recording
        images = _images(source, settings.size, workers)
        recording = Recording(settings, images, source)
        again = store.begin({**asdict(settings), "processes": None, "data": images.name}, resume=resume)
        terminal.say(
            f"{images.name}: {len(images.train.labels):,} training, {len(images.validation.labels):,} validation and "
            f"{len(images.test.labels):,} test images of {images.height}×{images.width}, {images.classes} classes; "
            f"{settings.steps:,} steps, learning rate {settings.base.learning_rate:g}"
        )
        if again:
            terminal.say(f"Going on with the run in {folder}.")
        return recording

    def work() -> None:
        trainer = Trainer(settings, source, workers, folder)
        sweep = sweep_jobs(settings) if settings.sweep else []
        count = len(sweep) + len(jobs(settings, settings.base))
        with threads(1), terminal.progress(settings.steps, count) as update:
            _train(trainer, sweep, recording, update)
            base = settings.base
            if sweep:
                base = recording.choose()
                terminal.say(f"Best of the sweep: learning rate {base.learning_rate:g}, decay {base.decay:g}.")
            _train(trainer, jobs(settings, base), recording, update)

    kept = 'what was recorded until then is kept, marked "complete": false. --resume goes on from there.'
    code = conduct(_REPORT, folder, terminal, start, work, kept)
    if code == 0:
        store.clear()
    return code


def contents(metrics: Metrics) -> dict[str, bytes]:
    """What goes into each of ``FILES``."""
    curves, ensemble = figure_2(metrics), figure_4(metrics)
    html = page(metrics, curves["svg"], ensemble["svg"])
    pictures = (curves["png"], curves["svg"], ensemble["png"], ensemble["svg"])
    return dict(zip(FILES, (encoded(to_json(metrics)), *pictures, encoded(html)), strict=True))


def _train(trainer: Trainer, wanted: Sequence[Job], recording: Recording, update: OnProgress) -> None:
    for job, event in run(trainer, wanted, trainer.settings.processes):
        recording.add(job, event)
        update(job.name, event.point.step, f"validation accuracy {100 * event.point.accuracy:.1f} %")


@lru_cache(maxsize=1)
def _images(source: str | None, size: int | None, workers: int) -> ImageSet:
    """Read once in each process."""
    return load(source, size, workers)


def _reached(metrics: Metrics) -> str:
    steps = metrics["settings"]["steps"]
    if not metrics["runs"]:
        rows = metrics["sweep"] or []
        return f"the sweep, {sum(row['complete'] for row in rows)} networks trained"
    last = metrics["runs"][-1]
    name = next(variant["name"] for variant in metrics["variants"] if variant["key"] == last["variant"])
    return f"{name}, seed {last['seed']}, step {last['steps'][-1]:,} of {steps:,}"


_REPORT = Report[Metrics](FILES, contents, tables, headline, lambda metrics: metrics["complete"], _reached)
