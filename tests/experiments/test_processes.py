"""Jobs in this process or in others: the same events, errors that come through, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator

import pytest

from batchnorm.errors import DataError
from batchnorm.experiments.processes import run


def squares(job: int) -> Iterator[int]:
    yield from (k * k for k in range(job))


def failing(job: int) -> Iterator[int]:
    yield job
    raise DataError(f"job {job} is broken")


def endless(job: int) -> Iterator[int]:
    yield job
    time.sleep(60)


def dying(job: int) -> Iterator[int]:
    yield job
    raise SystemExit(3)


def test_one_process_takes_the_jobs_in_their_order() -> None:
    assert list(run(squares, [2, 0, 3], 1)) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 4)]


@pytest.mark.slow
def test_several_processes_give_the_same_events_each_job_in_its_order() -> None:
    found = list(run(squares, [2, 0, 3, 4], 2))
    for job in (2, 3, 4):
        assert [event for of, event in found if of == job] == [k * k for k in range(job)]
    assert len(found) == 9
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_error_comes_through_and_ends_the_others() -> None:
    with pytest.raises(DataError) as caught:
        list(run(failing, [1, 2], 2))
    assert str(caught.value) in ("job 1 is broken", "job 2 is broken")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_leaving_ends_what_is_at_work() -> None:
    events = run(endless, [1, 2], 2)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="A process that trains a network has died"):
        list(run(dying, [1, 2], 2))
