"""The gradients of a large batch, one micro-batch and one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import batchnorm as bn
from batchnorm.bench.memory import peak
from batchnorm.errors import ArgumentError, NonFiniteError
from batchnorm.kernels import use_backend
from model_state import everything


class Residual(nn.Module):
    """Three norms, one of them beside the others, and additions before and after them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, padding=1)
        self.norm1 = bn.BatchNorm2d(out, activation="relu")
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.norm2 = bn.BatchNorm2d(out, activation="relu")
        self.beside = nn.Conv2d(channels, out, 1)
        self.norm3 = bn.BatchNorm2d(out, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.norm1(self.first(x)))
        return self.norm2(inner, residual=self.norm3(self.beside(x))) + inner


class Pair(nn.Module):
    """Gives a tuple and writes on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = bn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x += 1
        return {"normalized": self.norm(x), "raw": x}


def joined(pair: dict[str, Tensor]) -> Tensor:
    return pair["normalized"] * pair["raw"].sigmoid()


class Twice(nn.Module):
    """One norm, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = bn.BatchNorm2d(4, activation="leaky_relu", negative_slope=0.2)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x)))


def chain() -> list[Any]:
    torch.manual_seed(3)
    modules = [
        Residual(2, 4),
        nn.ReLU(inplace=True),
        Twice(),
        Pair(),
        joined,
        nn.Sequential(nn.Conv2d(4, 3, 2), bn.BatchNorm2d(3)),
        bn.BatchNorm2d(3),
        nn.Flatten(1),
        nn.Linear(3 * 9, 5),
    ]
    return [m.double() if isinstance(m, nn.Module) else m for m in modules]


def modules(blocks: list[Any]) -> nn.ModuleList:
    return nn.ModuleList(block for block in blocks if isinstance(block, nn.Module))


