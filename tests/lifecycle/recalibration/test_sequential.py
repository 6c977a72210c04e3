"""order="sequential": each layer on what layers before it give in eval mode, by the reference on all data at once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import ArgumentError, NonFiniteError
from batchnorm.lifecycle.recalibration.passes import groups
from batchnorm.reference import Population, mini_batch_statistics
from model_state import everything
from tolerances import assert_close, to_float64

KINDS: dict[str, tuple[Any, Any]] = {
    "ours": (bn.BatchNorm1d, bn.BatchNorm2d),
    "torch's": (nn.BatchNorm1d, nn.BatchNorm2d),
    "SyncBatchNorm": (nn.SyncBatchNorm, nn.SyncBatchNorm),
}


class Net(nn.Module):
    """A stem, two branches of unequal depth that meet, and a head: four groups of five layers."""

    def __init__(self, kind: str = "ours") -> None:
        super().__init__()
        flat, maps = KINDS[kind]
        self.stem, self.n0 = nn.Conv2d(2, 4, 3, padding=1), maps(4)
        self.long1, self.n1 = nn.Conv2d(4, 4, 3, padding=1), maps(4)
        self.long2, self.n2 = nn.Conv2d(4, 4, 3, padding=1), maps(4)
        self.short, self.n3 = nn.Conv2d(4, 4, 1), maps(4)
        self.head, self.n4 = nn.Linear(4, 3), flat(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n0(self.stem(x)))
        y = self.n2(self.long2(torch.relu(self.n1(self.long1(x)))))
        x = F.relu(y + self.n3(self.short(x)), inplace=True)
        result: Tensor = self.n4(self.head(self.drop(x.mean((2, 3)))))
        return result


def randomized(model: nn.Module) -> nn.Module:
    """In float64, with parameters that matter and statistics that are wrong."""
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
                module.running_mean.normal_(5, 3)
                module.running_var.uniform_(0.1, 30)
    return model


def layer_by_layer(model: Net, x: Tensor) -> dict[str, Population]:
    """The reference: all data at once, one layer after the other, each normalizing by its own population."""
    found: dict[str, Population] = {}

    def norm(name: str, z: Tensor) -> Tensor:
        whole = mini_batch_statistics(to_float64(z))
        found[name] = Population(whole.mean, reference.unbiased_variance(whole))
        layer = getattr(model, name)
        y = reference.batch_norm_forward(
            to_float64(z), to_float64(layer.weight), to_float64(layer.bias), layer.eps, population=found[name]
        ).y
        return torch.from_numpy(y)

    with torch.no_grad():
        x = torch.relu(norm("n0", model.stem(x)))
        y = norm("n2", model.long2(torch.relu(norm("n1", model.long1(x)))))
        x = torch.relu(y + norm("n3", model.short(x)))
        norm("n4", model.head(x.mean((2, 3))))
    return found


def assert_exact(model: nn.Module, expected: dict[str, Population]) -> None:
    for name, population in expected.items():
        layer = model.get_submodule(name)
        scale = np.sqrt(population.var)
        assert_close(layer.running_mean, population.mean, dtype="float64", quantity="running_mean", scale=scale)
        assert_close(layer.running_var, population.var, dtype="float64", quantity="running_var")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_network_run_layer_by_layer_on_all_data_at_once(kind: str) -> None:
    """Batches of any sizes, the last of one, which the flat layer at the end could not normalize by itself."""
    model = randomized(Net(kind))
    x = torch.randn(24, 2, 5, 5, dtype=torch.float64)
    expected = layer_by_layer(model, x)
    report = bn.recalibrate(model, x.split([7, 11, 5, 1]), order="sequential", gap_batches=4)
    assert_exact(model, expected)
    assert (report.order, report.batches, report.passes) == ("sequential", 4, 4)
    assert {name: layer.count for name, layer in report.layers.items()} == {
        "n0": 600, "n1": 600, "n2": 600, "n3": 600, "n4": 24,
    }  # fmt: skip
    assert all(layer.uses == 4 for layer in report.layers.values())
    assert report.notes == ("train/eval gaps were measured on 3 batches",)


def test_on_all_data_no_gap_is_left_in_any_layer() -> None:
    """What makes sequential order worth its passes: in eval mode every layer sees what it was measured on."""
    batches = list(torch.randn(240, 2, 5, 5, dtype=torch.float64).split(8))
    gaps = {}
    for order in ("joint", "sequential"):
        torch.manual_seed(0)
        report = bn.recalibrate(randomized(Net()), batches, order=order, gap_batches=len(batches))  # type: ignore[arg-type]
        gaps[order] = report.layers["n4"]
        assert report.gap_before is not None and report.gap_after is not None
        assert report.gap_after < report.gap_before
    assert gaps["sequential"].gap_before == gaps["joint"].gap_before
    assert gaps["joint"].gap_before > 0.5
    assert 0.02 < gaps["joint"].gap_after < 0.5
    assert gaps["sequential"].gap_after < 1e-12


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 1000))
def test_any_cut_of_the_data_gives_the_same(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = randomized(Net("torch's"))
    x = torch.randn(sum(sizes), 2, 3, 3, dtype=torch.float64)
    if len(x) < 2:
        return
    expected = layer_by_layer(model, x)
    bn.recalibrate(model, x.split(sizes), order="sequential")
    assert_exact(model, expected)


def test_in_float32_it_is_the_reference_within_rounding() -> None:
    model = randomized(Net())
    x = torch.randn(24, 2, 5, 5, dtype=torch.float64)
    expected = layer_by_layer(model, x)
    bn.recalibrate(model.float(), x.float().split(5), order="sequential")
    for name, population in expected.items():
        layer = getattr(model, name)
        np.testing.assert_allclose(layer.running_var.numpy(), population.var, rtol=1e-5)


def counting(model: nn.Module) -> dict[str, int]:
    """How often each module with a name was run."""
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(count(name))
    return calls


def test_a_forward_ends_when_the_group_is_reached() -> None:
    model = randomized(Net())
    calls = counting(model)
    batches = list(torch.randn(12, 2, 5, 5, dtype=torch.float64).split(4))
    bn.recalibrate(model, batches, order="sequential")
    # In the order of use: n0, n1, n2, n3, n4. Pass 1 is whole, the others reach up to n3 (with n1), n2 and n4.
    # Whoever is on the way when a forward ends has not come to its end: n4 and the network in the last pass.
    assert calls[""] == 3
    assert calls["stem"] == calls["long1"] == calls["n0"] == 3 * 4
    assert calls["long2"] == 3 * 4
    assert calls["short"] == 3 * 3
    assert calls["head"] == 3 * 2
    assert calls["n4"] == 3


class Reading(Net):
    """Python looks at values, and might go another way."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 1e9:
            raise AssertionError
        return super().forward(x)


