"""``benchmarks.ranks``: what it compares is the same thing, and the merges it sets side by side are ordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import batchnorm as bn
from benchmarks import ranks


def both() -> bool:
    torch.manual_seed(torch.distributed.get_rank())
    x, dy = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    found = []
    for name in ("ours", "plain all-gather"):
        given = x.clone().requires_grad_()
        y = ranks.layer(name, 3)(given)
        y.backward(dy)
        found.append((y, given.grad))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_the_plain_implementation_gives_the_same(on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(2, both) == [True, True]


@pytest.mark.parametrize("count", [2, 1024])
def test_merged_moments_are_exact_to_rounding_in_any_order(count: int) -> None:
    found = ranks.errors(count)
    good = {name: m2 for name, (_, m2) in found.items() if name != "sums of raw squares"}
    assert max(good.values()) < 1e-13
    assert count == 2 or found["sums of raw squares"][1] > 1e3 * max(good.values())


def test_the_simulation_counts_empty_ranks() -> None:
    parts = ranks.simulated(64)
    assert bool((parts.count == 0).any())
    merged = bn.Moments(parts.count[0], parts.mean[0], parts.m2[0]).merge(
        *(bn.Moments(parts.count[i], parts.mean[i], parts.m2[i]) for i in range(1, 64))
    )
    assert torch.equal(merged.m2, ranks.in_one(parts).m2)
