"""From cases to rows: build every peer, check its result, time those that are right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from batchnorm.bench import memory as memory_of
from batchnorm.bench.cases import Case
from batchnorm.bench.measure import Plan, Samples, interleave, ratio
from batchnorm.bench.peers import COPIES, OURS, PEERS, Program, Unavailable, backend_of
from batchnorm.bench.problem import Problem
from batchnorm.bench.results import LOST, RIVALS, Memory, Row, Timing


@dataclass(frozen=True)
class Entry:
    """A case, and who takes part in it beside ours.

    Arguments:
        case: what is measured
        peers: names from ``peers.PEERS``
        threads: numbers of threads, one row each
        memory: whether memory is measured too, where the case has a backward pass
    """

    case: Case
    peers: tuple[str, ...]
    threads: tuple[int, ...]
    memory: bool = False


def run(entries: Iterable[Entry], plan: Plan) -> Iterator[Row]:
    """The rows, one by one as they are measured. PyTorch's number of threads is put back at the end."""
    problem: Problem | None = None
    for entry in entries:
        if problem is None or not problem.serves(entry.case):
            problem = None  # the old one's memory goes before the new one's comes
            problem = Problem(entry.case)
        for place, count in enumerate(entry.threads):
            with threads(count):
                yield measure(problem.of(entry.case), entry.peers, plan, memory=entry.memory and place == 0)


def measure(problem: Problem, peers: Sequence[str], plan: Plan, *, memory: bool = False) -> Row:
    """One case at PyTorch's present number of threads."""
    case = problem.case
    programs: dict[str, Program] = {}
    timings: dict[str, Timing] = {}
    with torch.set_grad_enabled(case.training):
        for name in (OURS, *(name for name in peers if name != OURS)):
            try:
                programs[name] = PEERS[name](problem)
                error = _try(programs[name], problem)
            except Unavailable as reason:
                timings[name] = _no_speed("skipped", str(reason))
            except Exception as failure:
                # A peer that fails is named in the table with its reason; ours counts as wrong.
                timings[name] = _no_speed("wrong" if name == OURS else "skipped", _first_line(failure))
            else:
                if error is not None:
                    timings[name] = _no_speed("wrong", error)
            if name in timings:
                programs.pop(name, None)
            if name == OURS and name in timings:
                break  # without ours there is nothing to compare
        samples: dict[str, Samples] = {}
        if OURS in programs:
            samples = interleave({name: program.run for name, program in programs.items()}, plan)
        used, unmeasured = None, None
        if memory and case.mode == "forward+backward":
            try:
                used = _memory({name: programs[name] for name in (OURS, "torch") if name in programs})
            except Unavailable as reason:
                unmeasured = str(reason)
    timings |= {name: _timing(found) for name, found in samples.items()}
    return _row(problem, timings, samples, used, unmeasured)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _try(program: Program, problem: Problem) -> str | None:
    """Run it for the first time, which may compile it; what is wrong with the result, or None."""
    result = program.run()
    return problem.check(program.read(result), program.running()) if program.checked else None


def _row(
    problem: Problem,
    timings: dict[str, Timing],
    samples: Mapping[str, Samples],
    used: dict[str, Memory] | None,
    unmeasured: str | None,
) -> Row:
    case = problem.case
    rivals = {name: ratio(samples[OURS], samples[name]) for name in RIVALS if name in samples}
    behind = max(rivals.values(), default=0.0)
    return Row(
        family=case.family,
        shape=list(case.shape),
        dtype=case.dtype,
        layout=case.layout,
        mode=case.mode,
        extra=case.extra,
        threads=torch.get_num_threads(),
        bytes=case.bytes,
        backend=backend_of(case, problem),
        peers=timings,
        times_faster={
            name: ratio(found, samples[OURS]) for name, found in samples.items() if name != OURS and name not in COPIES
        },
        times_copy=_against(samples, _faster_copy(samples)),
        times_clone=_against(samples, "clone"),
        lost=behind if behind > LOST else None,
        memory=used,
        memory_skipped=unmeasured,
    )


def _faster_copy(samples: Mapping[str, Samples]) -> str:
    """Of the two copies into memory that exists, the one that is the better yardstick."""
    able = [name for name in ("copy", "memmove") if name in samples]
    return min(able, key=lambda name: samples[name].median, default="")


def _against(samples: Mapping[str, Samples], yardstick: str) -> dict[str, float]:
    if yardstick not in samples:
        return {}
    return {name: ratio(found, samples[yardstick]) for name, found in samples.items() if name not in COPIES}


def _memory(programs: Mapping[str, Program]) -> dict[str, Memory]:
    return {
        name: memory_of.measure(program.run, program.layer)
        for name, program in programs.items()
        if program.layer is not None
    }


def _timing(found: Samples) -> Timing:
    return Timing(
        status="measured",
        why=None,
        median=found.median,
        p10=found.quantile(0.1),
        p90=found.quantile(0.9),
        rounds=len(found.seconds),
        calls=found.calls,
    )


def _no_speed(status: Literal["wrong", "skipped"], why: str) -> Timing:
    return Timing(status=status, why=why, median=None, p10=None, p90=None, rounds=0, calls=0)


def _first_line(failure: Exception) -> str:
    text = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {text}"[:200] if text else type(failure).__name__