def problem(*sizes: int, requires_grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(4)
    x = [torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in sizes]
    return [t.requires_grad_(requires_grad) for t in x], [torch.randint(5, (n,)) for n in sizes]


def at_once(
    blocks: list[Any], x: list[Tensor], targets: list[Tensor], loss_fn: Callable[..., Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the large batch, by autograd."""
    whole = torch.cat([t.detach() for t in x]).requires_grad_()
    y = whole
    for block in blocks:
        y = block(y.clone()) if isinstance(y, Tensor) else block(y)
    loss = loss_fn(y, torch.cat(targets))
    loss.backward()
    assert whole.grad is not None
    return loss.detach(), list(whole.grad.split([len(t) for t in x]))


def compare(blocks: list[Any], sizes: list[int], reduction: str = "mean", **options: Any) -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y, target, reduction=reduction)

    x, targets = problem(*sizes)
    twin = copy.deepcopy(blocks)
    loss, dx = at_once(twin, x, targets, loss_fn)
    found = bn.exact_accumulation(
        blocks, zip(x, targets, strict=True), loss_fn, reduction=reduction, **options  # type: ignore[arg-type]
    )  # fmt: skip
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found, loss, **close)
    for a, b in zip(x, dx, strict=True):
        torch.testing.assert_close(a.grad, b, **close)
    for (name, p), q in zip(modules(blocks).named_parameters(), modules(twin).parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, **close)
    for (name, s), t in zip(modules(blocks).named_buffers(), modules(twin).buffers(), strict=True):
        torch.testing.assert_close(s, t, msg=name, **close)


@pytest.mark.parametrize("backend", ["cpu", "eager", "composite"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_and_statistics_are_those_of_the_large_batch(backend: str, reduction: str) -> None:
    with use_backend(backend):
        compare(chain(), [3, 5, 2], reduction)


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), shuffled=st.randoms(use_true_random=False))
def test_cut_in_any_way_in_any_order(sizes: list[int], shuffled: Any) -> None:
    """A micro-batch may be a single sample, of one value a channel."""
    torch.manual_seed(5)
    sizes = [*sizes, 2]
    model = nn.Sequential(
        nn.Linear(4, 6), bn.BatchNorm1d(6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3), bn.BatchNorm1d(3))
    ).double()
    twin = copy.deepcopy(model)
    x = torch.randn(sum(sizes), 4, dtype=torch.float64)
    dy = torch.randn(sum(sizes), 3, dtype=torch.float64)
    (twin(x) * dy).sum().backward()
    parts = list(zip(x.split(sizes), dy.split(sizes), strict=True))
    shuffled.shuffle(parts)
    bn.exact_accumulation(model, parts, lambda y, dy: (y * dy).sum(), reduction="sum")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
    for s, t in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(s, t)


def test_the_gradient_is_that_of_differences() -> None:
    """Against the loss itself, without autograd."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(bn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))).double()
    with torch.no_grad():
        model[1][0].weight.uniform_(0.5, 1.5)
    x = torch.randn(7, 3, dtype=torch.float64)
    dy = torch.randn(7, 2, dtype=torch.float64)
    bn.exact_accumulation(model, zip(x.split(3), dy.split(3), strict=True), lambda y, d: (y * d).sum(), reduction="sum")
    weight = model[0].weight
    with torch.no_grad():
        for i, j in ((0, 0), (3, 2), (1, 1)):
            before, losses = weight[i, j].clone(), []
            for step in (1e-5, -1e-5):
                weight[i, j] = before + step
                losses.append((model(x) * dy).sum())
            weight[i, j] = before
            torch.testing.assert_close(weight.grad[i, j], (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_gradients_add_to_those_that_are_there() -> None:
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    step = lambda: bn.exact_accumulation(model, x.split(3), lambda y: (y**3).mean())  # noqa: E731
    step()
    once = [p.grad.clone() for p in model.parameters()]
    step()
    for p, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_masks_and_weights_inside_a_block() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return self.norm(given["x"], mask=given["mask"], sample_weight=given["weight"])

    block = Masked().double()
    twin = copy.deepcopy(block)
    x = torch.randn(8, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64).requires_grad_()
    mask = torch.rand(8, 5) > 0.4
    mask[:4] = mask[:4] & (torch.arange(5) < 2)
    dy = torch.randn(8, 3, 5, dtype=torch.float64)
    (twin({"x": x, "mask": mask, "weight": weight}) * dy).sum().backward()
    expected = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    parts = [({"x": x[i : i + 4], "mask": mask[i : i + 4], "weight": weight[i : i + 4]}, dy[i : i + 4]) for i in (0, 4)]
    bn.exact_accumulation([block], parts, lambda y, dy: (y * dy).sum(), reduction="sum")
    torch.testing.assert_close([x.grad, weight.grad], expected)
    for p, q in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for s, t in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(s, t)


def test_dropout_draws_for_each_micro_batch_and_the_same_each_time() -> None:
    torch.manual_seed(7)
    seen: list[Tensor] = []

    class Recording(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append((y == 0).detach())
            return y

    model = nn.Sequential(nn.Sequential(bn.BatchNorm1d(50), Recording(0.5), nn.Linear(50, 2), bn.BatchNorm1d(2)))
    x = torch.randn(8, 50)
    torch.manual_seed(8)
    bn.exact_accumulation(model, x.split(4), lambda y: y.square().mean())
    first, second = seen[0], seen[1]
    assert not torch.equal(first, second)
    assert len(seen) > 4
    assert all(torch.equal(mask, (first, second)[i % 2]) for i, mask in enumerate(seen))
    after = torch.rand(1)
    seen.clear()
    torch.manual_seed(8)
    bn.exact_accumulation(model, x.split(4), lambda y: y.square().mean())
    assert torch.equal(seen[0], first)
    assert torch.equal(torch.rand(1), after)


def test_frozen_layers_and_integer_inputs_and_parts_without_gradients() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), bn.freeze(bn.BatchNorm1d(4)), nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3))
    ).double()
    model[0].requires_grad_(False)
    bn.freeze(model[1], affine=True)
    twin = copy.deepcopy(model)
    x = torch.randint(9, (7,))
    twin(x).pow(3).sum().backward()
    bn.exact_accumulation(model, x.split(4), lambda y: y.pow(3).sum(), reduction="sum")
    assert model[0].weight.grad is None
    assert model[1].num_batches_tracked == 0
    for p, q in zip(model[2].parameters(), twin[2].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(bn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    twin = copy.deepcopy(model)
    x = torch.randn(12, 4)
    with torch.autocast("cpu", torch.bfloat16):
        twin(x).float().square().mean().backward()
        bn.exact_accumulation(model, x.split(5), lambda y: y.float().square().mean())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=5e-2, atol=5e-3)
    assert model[0].weight.grad.abs().max() > 0


def test_with_blocks_of_updates_and_domains() -> None:
    model = bn.domains(nn.Sequential(bn.BatchNorm1d(3)).double(), ["source", "target"])
    x = torch.randn(8, 3, dtype=torch.float64)
    with bn.defer_updates(model) as updates, bn.use_domain(model, "target"):
        bn.exact_accumulation(model, x.split(4), lambda y: y.pow(3).sum())
        assert model[0].num_batches_tracked == 0
    updates.commit()
    assert (int(model[0].num_batches_tracked), int(model[0].num_batches_tracked__target)) == (0, 1)
    torch.testing.assert_close(model[0].running_mean__target, 0.1 * x.mean(0))


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_guards_against_nonfinite_batches(policy: Any) -> None:
    model = nn.Sequential(bn.BatchNorm1d(3, nonfinite=policy), nn.Linear(3, 2))
    x = torch.randn(8, 3)
    x[1, 0] = torch.inf
    before = everything(model)
    if policy == "raise":
        with pytest.raises(NonFiniteError):
            bn.exact_accumulation(model, x.split(4), lambda y: y.sum())
        assert everything(model) == before
        assert model[1].weight.grad is None
    else:
        bn.exact_accumulation(model, x.split(4), lambda y: y.sum())
        assert everything(model)["state"] == before["state"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 3, 7, 11])
def test_after_an_error_everything_is_as_it_was(error: type[BaseException], when: int) -> None:
    calls = 0

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > when:
                raise error
            return x.clone()

    model = nn.Sequential(
        nn.Linear(4, 3), bn.BatchNorm1d(3), Fails(), nn.Sequential(nn.Linear(3, 2), bn.BatchNorm1d(2))
    )
    model[0].weight.grad = grad = torch.ones(3, 4)
    before = everything(model)
    with pytest.raises(error):
        bn.exact_accumulation(model, torch.randn(12, 4).split(3), lambda y: model[2](y).sum())
    assert everything(model) == before
    assert model[0].weight.grad is grad
    assert bool((grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_each_misuse_has_its_message() -> None:
    x = torch.randn(8, 3)
    square = lambda y: y.square().mean()  # noqa: E731
    norm = bn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(bn.BatchNorm1d(3) for _ in range(2))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y: Tensor = self.norms[self.calls % 2](x)
            return y

    hooked = nn.Sequential(bn.BatchNorm1d(3))
    hooked.register_forward_hook(lambda *_: None)
    checkpointed = nn.Sequential(bn.BatchNorm1d(3))
    checkpointed[0].forward = lambda x: checkpoint(  # type: ignore[method-assign]
        lambda x: bn.BatchNorm1d.forward(checkpointed[0], x), x, use_reentrant=False
    )
    cases: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
        (nn.Linear(3, 3), [x], square, {}, "expected a torch.nn.Sequential or a list of callables, got a Linear. "
            "Give its blocks as a list, in the order in which they are called."),
        ([norm, 3], [x], square, {}, "expected blocks that can be called, got a int. Give modules."),
        ([], [x], square, {}, "expected blocks that can be called, got an empty chain. Give modules."),
        (model, [], square, {}, "expected at least one micro-batch, got none. A generator that was already used up "
            "gives none."),
        (model, [x], square, {"reduction": "median"}, "expected reduction to be one of ('mean', 'sum'), got 'median'. "
            "Choose one of them."),
        (model, [x], lambda y: y, {}, "expected a loss of one value, got a tensor of shape (8, 3). Let the loss "
            "function average or add up."),
        (model, [x[:1]], square, {}, "expected more than 1 value per channel in all micro-batches together, got 1 at "
            "1 (BatchNorm1d). Give more samples."),
        (hooked, [x], square, {}, "expected a Sequential without hooks, got one with hooks. Remove them, or give "
            "list(model)."),
        (nn.Sequential(nn.BatchNorm1d(3)), [x], square, {}, "expected layers of this library, got torch.nn's 0 "
            "(BatchNorm1d). Call batchnorm.convert(model)."),
        ([bn.BatchNorm1d(3, virtual_batch_size=2)], [x], square, {}, "expected layers that normalize by the "
            "statistics of the whole batch, got BatchNorm1d with virtual_batch_size. Leave it away."),
        ([bn.BatchNorm1d(3, renorm=bn.Renorm())], [x], square, {}, "expected layers that normalize by the statistics "
            "of the whole batch, got BatchNorm1d with renorm. Leave it away."),
        ([nn.Linear(3, 3)], [x], nn.Sequential(bn.BatchNorm1d(3)), {}, "expected batch norms that the blocks hold, "
            "got 0 (BatchNorm1d), which none of the blocks holds. Give the module itself as a block, not a function "
            "that calls it."),
        ([lambda x: norm(x)], [x], square, {}, "expected batch norms that the blocks hold, got 1 (BatchNorm1d), which "
            "none of the blocks holds. Give the module itself as a block, not a function that calls it."),
        (checkpointed, [x], square, {}, "expected blocks without activation checkpoints, got one around 0 "
            "(BatchNorm1d). Leave them away: what is inside a block is computed again in any case."),
    ]  # fmt: skip
    for blocks, batches, loss_fn, options, message in cases:
        with pytest.raises(ArgumentError) as caught:
            bn.exact_accumulation(blocks, batches, loss_fn, **options)
        assert str(caught.value) == f"exact_accumulation: {message}"
    with pytest.raises(ArgumentError) as caught:
        bn.exact_accumulation([Other()], x.split(2), square)
    assert str(caught.value).startswith(
        "exact_accumulation: expected a block that uses the same layers for every micro-batch and each time"
    )
    assert norm._staged is None
    assert norm.num_batches_tracked == 0


def blocks_of(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(
            nn.Sequential(bn.BatchNorm2d(width, activation="relu"), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
    )


def test_it_takes_less_memory_than_the_large_batch_and_twice_its_work() -> None:
    """What is kept is the input of each block; a block that begins with its norm is measured for nothing."""
    model = blocks_of(8, 4)
    x = torch.randn(16, 3, 16, 16)
    square = lambda y: y.square().mean()  # noqa: E731
    work, most = [], []
    for step in (
        lambda: square(model(x)).backward(),
        lambda: bn.exact_accumulation(model, x.split(2), square),
    ):
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        work.append(counter.get_total_flops())
        model.zero_grad()
        most.append(peak(step))
        model.zero_grad()
    assert most[1] < 0.75 * most[0]
    # Forward once to measure on the way, and once more a norm for its sums; backward once for them, and once.
    assert work[1] < 2.1 * work[0]
