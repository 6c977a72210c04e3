"""Blocks of updates, domains, freezing, checkpoints and exact accumulation, with each other and across ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from pairwise import pairwise

CUT = [[3, 2], [4, 0], [1, 2]]
"""The sizes of the micro-batches on each rank: in all 12 samples. One of a single sample, one empty."""


def model(process_group: Any = None, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.Sequential(bn.BatchNorm1d(5, process_group=process_group, **options), nn.Tanh(), nn.Linear(5, 3)),
        bn.BatchNorm1d(3, process_group=process_group, momentum=None, **options),
    ).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)


def of_rank(rank: int, whole: Tensor) -> list[list[Tensor]]:
    """The micro-batches of a rank."""
    sizes = [size for each in CUT for size in each]
    parts = list(whole.split(sizes))
    return parts[2 * rank : 2 * rank + 2]  # type: ignore[return-value]


def outcome(net: nn.Module, reduce: bool) -> list[Tensor]:
    grads = [p.grad.clone() for p in net.parameters()]
    if reduce:
        for g in grads:
            torch.distributed.all_reduce(g)
    return [*grads, *(b.clone() for b in net.buffers())]


def exactly_on_a_rank() -> list[Tensor]:
    net = model("world")
    x, dy = (of_rank(torch.distributed.get_rank(), t) for t in data())
    with bn.defer_updates(net) as updates:
        bn.exact_accumulation(net, zip(x, dy, strict=True), lambda y, d: (y * d).sum(), reduction="sum")
    updates.commit()
    return outcome(net, True)


def accumulated_on_a_rank() -> list[Tensor]:
    net = bn.domains(model("world"), ["source", "target"])
    x, dy = (of_rank(torch.distributed.get_rank(), t) for t in data())
    with bn.use_domain(net, "target"), bn.accumulate_statistics(net):
        for a, d in zip(x, dy, strict=True):
            (checkpoint(net, a, use_reentrant=False) * d).sum().backward()
    return outcome(net, True)


def test_exact_accumulation_over_ranks_is_one_large_batch(on_ranks: Callable[..., list[list[Tensor]]]) -> None:
    """Deferred, too; the micro-batches are uneven, one of one sample and one of none."""
    results = on_ranks(3, exactly_on_a_rank)
    net = model()
    x, dy = data()
    (net(x) * dy).sum().backward()
    expected = outcome(net, False)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_checkpoints_and_accumulation_in_a_domain_over_ranks(on_ranks: Callable[..., list[list[Tensor]]]) -> None:
    results = on_ranks(3, accumulated_on_a_rank)
    net = bn.domains(model(), ["source", "target"])
    pairs = [
        [torch.cat([of_rank(rank, t)[i] for rank in range(3)]) for t in data()]
        for i in range(2)  # type: ignore[misc]
    ]
    with bn.use_domain(net, "target"), bn.accumulate_statistics(net):
        for a, d in pairs:
            (net(a) * d).sum().backward()
    for result in results:
        torch.testing.assert_close(result, outcome(net, False), rtol=1e-9, atol=1e-11)
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def deferred_under_ddp(defer: bool) -> list[Tensor]:
    """Each rank has statistics of its own, and DDP sends those of the first rank to all in front of each forward."""
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(3):
        x = torch.randn(6, 4, dtype=torch.float64)
        with bn.defer_updates(net, optimizer) if defer else nullcontext():
            net(x).pow(3).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
    return [t.clone() for t in net.state_dict().values()]


def test_deferred_updates_under_ddp_whose_buffers_are_sent_around(on_ranks: Callable[..., list[list[Tensor]]]) -> None:
    deferred, plain = (on_ranks(2, deferred_under_ddp, defer) for defer in (True, False))
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(deferred[rank], plain[rank], strict=True))


CHOICES: dict[str, list[Any]] = {
    "defer": [None, "commit", "discard", "optimizer"],
    "accumulate": [False, True],
    "domain": [None, "source", "target"],
    "freeze": [None, "first", "affine"],
    "checkpoint": [None, True, False],
    "nonfinite": ["propagate", "skip", "raise"],
    "how": ["plain", "exact"],
}


def allowed(case: Mapping[str, Any]) -> bool:
    """exact_accumulation refuses checkpoints; test_exact.py has the message."""
    return case.get("how") != "exact" or case.get("checkpoint") is None


CASES = pairwise(CHOICES, allowed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_every_pair_keeps_what_each_promises(case: dict[str, Any]) -> None:
    net = model(nonfinite=case["nonfinite"])
    if case["domain"]:
        bn.domains(net, ["source", "target"])
    if case["freeze"]:
        bn.freeze(net[1], statistics=case["freeze"] == "first", affine=True)
    net.train()
    exact = case["how"] == "exact"
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    x, dy = data()
    parts = [(x[:7], dy[:7]), (x[7:], dy[7:])]
    before = copy.deepcopy(net.state_dict())

    def forward(x: Tensor) -> Tensor:
        if case["checkpoint"] is None:
            y: Tensor = net(x)
            return y
        inputs = x.clone().requires_grad_()  # which a reentrant checkpoint wants
        y = checkpoint(net, inputs, use_reentrant=case["checkpoint"])
        return y

    with ExitStack() as stack:
        updates = None
        if case["defer"]:
            updates = stack.enter_context(bn.defer_updates(net, *[optimizer] * (case["defer"] == "optimizer")))
        if case["domain"]:
            stack.enter_context(bn.use_domain(net, case["domain"]))
        with ExitStack() as inner:
            if case["accumulate"]:
                inner.enter_context(bn.accumulate_statistics(net))
            if exact:
                bn.exact_accumulation(net, parts, lambda y, d: (y * d).sum(), reduction="sum")
            else:
                for a, d in parts:
                    (forward(a) * d).sum().backward()
        if case["defer"] == "optimizer":
            optimizer.step()
        if updates is not None:
            for name, b in net[2].named_buffers():
                if case["domain"] != "target":  # there the buffers have changed places
                    assert torch.equal(b, before[f"2.{name}"])
    if case["defer"] == "commit":
        updates.commit()
    elif case["defer"] == "discard":
        updates.discard()

    after = net.state_dict()
    suffix = "__target" if case["domain"] == "target" else ""
    counts = {i: int(after[f"{i}.num_batches_tracked{suffix}"]) for i in ("1.0", "2")}
    once = case["accumulate"] or exact
    moved = 0 if case["defer"] == "discard" else 1 if once else 2
    assert counts == {"1.0": 0 if case["freeze"] == "first" else moved, "2": moved}
    # Nothing but that domain's statistics has moved, and the parameters by the optimizer alone.
    for key, t in after.items():
        is_statistic = "running" in key or "batches" in key
        here = is_statistic and key.endswith(suffix or ("mean", "var", "tracked"))
        if not here and (is_statistic or case["defer"] != "optimizer"):
            assert torch.equal(t, before[key]), key
    assert all((p.grad is None) == (not p.requires_grad) for p in net.parameters())
    if exact and not case["freeze"]:
        reference = model()
        (reference(x) * dy).sum().backward()
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
        if moved:
            torch.testing.assert_close(after[f"2.running_var{suffix}"], reference[2].running_var)


def test_all_pairs_are_among_the_cases() -> None:
    for a, b in combinations(CHOICES, 2):
        seen = {(case[a], case[b]) for case in CASES}
        missing = 2 if (a, b) == ("checkpoint", "how") else 0
        assert len(seen) == len(CHOICES[a]) * len(CHOICES[b]) - missing
