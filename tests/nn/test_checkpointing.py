"""Activation checkpointing runs a forward twice; the running statistics move once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import batchnorm as bn
from batchnorm.errors import StateError
from batchnorm.kernels import use_backend

Wrap = Callable[[nn.Module, Tensor], Tensor]

WRAPS: dict[str, Wrap] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "without early stop": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "block by block": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "block by block, reentrant": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=True),
    "nested": lambda model, x: checkpoint(lambda x: checkpoint(model, x, use_reentrant=False), x, use_reentrant=False),
    "nested, the outer reentrant": lambda model, x: checkpoint(
        lambda x: checkpoint(model, x, use_reentrant=False), x, use_reentrant=True
    ),
    "nested, both reentrant": lambda model, x: checkpoint(
        lambda x: checkpoint(model, x, use_reentrant=True), x, use_reentrant=True
    ),
}


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 5),
        bn.BatchNorm1d(5, activation="relu", **options),
        nn.Linear(5, 3),
        bn.BatchNorm1d(3, momentum=None, **options),
    ).double()


def outcome(model: nn.Module, forward: Callable[[Tensor], Tensor], steps: int = 2) -> list[Tensor]:
    """Results, gradients and buffers of some steps."""
    torch.manual_seed(2)
    found = []
    for _ in range(steps):
        x = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
        dy = torch.randn(6, 3, dtype=torch.float64)
        y = forward(x)
        y.backward(dy)
        found += [y.detach(), x.grad]
    return found + [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]


def same_to_the_bit(actual: list[Tensor], reference: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, reference, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager", "composite"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_checkpointed_step_is_the_plain_one_to_the_bit(wrap: Wrap, backend: str) -> None:
    with use_backend(backend):
        plain = network()
        reference = outcome(plain, plain)
        model = network()
        assert same_to_the_bit(outcome(model, lambda x: wrap(model, x)), reference)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("policy", ["norms", "products", "everything", "nothing", "by turns"])
def test_selective_checkpointing_moves_them_once_and_replays_the_right_results(policy: str) -> None:
    """The kept results are given back by the number of the call, so the updates of the first forward count there."""
    plain = network()
    reference = outcome(plain, plain)

    def contexts() -> Any:
        def choose(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            keep = {
                "norms": any(name in str(op) for name in ("rsqrt", "sub", "square")),
                "products": any(name in str(op) for name in ("mm", "mul")),
                "everything": True,
                "nothing": False,
                "by turns": any(name in str(op) for name in ("add", "clone", "_to_copy")),
            }[policy]
            if str(op).split(".")[1].endswith("_"):
                keep = False  # a result that is written again later, which torch's layer cannot replay either
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(choose)

    model = network()
    found = outcome(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("block", ["defer", "accumulate"])
def test_with_blocks_of_updates(wrap: Wrap, block: str) -> None:
    def run(forward: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        if block == "defer":
            with bn.defer_updates(model) as updates:
                found = outcome(model, forward)
            updates.commit()
        else:
            with bn.accumulate_statistics(model):
                found = outcome(model, forward)
        return found + [b.clone() for b in model.buffers()]

    plain = network()
    reference = run(plain, plain)
    model = network()
    assert same_to_the_bit(run(lambda x: wrap(model, x), model), reference)
    assert model[1].num_batches_tracked == (2 if block == "defer" else 1)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_with_guards_against_nonfinite_batches(policy: str) -> None:
    plain, model = network(nonfinite=policy), network(nonfinite=policy)
    reference = outcome(plain, plain)
    assert same_to_the_bit(outcome(model, lambda x: checkpoint(model, x, use_reentrant=False)), reference)


def test_renormalization_needs_the_statistics_of_the_first_forward() -> None:
    renorm = bn.Renorm(warmup=(0, 0, 0))

    def run(forward: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        with bn.defer_updates(model) as updates:
            found = outcome(model, forward, steps=1)
        updates.commit()
        return found + [b.clone() for b in model.buffers()]

    plain, model = network(renorm=renorm), network(renorm=renorm)
    for each in (plain, model):
        each(torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1)
    reference = run(plain, plain)
    assert same_to_the_bit(run(lambda x: checkpoint(model, x, use_reentrant=False), model), reference)
    y = checkpoint(model, torch.randn(6, 4, dtype=torch.float64), use_reentrant=False)
    with pytest.raises(StateError) as caught:
        y.sum().backward()
    assert str(caught.value) == (
        "1 (BatchNorm1d): expected the running statistics of the first forward, for renorm in an activation "
        "checkpoint, got later ones. Run forward and backward inside `with defer_updates(model):`, and commit after it."
    )


def test_a_backward_after_the_block_of_updates_changes_nothing_more() -> None:
    model = network()
    with bn.defer_updates(model) as updates:
        y = checkpoint(model, torch.randn(6, 4, dtype=torch.float64), use_reentrant=False)
    updates.commit()
    before = [b.clone() for b in model.buffers()]
    y.sum().backward()
    assert same_to_the_bit([b.clone() for b in model.buffers()], before)


def test_under_no_grad_a_forward_moves_them() -> None:
    model = network()
    with torch.no_grad():
        model(torch.randn(6, 4, dtype=torch.float64))
    assert model[1].num_batches_tracked == 1


def test_a_forward_inside_a_backward_counts_nowhere_even_the_first() -> None:
    """It cannot be told from a recomputation."""
    model = network()

    class Runs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            with torch.enable_grad():
                model(torch.randn(6, 4, dtype=torch.float64))
            return dy

    before = [b.clone() for b in model.buffers()]
    Runs.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert same_to_the_bit([b.clone() for b in model.buffers()], before)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_compiled(inside: bool) -> None:
    """A checkpoint in what is compiled, and a compiled block in a checkpoint."""
    plain, model = network(), network()
    reference = outcome(plain, plain)
    if inside:
        forward = torch.compile(
            lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        forward = lambda x: checkpoint(compiled, x, use_reentrant=False)  # noqa: E731
    for a, b in zip(outcome(model, forward), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
