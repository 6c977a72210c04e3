"""The choice of cases: every pair that can be must be."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from pairwise import pairwise, some

FACTORS = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": tuple(range(5))}


def allowed(row: Mapping[str, Any]) -> bool:
    return not (row.get("a") == 2 and row.get("d") == 4) and not (row.get("b") == "y" and row.get("c") is True)


def test_every_pair_that_is_allowed_stands_in_a_row() -> None:
    rows = pairwise(FACTORS, allowed)
    assert all(allowed(row) and list(row) and set(row) == set(FACTORS) for row in rows)
    for a, b in combinations(FACTORS, 2):
        for v in FACTORS[a]:
            for w in FACTORS[b]:
                if allowed({a: v, b: w}):
                    assert any(row[a] == v and row[b] == w for row in rows), (a, v, b, w)
    assert len(rows) < 3 * 5 * 2


def test_the_rows_are_the_same_each_time() -> None:
    assert pairwise(FACTORS, allowed) == pairwise(FACTORS, allowed)
    assert some(FACTORS, allowed, 7) == some(FACTORS, allowed, 7)
    assert len(some(FACTORS, allowed, 7)) == 7
