"""Running statistics move with the optimizer's step, or once for several batches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, NonFiniteError, StateError
from batchnorm.kernels import use_backend
from model_state import everything
from tolerances import assert_close


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 5), bn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 3), bn.BatchNorm1d(3, **options)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def expected(batches: list[Tensor], momentum: float | None = 0.1) -> tuple[Tensor, Tensor]:
    """Running statistics in float64 after these batches, from the formula."""
    channels = batches[0].shape[1]
    mean, var = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    for i, x in enumerate(batches):
        values = x.double().transpose(0, 1).flatten(1)
        weight = 1 / (i + 1) if momentum is None else momentum
        mean = (1 - weight) * mean + weight * values.mean(1)
        var = (1 - weight) * var + weight * values.var(1, correction=1)
    return mean, var


def agrees(
    layer: nn.Module, reference: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32, std: float = 1
) -> None:
    assert_close(layer.running_mean, reference[0], dtype=dtype, quantity="running_mean", scale=std)
    assert_close(layer.running_var, reference[1], dtype=dtype, quantity="running_var")


def fails_after_a_batch(model: nn.Module, error: type[BaseException], *optimizers: Any) -> None:
    model(torch.randn(8, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    raise error


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", ["cpu", "eager", "composite"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("inside", [True, False])
def test_committed_updates_are_those_of_the_plain_model_to_the_bit(
    backend: str, momentum: float | None, inside: bool
) -> None:
    model, plain = network(momentum=momentum), network(momentum=momentum)
    batches = torch.randn(3, 8, 4)
    before = state(model)
    with use_backend(backend):
        with bn.defer_updates(model) as updates:
            for x in batches:
                assert torch.equal(model(x), plain(x))
            assert same(state(model), before)
            if inside:
                updates.commit()
        if not inside:
            updates.commit()
    assert same(state(model), state(plain))


def test_in_the_block_eval_mode_sees_the_statistics_of_before() -> None:
    model, x = network(), torch.randn(8, 4)
    before = model.eval()(x)
    model.train()
    with bn.defer_updates(model):
        model(x + 3)
        assert torch.equal(model.eval()(x), before)


def test_discarded_and_forgotten_updates_change_nothing() -> None:
    model = network()
    model(torch.randn(8, 4))
    before = everything(model)
    with bn.defer_updates(model) as updates:
        model(torch.randn(8, 4))
        updates.discard()
        model(torch.randn(8, 4))
    with bn.defer_updates(model) as later:
        model(torch.randn(8, 4))
    later.discard()
    del updates
    assert everything(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_ends_in_an_exception_has_nothing_to_commit(error: type[BaseException]) -> None:
    model = network()
    before = everything(model)
    updates = bn.defer_updates(model)
    with pytest.raises(error), updates:
        fails_after_a_batch(model, error)
    assert everything(model) == before
    with pytest.raises(StateError) as caught:
        updates.commit()
    assert str(caught.value) == (
        "commit: expected updates that wait to be committed, got updates that were discarded, as its block ended in an "
        "error. Write `with defer_updates(model) as updates:` for each step, and end it once."
    )
    with pytest.raises(error), bn.accumulate_statistics(model):
        fails_after_a_batch(model, error)
    assert everything(model) == before


def test_commits_in_the_block_go_on_from_each_other_and_discards_from_the_last() -> None:
    model, plain = network(), network()
    first, second, third = torch.randn(3, 8, 4)
    with bn.defer_updates(model) as updates:
        model(first)
        updates.commit()
        plain(first)
        assert same(state(model), state(plain))
        model(second)
        updates.discard()
        model(third)
        updates.commit()
    plain(third)
    assert same(state(model), state(plain))


def test_each_misuse_has_its_message_and_changes_nothing() -> None:
    model = network()
    updates = bn.defer_updates(model)
    todo = "Write `with defer_updates(model) as updates:` for each step, and end it once."
    with pytest.raises(StateError) as caught:
        updates.commit()
    assert str(caught.value) == (
        f"commit: expected updates that wait to be committed, got a block that was not entered. {todo}"
    )
    with updates:
        model(torch.randn(8, 4))
    updates.commit()
    for function in ("commit", "discard"):
        with pytest.raises(StateError) as caught:
            getattr(updates, function)()
        assert str(caught.value) == (
            f"{function}: expected updates that wait to be committed, got updates that were committed already. {todo}"
        )
    with pytest.raises(StateError) as caught:
        updates.__enter__()
    assert str(caught.value) == (
        "defer_updates: expected a block that is entered once, got one committed already. "
        "Call defer_updates again for the next step."
    )
    with pytest.raises(ArgumentError) as argument:
        bn.defer_updates(nn.Linear(2, 2))
    assert str(argument.value) == (
        "defer_updates: expected a model with batch normalization layers, got one without. "
        "Give the model that holds the layers."
    )
    with pytest.raises(ArgumentError) as argument, bn.accumulate_statistics(nn.Sequential(nn.BatchNorm1d(3))):
        pass
    assert str(argument.value) == (
        "accumulate_statistics: expected layers of this library, got torch.nn's BatchNorm1d at '0'. "
        "Call batchnorm.convert(model)."
    )
    with pytest.raises(ArgumentError) as argument, bn.accumulate_statistics(bn.LazyBatchNorm1d()):
        pass
    assert str(argument.value) == (
        "accumulate_statistics: expected layers that know their channels, got LazyBatchNorm1d, which has seen no "
        "input. Run the model once on a batch."
    )
    with pytest.raises(ArgumentError) as argument:
        bn.defer_updates(model, torch.amp.GradScaler("cpu"))  # type: ignore[arg-type]
    assert str(argument.value) == (
        "defer_updates: expected torch.optim.Optimizers, got GradScaler. "
        "A scaler is not needed: give the optimizers that it steps."
    )


@pytest.mark.parametrize("how", ["a batch", "reset", "load", "recalibrate"])
def test_updates_are_not_written_over_what_changed_the_statistics_in_the_meantime(how: str) -> None:
    model = network()
    other = {name: t + 1 for name, t in network().state_dict().items()}
    with bn.defer_updates(model) as updates:
        model(torch.randn(8, 4))
    if how == "a batch":
        model(torch.randn(8, 4))
    elif how == "reset":
        model(torch.randn(8, 4))
        model[1].reset_running_stats()
        model[4].reset_running_stats()
        model[4].running_mean += 1
    elif how == "load":
        model.load_state_dict(other)
    else:
        bn.recalibrate(model, [torch.randn(8, 4)])
    before = everything(model)
    with pytest.raises(StateError) as caught:
        updates.commit()
    assert str(caught.value) == (
        "commit: expected statistics as they were when the block began, got others. "
        "Discard them, or let the block be the only thing that changes the statistics."
    )
    assert everything(model) == before


def test_the_copies_are_made_at_the_first_batch_as_ddp_sends_buffers_before_it() -> None:
    model, plain, other = network(), network(), network()
    other(torch.randn(8, 4) + 3)
    x = torch.randn(8, 4)
    plain.load_state_dict(other.state_dict())
    plain(x)
    with bn.defer_updates(model) as updates, bn.defer_updates(model) as inner:
        model.load_state_dict(other.state_dict())
        model(x)
        assert same(state(model), state(other))
        inner.commit()
    updates.commit()
    assert same(state(model), state(plain))


def test_statistics_that_are_nan_are_no_change() -> None:
    layer = bn.BatchNorm1d(2)
    layer(torch.full((4, 2), torch.inf))
    with bn.defer_updates(layer) as updates:
        layer(torch.randn(4, 2))
    updates.commit()
    assert layer.num_batches_tracked == 2


def test_layers_in_eval_mode_stay_out_and_torchs_may_be_among_them() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), bn.BatchNorm1d(4), bn.BatchNorm1d(4, track_running_stats=False))
    model[0].eval()
    model[1].eval()
    before = everything(model)
    with bn.defer_updates(model) as updates, bn.accumulate_statistics(model):
        model(torch.randn(8, 4))
    updates.commit()
    assert everything(model) == before


# ----------------------------------------------------------------------------------------------------------------------
# with an optimizer


def train(model: nn.Module, scaler: Any, *optimizers: Any, overflow: bool, order: str) -> None:
    """One step in one of the orders in which people call a scaler; with ``overflow`` its gradients are infinite."""
    loss = model(torch.randn(8, 4)).square().mean() * (torch.inf if overflow else 1)
    scaler.scale(loss).backward()
    if order == "clipped":
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    if order != "update outside":
        scaler.update()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ["usual", "clipped", "update outside"])
def test_a_step_that_the_scaler_skips_leaves_the_statistics(order: str, fused: bool) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for overflow in (False, True, False, True, True):
        before, weight = state(model), model[0].weight.clone()
        with bn.defer_updates(model, optimizer) as updates:
            train(model, scaler, optimizer, overflow=overflow, order=order)
            assert updates.stepped != overflow
        if order == "update outside":
            scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model[0].weight, weight) == overflow
        assert same(state(model), before) == overflow
        counts.append(int(model[1].num_batches_tracked))
    assert counts == [1, 1, 2, 2, 2]
    assert not optimizer._optimizer_step_post_hooks


def test_by_hand_after_the_block_and_after_the_scalers_update() -> None:
    """A loop that someone else owns: the step comes after the block has ended."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (False, True, False):
        with bn.defer_updates(model) as updates:
            loss = model(torch.randn(8, 4)).square().mean() * (torch.inf if overflow else 1)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        updates.discard() if scaler.get_scale() < before else updates.commit()
        optimizer.zero_grad()
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 1)])
def test_of_several_optimizers_one_skipped_step_is_enough(skipped: tuple[int, ...]) -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[:2].parameters(), 0.1), torch.optim.Adam(model[2:].parameters(), fused=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = state(model)
    with bn.defer_updates(model, *optimizers):
        scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
        for which in skipped:
            optimizers[which].param_groups[0]["params"][0].grad.fill_(torch.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert same(state(model), before) == bool(skipped)


def test_an_optimizer_that_is_not_stepped_commits_nothing_and_no_scaler_is_needed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = state(model)
    with bn.defer_updates(model, optimizer):
        model(torch.randn(8, 4)).sum().backward()
    assert same(state(model), before)
    with bn.defer_updates(model, optimizer):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert model[1].num_batches_tracked == 1
    with pytest.raises(KeyboardInterrupt), bn.defer_updates(model, optimizer):
        fails_after_a_batch(model, KeyboardInterrupt, optimizer)
    assert model[1].num_batches_tracked == 1
    assert not optimizer._optimizer_step_post_hooks


# ----------------------------------------------------------------------------------------------------------------------
# several batches as one


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    shuffle=st.randoms(use_true_random=False),
    momentum=st.sampled_from([0.1, 1.0, None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    backend=st.sampled_from(["cpu", "eager", "composite"]),
)
def test_micro_batches_in_any_order_give_the_update_of_the_whole_batch(
    sizes: list[int], shuffle: Any, momentum: float | None, dtype: torch.dtype, backend: str
) -> None:
    x = (torch.randn(sum(sizes), 3, 4) * 2 + 5).to(dtype)
    layer = bn.BatchNorm1d(3, momentum=momentum, dtype=dtype)
    with use_backend(backend):
        layer(x[:2])
        parts = list(x.split(sizes))
        shuffle.shuffle(parts)
        with bn.accumulate_statistics(layer):
            for part in parts:
                layer(part)
    assert layer.num_batches_tracked == 2
    agrees(layer, expected([x[:2], x], momentum), dtype, std=5.0)


def test_only_the_statistics_are_merged() -> None:
    layer, alone = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    parts = torch.randn(12, 3).split([7, 5])
    with bn.accumulate_statistics(layer):
        for part in parts:
            assert torch.equal(layer(part), alone(part))
            assert layer.num_batches_tracked == 0


def test_empty_blocks_and_empty_batches_count_nothing() -> None:
    layer = bn.BatchNorm1d(3)
    before = everything(layer)
    with bn.accumulate_statistics(layer):
        pass
    with bn.accumulate_statistics(layer):
        layer(torch.empty(0, 3))
    assert everything(layer) == before
    assert layer._staged is None


def test_masks_and_weights_count_in() -> None:
    layer = bn.BatchNorm1d(3)
    x, mask, weight = torch.randn(12, 3), torch.rand(12) > 0.3, torch.randint(1, 4, (12,))
    mask[:2] = mask[6:8] = True
    with bn.accumulate_statistics(layer):
        for part, present, weights in zip(x.split(6), mask.split(6), weight.split(6), strict=True):
            layer(part, mask=present, sample_weight=weights)
    agrees(layer, expected([x[mask].repeat_interleave(weight[mask], 0)]))


def test_several_uses_in_a_forward_are_one_update() -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(12, 3)
    with bn.accumulate_statistics(layer):
        layer(x)
        layer(x + 4)
    agrees(layer, expected([torch.cat([x, x + 4])]), std=5.0)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("block", ["defer", "accumulate"])
def test_a_batch_that_is_skipped_stays_out_of_the_block_too(block: str) -> None:
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    good, bad = torch.randn(8, 3), torch.full((8, 3), torch.inf)
    huge = torch.randn(8, 3, dtype=torch.float32) * 1e30  # finite in float64, but its variance is not in float32
    if block == "defer":
        with bn.defer_updates(layer) as updates:
            for x in (bad, good, huge):
                layer(x)
        updates.commit()
    else:
        with bn.accumulate_statistics(layer):
            for x in (bad, good, huge):
                layer(x)
    agrees(layer, expected([good]))
    assert layer.num_batches_tracked == 1


def test_a_batch_that_raises_leaves_the_block_without_it() -> None:
    layer = bn.BatchNorm1d(3, nonfinite="raise")
    good = torch.randn(8, 3)
    with bn.accumulate_statistics(layer):
        layer(good)
        with pytest.raises(NonFiniteError) as caught:
            layer(torch.full((8, 3), torch.inf))
    assert str(caught.value).startswith(
        "BatchNorm1d: expected finite values, got Inf or NaN in channels 0, 1, 2 of batch 1."
    )
    agrees(layer, expected([good]))
    assert layer.num_batches_tracked == 1


# ----------------------------------------------------------------------------------------------------------------------
# together


def test_blocks_in_blocks_write_to_the_one_around_them() -> None:
    model = network()
    parts = torch.randn(12, 4).split(6)
    whole = expected([model[0](torch.cat(parts)).detach()])
    with bn.defer_updates(model) as updates:
        with bn.accumulate_statistics(model):
            for part in parts:
                model(part)
        assert model[1].num_batches_tracked == 0
    updates.commit()
    agrees(model[1], whole)
    assert model[1].num_batches_tracked == 1

    # The other way round: a micro-batch that is discarded stays out of the whole.
    model = network()
    with bn.accumulate_statistics(model):
        for part in (parts[0], torch.randn(6, 4) + 9, parts[1]):
            with bn.defer_updates(model) as updates:
                model(part)
            updates.discard() if part.mean() > 5 else updates.commit()
        with bn.defer_updates(model) as updates, bn.defer_updates(model) as inner:
            model(parts[0])
    agrees(model[1], whole)
    with pytest.raises(StateError) as caught:
        updates.commit()
    assert str(caught.value) == (
        "commit: expected a call before the end of the block around this one, got one after it. "
        "Commit before the outer block ends."
    )
    with pytest.raises(StateError):
        inner.commit()


def test_blocks_that_end_out_of_order_are_refused() -> None:
    model = network()
    outer, inner = bn.defer_updates(model), bn.defer_updates(model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(StateError) as caught:
        outer.__exit__(None, None, None)
    assert str(caught.value) == (
        "defer_updates: expected blocks that are nested, got one that ends out of order. "
        "Use them as `with` blocks, the inner one ending first."
    )


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_a_block_is_not_part_of_it(how: Any) -> None:
    model = network()
    with bn.defer_updates(model):
        twin = how(model)
        twin(torch.randn(8, 4))
    assert twin[1].num_batches_tracked == 1
    assert model[1].num_batches_tracked == 0


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_models_defer_and_accumulate(momentum: float | None) -> None:
    model, plain = network(momentum=momentum), network(momentum=momentum)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parts = torch.randn(12, 4).split(6)
    for _ in range(2):
        with bn.defer_updates(compiled) as updates:
            for part in parts:
                compiled(part)
        with bn.defer_updates(plain) as expected:
            for part in parts:
                plain(part)
        updates.commit()
        expected.commit()
        for each in (compiled, plain):
            with bn.accumulate_statistics(each):
                for part in parts:
                    each(part)
        compiled(parts[0])
        plain(parts[0])
    for name, t in state(plain).items():
        torch.testing.assert_close(state(model)[name], t)
    assert model[1].num_batches_tracked == 8
