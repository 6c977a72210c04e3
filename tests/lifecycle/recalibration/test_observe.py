"""Every normalization is seen, however a module reaches its layer, and what cannot be seen is said."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError
from batchnorm.reference import Population, mini_batch_statistics, unbiased_variance
from model_state import everything
from tolerances import assert_close, to_float64

ORDERS: list[Any] = ["joint", "sequential"]


class Holder(nn.Module):
    """Reaches its norm in one of many ways, then another norm in the usual one."""

    def __init__(self, kind: Any = nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm, self.after = kind(3), nn.BatchNorm1d(3)

    def reach(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(torch.tanh(self.reach(x)))
        return result


class ByForward(Holder):
    def reach(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


class ByClass(Holder):
    def reach(self, x: Tensor) -> Tensor:
        return nn.BatchNorm1d.forward(self.norm, x)


class ByFunctional(Holder):
    def reach(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, n.eps)


class AlwaysTraining(Holder):
    """Would write into the running statistics at each batch."""

    def reach(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training=True, eps=n.eps)


class ByTorch(Holder):
    def reach(self, x: Tensor) -> Tensor:
        n = self.norm
        return torch.batch_norm(
            x, n.weight, n.bias, n.running_mean, n.running_var, self.training, 0.1, n.eps, torch.backends.cudnn.enabled
        )


class ChannelsLast(nn.BatchNorm1d):
    """Prepares its input before it normalizes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None, :].transpose(1, 2)).squeeze(2)


class ByHand(nn.BatchNorm1d):
    """Computes for itself, and replaces its buffers while training."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            if self.track_running_stats:
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


class WithActivation(nn.BatchNorm1d):
    """A class of its own in the manner of timm: torch's function, then more."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean if not self.training or self.track_running_stats else None
        var = self.running_var if not self.training or self.track_running_stats else None
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training or mean is None, 0.1, self.eps)


WAYS: dict[str, Any] = {
    "called": Holder,
    "forward": ByForward,
    "the class's forward": ByClass,
    "functional": ByFunctional,
    "functional in training": AlwaysTraining,
    "torch.batch_norm": ByTorch,
    "subclass that prepares": lambda: Holder(ChannelsLast),
    "subclass by hand": lambda: Holder(ByHand),
    "subclass like timm's": lambda: Holder(WithActivation),
    "SyncBatchNorm": lambda: Holder(nn.SyncBatchNorm),
    "ours": lambda: Holder(bn.BatchNorm1d),
    "ours by forward": lambda: ByForward(bn.BatchNorm1d),
    "ours for any rank": lambda: Holder(bn.BatchNorm),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_measured_however_it_is_reached(way: str, order: Any) -> None:
    model = WAYS[way]().double()
    with torch.no_grad():
        model.norm.running_mean.fill_(40)
        model.norm.weight.uniform_(0.5, 2)
    usual = Holder().double()
    usual.load_state_dict(model.state_dict())
    batches = [torch.randn(n, 3, dtype=torch.float64) * 3 + 1 for n in (8, 5)]
    state = everything(model)
    report = bn.recalibrate(model, batches, order=order)
    bn.recalibrate(usual, batches, order=order)
    whole = mini_batch_statistics(to_float64(torch.cat(batches)))
    population = Population(whole.mean, unbiased_variance(whole))
    assert_close(model.norm.running_mean, population.mean, dtype="float64", quantity="running_mean", scale=3.0)
    assert_close(model.norm.running_var, population.var, dtype="float64", quantity="running_var")
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model.after, name), getattr(usual.after, name), rtol=1e-12, atol=1e-12)
    assert (report.layers["norm"].count, report.layers["norm"].uses) == (13, 2)
    after = everything(model)
    assert {k for k in state if state[k] != after[k]} == {"state"}


@pytest.mark.parametrize("order", ORDERS)
def test_batch_norm_linear_is_measured(order: Any) -> None:
    model = nn.Sequential(bn.BatchNormLinear(4, 3), nn.Tanh(), bn.BatchNormLinear(3, 2)).double()
    x = torch.randn(20, 4, dtype=torch.float64) * 2 + 5
    report = bn.recalibrate(model, x.split([12, 7, 1]), order=order)
    torch.testing.assert_close(model[0].norm.running_mean, x.mean(0))
    torch.testing.assert_close(model[0].norm.running_var, x.var(0))
    assert [layer.count for layer in report.layers.values()] == [20, 19 if order == "joint" else 20]
    if order == "sequential":
        inside = torch.tanh(model.eval()[0](x))
        torch.testing.assert_close(model[2].norm.running_var, inside.var(0))


def test_masks_and_weights_count_as_they_do_in_training() -> None:
    model = nn.ModuleDict({"norm": bn.BatchNorm1d(2, momentum=1.0)}).double()
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) > 0.3
    trained = copy.deepcopy(model)
    trained["norm"](x, mask=mask)
    for order in ORDERS:
        report = bn.recalibrate(model, [(x, mask)], forward=lambda m, b: m["norm"](b[0], mask=b[1]), order=order)
        torch.testing.assert_close(model["norm"].running_mean, trained["norm"].running_mean)
        torch.testing.assert_close(model["norm"].running_var, trained["norm"].running_var)
        assert report.layers["norm"].count == int(mask.sum())


