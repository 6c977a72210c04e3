"""Rows as a benchmark leaves them, with numbers that tests choose, and a peer that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from batchnorm.bench.peers import Program
from batchnorm.bench.problem import Problem
from batchnorm.bench.results import Row, Timing


def timing(median: float) -> Timing:
    return Timing(status="measured", why=None, median=median, p10=median, p90=median, rounds=3, calls=1)


def failed(status: Any, why: str) -> Timing:
    return Timing(status=status, why=why, median=None, p10=None, p90=None, rounds=0, calls=0)


def row(shape: tuple[int, ...], ours: float, torch: float, copy: float, **others: Any) -> Row:
    """A row in which the three took as long as that."""
    made = Row(
        family="net",
        shape=list(shape),
        dtype="float32",
        layout="contiguous",
        mode="forward",
        extra="plain",
        threads=1,
        bytes=4,
        backend="cpu",
        peers={"ours": timing(ours), "torch": timing(torch), "copy": timing(copy)},
        times_faster={"torch": torch / ours},
        times_copy={"ours": ours / copy, "torch": torch / copy},
        times_clone={},
        lost=ours / torch if ours / torch > 1.05 else None,
        memory=None,
        memory_skipped=None,
    )
    made.update(others)  # type: ignore[typeddict-item]
    return made


def off_by_a_tenth(build: Callable[[Problem], Program]) -> Callable[[Problem], Program]:
    def built(problem: Problem) -> Program:
        program = build(problem)
        run = program.run

        def worse() -> tuple[Tensor, ...]:
            y, *others = run()
            return (y * 1.1, *others)

        program.run = worse
        return program

    return built
