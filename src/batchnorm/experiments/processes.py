"""Independent jobs in this process, or in several at a time, with their events as they come."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

J = TypeVar("J")
E = TypeVar("E")

_ENDED = "ended"
_EVENT = "event"
_FAILED = "failed"


def run(work: Callable[[J], Iterator[E]], jobs: Sequence[J], processes: int) -> Iterator[tuple[J, E]]:
    """What ``work`` yields for each job, as it comes; the jobs begin in their order.

    With several processes ``work`` runs in fresh interpreters with one thread of PyTorch each, and it, the jobs and
    what it yields must be such that can be pickled. A Ctrl-C is this process's business: the others are ended when
    the iteration ends, however it ends, in the middle of whatever they do.

    Args:
        work: gives the events of a job.
        jobs: one after the other where there is one process.
        processes: at a time.

    Raises:
        Exception: what ``work`` raised.
    """
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            for event in work(job):
                yield job, event
        return
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs)
    at_work: dict[Connection, J] = {}
    started: list[BaseProcess] = []
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, work))
            with _no_interruptions():  # a new interpreter that is interrupted prints a traceback
                process.start()
                started.append(process)
            theirs.close()
            job = waiting.popleft()
            at_work[ours] = job
            ours.send(job)
        while at_work:
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                kind, content = _received(ready)
                if kind == _FAILED:
                    raise content
                if kind == _EVENT:
                    yield at_work[ready], content
                elif waiting:
                    at_work[ready] = waiting.popleft()
                    ready.send(at_work[ready])
                else:
                    del at_work[ready]
                    ready.close()
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


@contextmanager
def _no_interruptions() -> Iterator[None]:
    """SIGINT is ignored, also by processes started meanwhile. Only the main thread can set that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _received(connection: Connection) -> tuple[str, Any]:
    try:
        kind, content = connection.recv()
    except EOFError:
        return _FAILED, RuntimeError("A process that trains a network has died. It may have run out of memory.")
    return kind, content


def _serve(connection: Connection, work: Callable[[Any], Iterator[Any]]) -> None:
    """In the other process: a job, its events, the end of it, and so on until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            job = connection.recv()
            try:
                for event in work(job):
                    connection.send((_EVENT, event))
                connection.send((_ENDED, None))
            except (BrokenPipeError, EOFError):
                raise
            except Exception as error:
                connection.send((_FAILED, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
