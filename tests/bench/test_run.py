"""From a case to a row: who takes part, whose speed counts, and what is put back."""

from __future__ import annotations

import pytest
import torch

from batchnorm.bench import run as runs
from batchnorm.bench.cases import EXTRAS, MODES, Case
from batchnorm.bench.measure import Plan, Samples
from batchnorm.bench.peers import OURS, PEERS, Program, Unavailable
from batchnorm.bench.problem import Problem
from batchnorm.bench.run import Entry, measure, run
from bench_rows import off_by_a_tenth
from benchmarks import flax_layer

QUICK = Plan(least=0.0, rounds=2, enough=2, budget=0.0)
SMALL = Case((4, 6, 5, 5))
ALL = ("torch", "onednn", "copy", "clone", "memmove")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_mode_is_measured_with_every_rival(extra: str, mode: str) -> None:
    torch.set_num_threads(1)
    case = Case((4, 6, 5, 5), mode=mode, extra=extra)
    row = measure(Problem(case), ALL, QUICK)
    assert {name: timing["status"] for name, timing in row["peers"].items()} == dict.fromkeys((OURS, *ALL), "measured")
    assert set(row["times_faster"]) == {"torch", "onednn"}
    assert set(row["times_copy"]) == set(row["times_clone"]) == {OURS, "torch", "onednn"}
    assert row["backend"] == "eager"
    assert all((timing["median"] or 0) > 0 and timing["rounds"] == 2 for timing in row["peers"].values())


def test_ratios_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {OURS: 2.0, "torch": 6.0, "onednn": 5.0, "copy": 1.0, "clone": 4.0, "memmove": 0.5}
    monkeypatch.setattr(
        runs, "interleave", lambda functions, plan: {name: Samples((seconds[name],) * 3, 1) for name in functions}
    )
    torch.set_num_threads(1)
    row = measure(Problem(SMALL), ALL, QUICK)
    assert row["times_faster"] == {"torch": 3.0, "onednn": 2.5}
    assert row["times_copy"] == {OURS: 4.0, "torch": 12.0, "onednn": 10.0}  # of the faster copy
    assert row["times_clone"] == {OURS: 0.5, "torch": 1.5, "onednn": 1.25}
    assert row["lost"] is None


@pytest.mark.parametrize(("own", "lost"), [(5.2, None), (5.3, 5.3 / 5.0), (60.0, 12.0)])
def test_a_case_is_lost_from_five_per_cent_behind_the_fastest_rival(
    monkeypatch: pytest.MonkeyPatch, own: float, lost: float | None
) -> None:
    seconds = {OURS: own, "torch": 6.0, "onednn": 5.0, "copy": 1.0}
    monkeypatch.setattr(
        runs, "interleave", lambda functions, plan: {name: Samples((seconds[name],) * 3, 1) for name in functions}
    )
    assert measure(Problem(SMALL), ("torch", "onednn", "copy"), QUICK)["lost"] == lost


def test_a_wrong_result_of_ours_has_no_speed_and_nobody_else_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, OURS, off_by_a_tenth(PEERS[OURS]))
    row = measure(Problem(SMALL), ALL, QUICK)
    assert set(row["peers"]) == {OURS}
    own = row["peers"][OURS]
    assert own["status"] == "wrong" and own["median"] is None
    assert own["why"] is not None and own["why"].startswith("y is off by ")
    assert row["times_faster"] == row["times_copy"] == row["times_clone"] == {}


def test_a_wrong_result_of_a_rival_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "torch", off_by_a_tenth(PEERS["torch"]))
    row = measure(Problem(SMALL), ALL, QUICK)
    assert row["peers"]["torch"]["status"] == "wrong" and row["peers"]["torch"]["median"] is None
    assert set(row["times_faster"]) == {"onednn"}


def test_a_rival_that_fails_or_is_absent_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(problem: Problem) -> Program:
        raise Unavailable("not installed: jax")

    def fails(problem: Problem) -> Program:
        raise RuntimeError("\nno working C++ compiler\nsecond line")

    monkeypatch.setitem(PEERS, "flax", absent)
    monkeypatch.setitem(PEERS, "compile", fails)
    peers = measure(Problem(SMALL), ("compile", "flax", "torch"), QUICK)["peers"]
    assert (peers["flax"]["status"], peers["flax"]["why"]) == ("skipped", "not installed: jax")
    assert (peers["compile"]["status"], peers["compile"]["why"]) == (
        "skipped",
        "RuntimeError: no working C++ compiler",
    )
    assert peers["torch"]["status"] == "measured"


def test_ours_failing_is_an_error_and_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Problem) -> Program:
        raise RuntimeError("kernel crashed")

    monkeypatch.setitem(PEERS, OURS, fails)
    own = measure(Problem(SMALL), ALL, QUICK)["peers"][OURS]
    assert (own["status"], own["why"]) == ("wrong", "RuntimeError: kernel crashed")


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case((4, 6, 5, 5), "float16"), "oneDNN's batch normalization does not take float16"),
        (Case((4, 6)), "oneDNN trains on 4 dimensions only"),
        (Case((4, 6), mode="inference"), "oneDNN takes 4 or 5 dimensions only"),
    ],
)
def test_what_onednn_cannot_do_is_said(case: Case, why: str) -> None:
    assert measure(Problem(case), ("onednn",), QUICK)["peers"]["onednn"]["why"] == why


def test_rows_come_for_each_number_of_threads_and_the_number_is_put_back() -> None:
    torch.set_num_threads(2)
    rows = list(run([Entry(SMALL, ("torch",), (1, 3)), Entry(Case((3, 2)), ("torch",), (1,))], QUICK))
    assert [(row["shape"], row["threads"]) for row in rows] == [([4, 6, 5, 5], 1), ([4, 6, 5, 5], 3), ([3, 2], 1)]
    assert torch.get_num_threads() == 2


def test_threads_are_put_back_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(problem: Problem) -> Program:
        raise KeyboardInterrupt

    monkeypatch.setitem(PEERS, OURS, interrupted)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        list(run([Entry(SMALL, (), (3,))], QUICK))
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


def test_memory_is_measured_once_a_case_and_only_with_a_backward_pass() -> None:
    cases = [Case((4, 6, 5, 5), mode=mode, extra="relu") for mode in MODES]
    rows = list(run([Entry(case, ("torch",), (1, 2), memory=True) for case in cases], QUICK))
    measured = {(row["mode"], row["threads"]) for row in rows if row["memory"] is not None}
    assert measured == {("forward+backward", 1)}


def test_jax_takes_part_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "flax", flax_layer.build)
    torch.set_num_threads(1)
    flax = measure(Problem(SMALL), ("flax",), QUICK)["peers"]["flax"]
    assert flax["status"] == "skipped" and flax["why"] is not None
    assert flax["why"].startswith(("not installed: ", "JAX's number of threads"))


@pytest.mark.slow
def test_torch_compile_takes_part() -> None:
    row = measure(Problem(Case((4, 6, 5, 5), extra="residual+relu")), ("compile",), QUICK)
    compiled = row["peers"]["compile"]
    # Without a C++ compiler it says so; a wrong result would be "wrong".
    assert compiled["status"] == "measured" or (compiled["status"] == "skipped" and compiled["why"])
