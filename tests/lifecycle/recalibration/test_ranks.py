"""``recalibrate`` over ranks: the statistics of all batches together, however they are spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from tolerances import assert_close, to_float64

OnRanks = Callable[..., list[Any]]
SPREAD = {2: (3, 1), 3: (2, 0, 4)}
"""Batches on each rank."""


def network(process_group: str | None = None) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(3, 4),
        bn.BatchNorm1d(4, process_group=process_group),  # type: ignore[arg-type]
        nn.Tanh(),
        nn.Linear(4, 2),
        nn.BatchNorm1d(2),
    ).double()


def batches(count: int, equal: bool = False) -> list[Tensor]:
    at = torch.Generator().manual_seed(6)
    sizes = [4 if equal else 3 + i % 3 for i in range(count)]
    return [2 * torch.randn(size, 3, generator=at, dtype=torch.float64) + 1 for size in sizes]


def mine(spread: tuple[int, ...], equal: bool) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    return batches(sum(spread), equal)[sum(spread[:rank]) : sum(spread[: rank + 1])]


def spread_out(spread: tuple[int, ...], options: dict[str, Any]) -> tuple[dict[str, Tensor], int, tuple[str, ...]]:
    model = network("world")
    part = mine(spread, options.get("estimator") == "paper")
    report = bn.recalibrate(model, part, process_group="world", **options)
    return model.state_dict(), report.batches, report.notes


@pytest.mark.parametrize("options", [{}, {"order": "sequential"}, {"estimator": "paper"}], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_what_one_process_gives_on_all_batches(
    on_ranks: OnRanks, ranks: int, options: dict[str, Any]
) -> None:
    spread = SPREAD[ranks]
    found = on_ranks(ranks, spread_out, spread, options)
    model = network()
    report = bn.recalibrate(model, batches(sum(spread), options.get("estimator") == "paper"), **options)
    for state, seen, notes in found:
        assert seen == report.batches == sum(spread)
        assert notes == report.notes == ()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], found[0][0][name]), f"{name} differs by rank"
            assert_close(state[name].double(), to_float64(value), dtype="float64", quantity="y", what=name)


def a_single_sample_each() -> tuple[int, tuple[str, ...]]:
    """One value a channel on each rank: enough together."""
    rank = torch.distributed.get_rank()
    model = nn.Sequential(bn.BatchNorm1d(3)).double()
    report = bn.recalibrate(model, batches(2)[rank][:1].split(1), process_group="world")
    return report.layers["0"].count, report.notes


def test_one_value_on_each_rank_is_enough_together(on_ranks: OnRanks) -> None:
    note = (
        "batch 1, of one value a channel, cannot be normalized by itself: counted at 0, unseen by the layers after it"
    )
    assert on_ranks(2, a_single_sample_each) == [(2, (f"rank 0: {note}", f"rank 1: {note}"))] * 2


def failing(bad_rank: int) -> tuple[str, str, bool]:
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    part = mine((2, 2, 2), False)
    if torch.distributed.get_rank() == bad_rank:
        part[1][0, 0] = torch.nan
    try:
        bn.recalibrate(model, part, process_group="world")
    except bn.BatchNormError as error:
        unchanged = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        return type(error).__name__, str(error), unchanged
    return "", "", False


def test_a_rank_that_fails_fails_for_all_and_nothing_is_changed(on_ranks: OnRanks) -> None:
    found = on_ranks(3, failing, 1)
    other = (
        "recalibrate: expected every rank of the default process group to measure its batches, got NonFiniteError on "
        "rank 1. The error there says what to do. Nothing was changed on any rank."
    )
    assert [kind for kind, _, _ in found] == ["ExchangeError", "NonFiniteError", "ExchangeError"]
    assert [message for _, message, _ in found][::2] == [other, other]
    assert all(unchanged for *_, unchanged in found)


def none_anywhere() -> str:
    try:
        bn.recalibrate(network(), [], process_group="world")
    except bn.BatchNormError as error:
        return str(error)
    return ""


def test_no_batch_on_any_rank_is_an_error_on_all(on_ranks: OnRanks) -> None:
    message = (
        "recalibrate: expected at least one batch, got an empty iterable. "
        "A generator that was already used up gives none."
    )
    assert on_ranks(2, none_anywhere) == [message] * 2


def test_without_a_group_it_is_the_plain_one() -> None:
    plain, ours = network(), network()
    bn.recalibrate(plain, batches(3))
    bn.recalibrate(ours, batches(3), process_group="world")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