class Turning(Net):
    """Larger batches use their branches in another order."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            return super().forward(x)
        x = torch.relu(self.n0(self.stem(x)))
        s = self.n3(self.short(x))
        x = torch.relu(self.n2(self.long2(torch.relu(self.n1(self.long1(x))))) + s)
        result: Tensor = self.n4(self.head(x.mean((2, 3))))
        return result


@pytest.mark.parametrize("kind", [Reading, Turning])
def test_where_the_order_may_change_every_forward_goes_to_its_end(kind: type[Net]) -> None:
    model = randomized(kind())
    calls = counting(model)
    x = torch.randn(12, 2, 5, 5, dtype=torch.float64)
    expected = layer_by_layer(model, x)
    report = bn.recalibrate(model, x.split([4, 8]), order="sequential")
    assert calls[""] == 2 * report.passes == 8
    assert_exact(model, expected)


class Routed(nn.Module):
    """Which layer a batch goes through hangs on the batch, and what comes before one hangs on it too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if len(x) % 2 else self.b(x)
        if len(x) > 6:
            y = self.a(y)
        result: Tensor = self.last(torch.tanh(y))
        return result


def test_dependence_is_proved_on_every_batch_not_only_on_the_first() -> None:
    """a and b look parallel until the batch of 8, where a comes after b; then b must be done before a."""
    torch.manual_seed(3)
    model = randomized(Routed())
    batches = [torch.randn(n, 2, dtype=torch.float64) + n for n in (5, 6, 8, 3)]
    report = bn.recalibrate(model, batches, order="sequential")
    found: dict[str, Population] = {}

    def population(*inputs: reference.Array) -> Population:
        whole = mini_batch_statistics(np.concatenate(inputs))
        return Population(whole.mean, reference.unbiased_variance(whole))

    def through(name: str, z: reference.Array) -> reference.Array:
        layer = getattr(model, name)
        affine = to_float64(layer.weight), to_float64(layer.bias)
        return reference.batch_norm_forward(z, *affine, layer.eps, population=found[name]).y

    five, six, eight, three = map(to_float64, batches)
    found["b"] = population(six, eight)
    found["a"] = population(five, through("b", eight), three)
    paths = [through("a", five), through("b", six), through("a", through("b", eight)), through("a", three)]
    found["last"] = population(*map(np.tanh, paths))
    assert_exact(model, found)
    assert report.passes == 3