@pytest.mark.parametrize("order", ORDERS)
def test_a_backend_that_was_named_runs_measured_layers_and_others(order: Any) -> None:
    """It refuses to run under a mode of torch's, and there is one while a model is observed."""
    model = nn.Sequential(bn.BatchNorm1d(2), bn.BatchNorm1d(2, track_running_stats=False), bn.BatchNorm1d(2))
    with bn.use_backend("eager"):
        report = bn.recalibrate(model, [torch.randn(8, 2) for _ in range(2)], order=order)
    assert [layer.count for layer in report.layers.values()] == [16, 16]


def test_a_residual_is_added_but_not_measured() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = bn.BatchNorm1d(2, activation="relu"), bn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x, residual=10 * x))
            return result

    model = Block().double()
    x = torch.randn(30, 2, dtype=torch.float64)
    bn.recalibrate(model, x.split(7), order="sequential")
    torch.testing.assert_close(model.first.running_var, x.var(0))
    torch.testing.assert_close(model.second.running_mean, model.eval().first(x, residual=10 * x).mean(0))


def test_a_layer_that_is_held_in_two_places_stays_one() -> None:
    shared = bn.BatchNorm1d(2)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    report = bn.recalibrate(model, [torch.randn(8, 2, dtype=torch.float64)])
    assert model[0] is model[2] is shared
    assert {name: layer.uses for name, layer in report.layers.items()} == {"0": 2}


def test_hooks_of_the_users_run_and_what_they_hand_on_is_measured() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    model[0].register_forward_pre_hook(lambda m, args: (args[0] + 7,))
    x = torch.randn(8, 2, dtype=torch.float64)
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model[0].running_mean, x.mean(0) + 7)


def test_a_forward_that_an_instance_has_of_its_own_is_run_and_kept() -> None:
    """As accelerate and others put it there."""
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    inner = model[0].forward
    own = lambda x: inner(x + 7)  # noqa: E731
    model[0].forward = own
    x = torch.randn(8, 2, dtype=torch.float64)
    bn.recalibrate(model, [x])
    assert vars(model[0])["forward"] is own
    torch.testing.assert_close(model[0].running_mean, x.mean(0) + 7)


class Eager(nn.Module):
    """Does more than set flags when it changes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merged = nn.BatchNorm1d(2), 0

    def train(self, mode: bool = True) -> Eager:
        self.merged += 1
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result


def test_modes_are_set_without_a_call_of_train_or_eval() -> None:
    model = Eager()
    bn.recalibrate(model, [torch.randn(8, 2)])
    assert model.merged == 0
    assert model.training


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_is_measured(order: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), bn.BatchNorm1d(3)).double()
    plain = copy.deepcopy(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():
        compiled.eval()(x)
    before = len(graphs)
    assert before > 0
    bn.recalibrate(compiled, x.split(6), order=order)
    assert len(graphs) == before  # nothing of the observation is compiled into the user's graphs
    bn.recalibrate(plain, x.split(6), order=order)
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in model.state_dict().items())
    # What was compiled before goes on afterwards, with the new statistics.
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain.eval()(x))


def test_a_subclass_of_ours_that_changes_its_input_is_refused() -> None:
    class Transposing(bn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(Transposing(3))
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, [torch.randn(8, 5, 3)])
    assert str(caught.value) == (
        "recalibrate: expected an input of 0 with its 3 channels in dimension 1, got shape (8, 5, 3). "
        "Its class changes the input before it normalizes: let it hold a layer instead of being one."
    )
    assert everything(model) == before


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_the_layers_own_error_comes_through_and_nothing_is_changed(kind: Any) -> None:
    model = nn.Sequential(kind(3))
    before = everything(model)
    with pytest.raises(ValueError) as caught:
        bn.recalibrate(model, [torch.randn(8, 3)])
    assert str(caught.value) == "expected 4D input (got 2D input)"
    assert everything(model) == before


def test_statistics_that_are_used_in_arithmetic_alone_are_reported_as_not_reached() -> None:
    class Arithmetic(Holder):
        def reach(self, x: Tensor) -> Tensor:
            return (x - self.norm.running_mean) / self.norm.running_var.sqrt()

    report = bn.recalibrate(Arithmetic(), [torch.randn(8, 3)])
    assert report.layers["norm"].count == 0
    assert report.layers["after"].count == 8


def test_nothing_is_left_on_torchs_stacks_and_other_threads_see_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    other = nn.BatchNorm1d(2)
    seen = []

    def elsewhere() -> None:
        seen.append(torch._C._len_torch_function_stack())
        other(torch.randn(8, 2))

    def hook(*_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    handle = model.register_forward_hook(hook)
    bn.recalibrate(model, [torch.randn(8, 2)])
    handle.remove()
    assert seen == [0]
    assert int(other.num_batches_tracked) == 1
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


def test_sync_batch_norm_in_a_process_group_on_the_cpu(tmp_path: Any) -> None:
    """Its training forward refuses CPU tensors there; nothing here needs it."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        x = torch.randn(20, 3, dtype=torch.float64)
        for order in ORDERS:
            model = nn.Sequential(nn.SyncBatchNorm(3), nn.Tanh(), nn.SyncBatchNorm(3)).double()
            with pytest.raises(ValueError):
                model(x)
            bn.recalibrate(model, x.split([12, 8]), order=order)
            torch.testing.assert_close(model[0].running_var, x.var(0))
    finally:
        torch.distributed.destroy_process_group()
