"""Timing in turn, round by round: what slows the machine for a while slows all peers alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from statistics import median

Clock = Callable[[], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Arguments:
        least: seconds that one sample takes at least; a quick function is called as often as that needs
        rounds: at most this many samples of each peer
        enough: at least this many, whatever they cost
        budget: seconds for all rounds of one case, between the two
    """

    least: float = 1e-3
    rounds: int = 30
    enough: int = 5
    budget: float = 1.0


SHORT = Plan(rounds=15, enough=3, budget=0.25)
FULL = Plan(rounds=30, enough=5, budget=0.5)
USER = Plan(rounds=100, enough=7, budget=2.0)

# Below this many seconds a call is repeated once untimed before its sample: tensors that small may lie in a cache,
# and should lie there for every peer, whoever ran before.
_WARM = 5e-3


@dataclass(frozen=True)
class Samples:
    """Seconds for one call, one entry a round."""

    seconds: tuple[float, ...]
    calls: int  # in each sample

    @property
    def median(self) -> float:
        return median(self.seconds)

    def quantile(self, share: float) -> float:
        """By linear interpolation.

        >>> Samples((1.0, 2.0, 3.0, 5.0), 1).quantile(0.5)
        2.5
        """
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    functions: Mapping[str, Callable[[], object]], plan: Plan, clock: Clock = time.perf_counter
) -> dict[str, Samples]:
    """Samples of each function, all of them in each round, beginning with another one each time.

    Every function has been called before (compiled, its memory touched). Python's collector is off meanwhile.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # Where any sample is long enough, the first one already counts.
        calls = {name: _calls(run, plan.least, clock) if plan.least > 0 else 1 for name, run in functions.items()}
        begun = clock()
        for turn in range(plan.rounds):
            if turn >= plan.enough and clock() - begun >= plan.budget:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                function, count = functions[name], calls[name]
                if count > 1 or (turn and seconds[name][-1] < _WARM):
                    function()
                seconds[name].append(_sample(function, count, clock))
    finally:
        if on:
            gc.enable()
    return {name: Samples(tuple(seconds[name]), calls[name]) for name in names}


def ratio(over: Samples, under: Samples) -> float:
    """How many times as long ``over`` takes: round by round, and the median of that.

    Both samples of a round are taken close together, so that their ratio keeps when the machine's speed does not.

    >>> ratio(Samples((2.0, 20.0, 4.0), 1), Samples((1.0, 10.0, 1.0), 1))
    2.0
    """
    return median(a / b for a, b in zip(over.seconds, under.seconds, strict=True))


def _calls(function: Callable[[], object], least: float, clock: Clock) -> int:
    """How many calls take ``least`` seconds."""
    calls = 1
    while True:
        took = _sample(function, calls, clock) * calls
        if took >= least:
            return calls
        growth = 1.2 * least / took if took > 0 else 10.0
        calls = math.ceil(calls * min(max(growth, 1.5), 10.0))


def _sample(function: Callable[[], object], calls: int, clock: Clock) -> float:
    begun = clock()
    for _ in repeat(None, calls):
        function()
    return (clock() - begun) / calls