class Recurrent(nn.Module):
    """One layer used again on what it gave, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.again, self.after = nn.Linear(3, 3), bn.BatchNorm1d(3), bn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.again(torch.tanh(self.mix(x)))
        result: Tensor = self.after(x)
        return result


def test_a_layer_used_on_what_it_gave_is_measured_as_in_joint_order() -> None:
    model = randomized(Recurrent())
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in (8, 6, 1)]
    joint = copy.deepcopy(model)
    bn.recalibrate(joint, batches)
    report = bn.recalibrate(model, batches, order="sequential")
    assert torch.equal(model.again.running_mean, joint.again.running_mean)
    assert torch.equal(model.again.running_var, joint.again.running_var)
    assert report.layers["again"].count == 3 * 14 + 1
    with torch.no_grad():
        z = torch.cat(batches)
        for _ in range(3):
            z = F.batch_norm(
                torch.tanh(model.mix(z)), model.again.running_mean, model.again.running_var, model.again.weight,
                model.again.bias,
            )  # fmt: skip
    whole = mini_batch_statistics(to_float64(z))
    assert_exact(model, {"after": Population(whole.mean, reference.unbiased_variance(whole))})
    assert report.notes == (
        "again uses what it gave before: measured normalizing by the batch, as in joint order",
        "batch 3, of one value a channel, cannot be normalized by itself: counted at again, "
        "unseen by the layers after it",
    )


class Beside(Recurrent):
    """Another layer that comes later in the forward, and does not depend on the one that is used again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.again(x))
        return y + self.after(x)


def test_where_such_a_layer_cannot_go_on_the_layers_beside_it_do() -> None:
    model = randomized(Beside())
    x = torch.randn(15, 3, dtype=torch.float64)
    report = bn.recalibrate(model, x.split([8, 6, 1]), order="sequential")
    assert {name: layer.count for name, layer in report.layers.items()} == {"again": 29, "after": 15}
    whole = mini_batch_statistics(to_float64(x))
    assert_exact(model, {"after": Population(whole.mean, reference.unbiased_variance(whole))})


