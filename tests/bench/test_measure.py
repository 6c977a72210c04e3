"""Timing on a clock that the tests wind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from batchnorm.bench.measure import Plan, Samples, interleave, ratio


class Clockwork:
    """Functions that take as long as they are told to, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []
        self.slow = 1.0  # the machine: 2 takes twice as long

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, seconds: float, after: Callable[[], None] = lambda: None) -> Callable[[], object]:
        def run() -> None:
            self.now += seconds * self.slow
            self.called.append(name)
            after()

        return run


def test_times_are_those_of_one_call() -> None:
    clock = Clockwork()
    functions = {"quick": clock.function("quick", 1e-5), "long": clock.function("long", 0.25)}
    found = interleave(functions, Plan(least=1e-3, rounds=4), clock)
    assert found["quick"].seconds == pytest.approx([1e-5] * 4)
    assert found["long"].seconds == pytest.approx([0.25] * 4)


def test_a_quick_function_is_repeated_until_a_sample_is_long_enough() -> None:
    clock = Clockwork()
    found = interleave({"quick": clock.function("quick", 1e-5)}, Plan(least=1e-3, rounds=2), clock)
    assert 100 <= found["quick"].calls <= 200


def test_a_clock_that_sees_nothing_pass_is_no_trap() -> None:
    clock = Clockwork()
    found = interleave({"none": clock.function("none", 1e-12)}, Plan(least=1e-9, rounds=1), clock)
    assert found["none"].calls >= 1000


def test_every_peer_has_its_turn_in_every_round_and_another_one_begins() -> None:
    clock = Clockwork()
    functions = {name: clock.function(name, 0.1) for name in "abc"}
    interleave(functions, Plan(least=0.0, rounds=3, enough=3), clock)
    assert clock.called == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_a_small_function_is_called_untimed_before_its_sample() -> None:
    clock = Clockwork()
    interleave({"small": clock.function("small", 2e-3)}, Plan(least=1e-3, rounds=3), clock)
    # One call to find out how many make a sample, the first sample, then an untimed call before each.
    assert len(clock.called) == 1 + 1 + 2 + 2


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (1.0, 5), (100.0, 7)])
def test_rounds_go_on_until_the_budget_is_spent(budget: float, rounds: int) -> None:
    clock = Clockwork()
    plan = Plan(least=0.0, rounds=7, enough=3, budget=budget)
    assert len(interleave({"a": clock.function("a", 0.2)}, plan, clock)["a"].seconds) == rounds


def test_a_ratio_keeps_while_the_machines_speed_changes() -> None:
    clock = Clockwork()

    def slower() -> None:
        clock.slow *= 1.5

    # The machine slows down after each round: medians of different rounds would say something else.
    functions = {"a": clock.function("a", 0.3), "b": clock.function("b", 0.1, slower)}
    found = interleave(functions, Plan(least=0.0, rounds=1, enough=1), clock)
    clock.slow = 1.0
    assert ratio(found["a"], found["b"]) == pytest.approx(3.0)
    assert ratio(Samples((3.0, 30.0, 300.0, 1.0), 1), Samples((1.0, 10.0, 100.0, 1.0), 1)) == 3.0


def test_one_disturbed_sample_does_not_change_the_ratio() -> None:
    assert ratio(Samples((2.0, 2.0, 90.0), 1), Samples((1.0, 1.0, 1.0), 1)) == 2.0


def test_quantiles() -> None:
    found = Samples(tuple(float(n) for n in range(11)), 1)
    assert (found.median, found.quantile(0.1), found.quantile(0.9)) == (5.0, 1.0, 9.0)
    assert Samples((4.0,), 1).quantile(0.9) == 4.0


def test_the_collector_is_put_back_even_after_an_error() -> None:
    def fails() -> None:
        assert not gc.isenabled()
        raise ValueError("broken")

    assert gc.isenabled()
    with pytest.raises(ValueError) as raised:
        interleave({"fails": fails}, Plan())
    assert str(raised.value) == "broken"
    assert gc.isenabled()
