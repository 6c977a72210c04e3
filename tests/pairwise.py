"""Few cases in which each two choices meet: most mistakes in kernels need two circumstances, hardly one needs three."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Allowed = Callable[[Mapping[str, Any]], bool]  # of a row, finished or not: may it go on like this?
TRIALS = 20


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Allowed, seed: int = 0) -> list[Row]:
    """Rows, one value for each factor, in which every pair of values that is allowed stands at least once.

    Greedy: begin with a pair that is still missing, then give each other factor the value that brings most missing
    pairs along. The same arguments give the same rows.
    """
    rng = random.Random(seed)
    missing = {
        ((a, i), (b, j)): None
        for a, b in combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows: list[Row] = []
    while missing:
        pair = next(iter(missing))
        chosen = next((c for _ in range(TRIALS) if (c := _complete(dict(pair), factors, allowed, missing, rng))), None)
        if chosen is None:
            del missing[pair]  # no row holds it
            continue
        for found in combinations([(name, chosen[name]) for name in factors], 2):
            missing.pop(found, None)
        rows.append(_values(chosen, factors))
    return rows


def some(factors: Mapping[str, Sequence[Any]], allowed: Allowed, count: int, seed: int = 0) -> list[Row]:
    """``count`` rows drawn at random among those allowed."""
    rng = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        row = {name: rng.choice(values) for name, values in factors.items()}
        if allowed(row):
            rows.append(row)
    return rows


def _complete(
    chosen: dict[str, int],
    factors: Mapping[str, Sequence[Any]],
    allowed: Allowed,
    missing: Mapping[Any, None],
    rng: random.Random,
) -> dict[str, int] | None:
    if not allowed(_values(chosen, factors)):
        return None
    order = list(factors)
    rest = [name for name in order if name not in chosen]
    rng.shuffle(rest)
    for name in rest:
        candidates = [i for i in range(len(factors[name])) if allowed(_values({**chosen, name: i}, factors))]
        if not candidates:
            return None
        rng.shuffle(candidates)

        def gain(i: int, name: str = name) -> int:
            before = [(n, chosen[n]) for n in order if n in chosen]
            position = order.index(name)
            pairs = [((n, j), (name, i)) if order.index(n) < position else ((name, i), (n, j)) for n, j in before]
            return sum(pair in missing for pair in pairs)

        chosen[name] = max(candidates, key=gain)
    return chosen


def _values(chosen: Mapping[str, int], factors: Mapping[str, Sequence[Any]]) -> Row:
    return {name: factors[name][i] for name, i in chosen.items()}