def test_the_papers_estimator_works_in_sequential_order_too() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)))
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in (8, 8, 1)]
    report = bn.recalibrate(model, batches, order="sequential", estimator="paper")
    with torch.no_grad():
        for layer, upto in ((model[1], 1), (model[3], 3)):
            inputs = [mini_batch_statistics(to_float64(model.eval()[:upto](b))) for b in batches[:2]]
            expected = reference.population_statistics(inputs, "paper")
            np.testing.assert_allclose(layer.running_mean.numpy(), expected.mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(layer.running_var.numpy(), expected.var, rtol=1e-12)
    assert report.notes == tuple(
        f'1 use of a single sample left out at {name}: estimator="paper" combines mini-batches of one size'
        for name in ("1", "3")
    )


@pytest.mark.parametrize(
    ("once", "name"),
    [
        (lambda: iter([torch.randn(8, 2)]), "list_iterator"),
        (lambda: (torch.randn(8, 2) for _ in range(2)), "generator"),
        (lambda: itertools.chain([torch.randn(8, 2)]), "chain"),
    ],
)
def test_batches_that_can_be_gone_through_once_are_refused_untouched(once: Any, name: str) -> None:
    model, batches = nn.Sequential(bn.BatchNorm1d(2)), once()
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, batches, order="sequential")
    assert str(caught.value) == (
        'recalibrate: expected batches that can be gone through again for order="sequential", '
        f'got a {name}. Give a list or a DataLoader, or use order="joint".'
    )
    assert next(batches).shape == (8, 2)


class Spent:
    """Looks as if it could be gone through again."""

    def __init__(self) -> None:
        self._once = iter([torch.randn(8, 3)] * 2)

    def __iter__(self) -> Any:
        yield from self._once


def test_batches_that_run_out_between_passes_are_an_error_and_nothing_is_changed() -> None:
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, Spent(), order="sequential")
    assert str(caught.value) == (
        "recalibrate: expected at least one batch, got an empty iterable in pass 2. "
        "A generator that was already used up gives none."
    )
    assert everything(model) == before


def test_a_loader_that_shuffles_gives_the_same_statistics_and_max_batches_holds_for_each_pass() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(25, 2, 5, 5, dtype=torch.float64))
    model = randomized(Net())
    expected = layer_by_layer(model, data.tensors[0])
    bn.recalibrate(model, torch.utils.data.DataLoader(data, 8, shuffle=True), order="sequential")
    assert_exact(model, expected)
    expected = layer_by_layer(model, data.tensors[0][:16])
    report = bn.recalibrate(model, torch.utils.data.DataLoader(data, 8), order="sequential", max_batches=2)
    assert_exact(model, expected)
    assert report.batches == 2


def test_a_value_that_is_not_finite_is_named_by_the_layer_that_first_gets_it() -> None:
    model = nn.Sequential(bn.BatchNorm1d(2), nn.Identity(), bn.BatchNorm1d(2))
    model[1].register_forward_hook(lambda m, args, y: y.log() if len(y) == 5 else y)
    before = everything(model)
    with pytest.raises(NonFiniteError) as caught:
        bn.recalibrate(model, [torch.randn(8, 2), torch.randn(5, 2) - 1], order="sequential")
    assert str(caught.value).startswith("recalibrate: 2 (BatchNorm1d): expected finite values, got Inf or NaN in ")
    assert everything(model) == before


def test_a_branch_that_no_batch_reaches_is_left_as_it_was() -> None:
    model = randomized(Net())
    model.never = bn.BatchNorm1d(2)
    never = copy.deepcopy(model.never.state_dict())
    report = bn.recalibrate(model, [torch.randn(8, 2, 5, 5, dtype=torch.float64)], order="sequential")
    assert report.layers["never"].count == 0
    assert all(torch.equal(t, never[k]) for k, t in model.never.state_dict().items())


def test_groups_come_in_the_order_of_their_dependence() -> None:
    depends = {"a": set(), "b": {"a"}, "c": {"a", "d"}, "d": {"c"}, "e": {"b", "c"}, "f": {"f"}, "g": {"d"}}
    for names in itertools.permutations(depends):
        assert groups(list(names), depends) == [
            {"a": frozenset(), "f": frozenset({"f"})},
            {"b": frozenset(), "c": frozenset({"c", "d"}), "d": frozenset({"c", "d"})},
            {"e": frozenset(), "g": frozenset()},
        ]
