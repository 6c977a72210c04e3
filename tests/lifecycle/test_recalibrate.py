"""Population statistics from data: right by the reference, however the data are cut; all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import ArgumentError, NonFiniteError
from batchnorm.reference import Population, mini_batch_statistics, population_statistics
from model_state import everything
from tolerances import assert_close, to_float64

often = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def single(channels: int = 2, kind: Callable[..., nn.Module] = bn.BatchNorm1d) -> nn.Module:
    """One layer, in float64 so that the comparison is sharp."""
    model = nn.Sequential(kind(channels, dtype=torch.float64))
    model[0](torch.randn(8, channels, dtype=torch.float64) * 3 + 7)
    return model


def assert_population(layer: Any, population: Population, scale: Any = None) -> None:
    scale = np.sqrt(population.var) if scale is None else scale
    assert_close(layer.running_mean, population.mean, dtype="float64", quantity="running_mean", scale=scale)
    assert_close(layer.running_var, population.var, dtype="float64", quantity="running_var")


KINDS = {"ours": bn.BatchNorm1d, "torch's": nn.BatchNorm1d}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["pooled", "paper"])
def test_both_estimators_are_the_references(estimator: Any, kind: str) -> None:
    model = single(3, KINDS[kind])
    batches = [torch.randn(16, 3, dtype=torch.float64) * (i + 1) + i for i in range(5)]
    statistics = [mini_batch_statistics(to_float64(b)) for b in batches]
    before = [t.clone() for t in (model[0].running_mean, model[0].running_var)]
    report = bn.recalibrate(model, batches, estimator=estimator)
    expected = population_statistics(statistics, estimator)
    assert_population(model[0], expected)
    assert int(model[0].num_batches_tracked) == 5
    layer = report.layers["0"]
    assert (report.estimator, report.batches, layer.count, layer.uses) == (estimator, 5, 80, 5)
    assert torch.equal(layer.mean_before, before[0])
    assert torch.equal(layer.var_before, before[1])
    assert torch.equal(layer.mean_after, model[0].running_mean)
    assert torch.equal(layer.var_after, model[0].running_var)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Data, and the same in batches of any sizes from 2 up, in any order."""
    sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(sum(sizes), 2, generator=g, dtype=torch.float64) * 2 + draw(st.sampled_from([0.0, 5.0, -100.0]))
    order = torch.randperm(len(x), generator=g)
    return x, list(x[order].split(sizes))


@often
@given(splits())
def test_pooled_is_the_whole_in_any_split_and_order(case: tuple[Tensor, list[Tensor]]) -> None:
    x, batches = case
    model = single()
    bn.recalibrate(model, batches)
    whole = mini_batch_statistics(to_float64(x))
    assert_population(model[0], Population(whole.mean, reference.unbiased_variance(whole)))


def test_one_batch_gives_its_mean_and_unbiased_variance() -> None:
    model, x = single(), torch.randn(9, 2, dtype=torch.float64)
    bn.recalibrate(model, [x], estimator="paper")
    found = mini_batch_statistics(to_float64(x))
    assert_population(model[0], Population(found.mean, reference.unbiased_variance(found)))


def test_the_paper_wants_batches_of_one_size() -> None:
    model = single()
    before = everything(model)
    batches = [torch.randn(n, 2, dtype=torch.float64) for n in (8, 8, 5)]
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, batches, estimator="paper")
    assert str(caught.value) == (
        'recalibrate: expected mini-batches of one size for 0 under estimator="paper", '
        'got values a channel from 5 to 8. Drop the last batch, or use estimator="pooled".'
    )
    assert everything(model) == before


class Deep(nn.Module):
    """Two layers, one of them used twice, dropout between, and a branch that no batch reaches."""

    def __init__(self, kind: Any = bn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = kind(3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(3, 3)
        self.twice = kind(3)
        self.never = kind(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(torch.relu(self.norm(self.first(x))))
        result: Tensor = self.twice(torch.tanh(self.twice(self.second(y))))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_sees_what_normalized_layers_before_it_give(kind: str) -> None:
    """As in training, by the batch, but without dropout; and a layer that is used twice is shown both uses."""
    model = Deep(KINDS[kind]).double().train()
    batches = [torch.randn(10, 4, dtype=torch.float64) * 2 + 1 for _ in range(4)]
    seen: dict[str, list[reference.Array]] = {"norm": [], "twice": []}
    with torch.no_grad():
        for x in batches:
            z = to_float64(model.first(x))
            seen["norm"].append(z)
            y = torch.relu(torch.from_numpy(reference.batch_norm_forward(z).y))
            z = to_float64(model.second(y))
            seen["twice"].append(z)
            seen["twice"].append(np.tanh(reference.batch_norm_forward(z).y))
    never = copy.deepcopy(model.never.state_dict())
    report = bn.recalibrate(model, batches)
    for name, inputs in seen.items():
        expected = population_statistics([mini_batch_statistics(z) for z in inputs], "pooled")
        assert_population(getattr(model, name), expected)
        assert report.layers[name].count == 10 * len(inputs)
        assert report.layers[name].uses == len(inputs) == int(getattr(model, name).num_batches_tracked)
    assert report.layers["never"].count == 0
    assert all(torch.equal(never[k], t) for k, t in model.never.state_dict().items())
    assert model.calls == 4


def test_modes_and_flags_are_as_they_were_and_gradients_untouched() -> None:
    model = Deep().train()
    model.drop.eval()
    model.twice.eval()
    model.first.weight.requires_grad_(False)
    before = everything(model)
    bn.recalibrate(model, [torch.randn(8, 4) for _ in range(3)])
    after = everything(model)
    assert before["state"] != after["state"]
    assert {k: v for k, v in before.items() if k != "state"} == {k: v for k, v in after.items() if k != "state"}
    changed = {k for k in before["state"] if before["state"][k] != after["state"][k]}
    assert changed == {f"{layer}.{name}" for layer in ("norm", "twice") for name in (
        "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


class Stop(Exception):
    """Raised by the tests only."""


def failing(batches: list[Tensor], error: BaseException) -> Iterator[Tensor]:
    yield from batches
    raise error


@pytest.mark.parametrize("error", [Stop("loader"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["loader", "forward", "hook", "first batch"])
def test_after_an_error_or_ctrl_c_the_model_is_as_it_was(where: str, error: BaseException) -> None:
    model = Deep().train()
    model.drop.eval()
    model(torch.randn(8, 4))
    batches: Iterable[Tensor] = [torch.randn(8, 4) for _ in range(3)]
    forward = None
    if where == "loader":
        batches = failing(list(batches), error)
    elif where == "first batch":
        batches = failing([], error)
    elif where == "forward":

        def forward(model: nn.Module, batch: Tensor) -> None:
            model(batch)
            if model.calls == 3:
                raise error

    else:

        def raising(*_: Any) -> None:
            if model.calls == 3:
                raise error

        model.second.register_forward_hook(raising)
    before = everything(model)
    with pytest.raises(type(error)):
        bn.recalibrate(model, batches, forward=forward)
    assert everything(model) == before


def test_ctrl_c_while_the_results_are_written_undoes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep()
    before = everything(model)
    copies = []

    class Interrupting(Tensor):
        def copy_(self, *args: Any, **kwargs: Any) -> Tensor:
            copies.append(1)
            if len(copies) == 1:
                raise KeyboardInterrupt
            return super().copy_(*args, **kwargs)

    model.twice._buffers["running_var"] = model.twice.running_var.as_subclass(Interrupting)  # type: ignore[arg-type]
    before["objects"] = everything(model)["objects"]
    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(model, [torch.randn(8, 4) for _ in range(2)])
    assert copies
    assert everything(model) == before


@pytest.mark.parametrize("empty", [[], iter(()), (b for b in [])], ids=["list", "iterator", "generator"])
def test_no_batches_are_an_error(empty: Iterable[Tensor]) -> None:
    model = Deep().train()
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, empty)
    assert str(caught.value) == (
        "recalibrate: expected at least one batch, got an empty iterable. "
        "A generator that was already used up gives none."
    )
    assert everything(model) == before


def test_max_batches_takes_no_batch_too_many() -> None:
    model, taken = single(), []

    def batches() -> Iterator[Tensor]:
        for i in range(10):
            taken.append(i)
            yield torch.randn(8, 2, dtype=torch.float64)

    loader = batches()
    report = bn.recalibrate(model, loader, max_batches=3)
    assert report.batches == 3
    assert taken == [0, 1, 2]
    next(loader)
    assert bn.recalibrate(model, loader, max_batches=100).batches == 6


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": (
        {"estimator": "mean"},
        "recalibrate: expected an estimator among ('pooled', 'paper'), got 'mean'. Choose one of them.",
    ),
    "order": (
        {"order": "backwards"},
        "recalibrate: expected an order among ('joint', 'sequential'), got 'backwards'. Choose one of them.",
    ),
    "gap_batches": (
        {"gap_batches": -1},
        "recalibrate: expected gap_batches of 0 or more, got -1. 0 measures no gap.",
    ),
    "max_batches": (
        {"max_batches": 0},
        "recalibrate: expected max_batches of 1 or more, got 0. Leave it away for all.",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_make_no_sense(case: str) -> None:
    options, message = ARGUMENTS[case]
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(single(), [torch.zeros(4, 2)], **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Linear(2, 2), {}),
        (nn.Sequential(bn.BatchNorm1d(2, track_running_stats=False)), {}),
        (nn.Sequential(bn.BatchNorm1d(2)).eval(), {"skip_eval": True}),
    ],
)
def test_a_model_without_statistics_is_an_error(model: nn.Module, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, [torch.zeros(4, 2)], **options)
    assert str(caught.value) == (
        "recalibrate: expected a layer with running statistics, got none. "
        "Layers with track_running_stats=False have nothing to recalibrate."
    )


def test_skip_eval_leaves_frozen_layers_and_what_they_give() -> None:
    model = Deep().double().train()
    model.norm.eval()
    model.norm.running_mean.fill_(0.5)
    frozen = copy.deepcopy(model.norm.state_dict())
    batches = [torch.randn(10, 4, dtype=torch.float64) for _ in range(3)]
    report = bn.recalibrate(model, batches, skip_eval=True)
    assert "norm" not in report.layers
    assert all(torch.equal(frozen[k], t) for k, t in model.norm.state_dict().items())
    fixed = Population(to_float64(model.norm.running_mean), to_float64(model.norm.running_var))
    inputs = []
    with torch.no_grad():
        for x in batches:
            y = torch.from_numpy(reference.batch_norm_forward(to_float64(model.first(x)), population=fixed).y)
            z = to_float64(model.second(torch.relu(y)))
            inputs += [z, np.tanh(reference.batch_norm_forward(z).y)]
    assert_population(model.twice, population_statistics([mini_batch_statistics(z) for z in inputs], "pooled"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_is_named_and_nothing_is_changed(kind: str) -> None:
    model = nn.Sequential(nn.Identity(), KINDS[kind](2))
    before = everything(model)
    batches = [torch.randn(8, 2) for _ in range(3)]
    batches[1][4, 1] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        bn.recalibrate(model, batches)
    assert str(caught.value) == (
        "recalibrate: 1 (BatchNorm1d): expected finite values, got Inf or NaN in channel 1 of batch 2. "
        'Look at the layers before it, lower the learning rate, or drop such batches with nonfinite="skip".'
    )
    assert everything(model) == before


@pytest.mark.parametrize("too_few", ["raise", "running"])
def test_a_last_batch_of_one_value_counts_where_nothing_comes_after(too_few: Any) -> None:
    model = single()
    model[0].too_few = too_few
    batches = [torch.randn(n, 2, dtype=torch.float64) for n in (8, 5, 1)]
    report = bn.recalibrate(model, batches)
    whole = mini_batch_statistics(to_float64(torch.cat(batches)))
    assert_population(model[0], Population(whole.mean, reference.unbiased_variance(whole)))
    assert (report.batches, report.layers["0"].count, report.layers["0"].uses) == (3, 14, 3)
    assert report.notes == (
        "batch 3, of one value a channel, cannot be normalized by itself: counted at 0, unseen by the layers after it",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_in_joint_order_a_batch_of_one_value_is_measured_up_to_where_it_cannot_go_on(kind: str) -> None:
    model = Deep(KINDS[kind]).double()
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (6, 1, 5, 1)]
    expected = copy.deepcopy(model)
    bn.recalibrate(expected, [batches[0], batches[2]])
    report = bn.recalibrate(model, batches)
    inputs = to_float64(model.first(torch.cat(batches)))
    whole = mini_batch_statistics(inputs)
    assert_population(model.norm, Population(whole.mean, reference.unbiased_variance(whole)))
    assert torch.equal(model.twice.running_mean, expected.twice.running_mean)
    assert torch.equal(model.twice.running_var, expected.twice.running_var)
    assert (report.layers["norm"].count, report.layers["twice"].count) == (13, 22)
    assert report.notes == (
        "2 batches of one value a channel (2, 4) cannot be normalized by themselves: counted at norm, "
        "unseen by the layers after it",
    )


def test_the_papers_estimator_leaves_a_single_sample_out() -> None:
    model, same = Deep().double(), Deep().double()
    same.load_state_dict(model.state_dict())
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (6, 6, 1)]
    report = bn.recalibrate(model, batches, estimator="paper")
    bn.recalibrate(same, batches[:2], estimator="paper")
    assert all(torch.equal(t, same.state_dict()[k]) for k, t in model.state_dict().items())
    assert report.layers["norm"].count == 12
    assert report.notes == (
        "batch 3, of one value a channel, cannot be normalized by itself: left out at norm, "
        "unseen by the layers after it",
    )


def test_the_papers_estimator_leaves_out_a_single_sample_of_several_values() -> None:
    model, same = (nn.Sequential(bn.BatchNorm2d(2)) for _ in range(2))
    batches = [torch.randn(n, 2, 3, 3) for n in (4, 4, 1)]
    report = bn.recalibrate(model, batches, estimator="paper")
    bn.recalibrate(same, batches[:2], estimator="paper")
    assert all(torch.equal(t, same.state_dict()[k]) for k, t in model.state_dict().items())
    assert (report.layers["0"].count, report.layers["0"].uses) == (72, 2)
    assert report.notes == (
        '1 use of a single sample left out at 0: estimator="paper" combines mini-batches of one size',
    )


def test_the_papers_estimator_takes_single_samples_that_are_all_there_is() -> None:
    model = nn.Sequential(bn.BatchNorm2d(2, dtype=torch.float64))
    batches = [torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(3)]
    bn.recalibrate(model, batches, estimator="paper")
    statistics = [mini_batch_statistics(to_float64(b)) for b in batches]
    assert_population(model[0], population_statistics(statistics, "paper"))


TOO_FEW: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "all of the data is one value": (
        {},
        [1],
        "recalibrate: expected more than one value a channel for norm, got 1. "
        "Give larger or more batches: a single value has no variance.",
    ),
    "sequential, one value": (
        {"order": "sequential"},
        [1],
        "recalibrate: expected more than one value a channel for norm, got 1. "
        "Give larger or more batches: a single value has no variance.",
    ),
    "the paper's, values one by one": (
        {"estimator": "paper"},
        [1, 1],
        "recalibrate: expected more than one value a channel for norm, got 1. "
        "Give larger or more batches: a single value has no variance.",
    ),
    "joint, values one by one": (
        {},
        [1, 1, 1],
        'recalibrate: expected batches with more than one value a channel under order="joint", '
        "got only batches that cannot be normalized by themselves at norm. "
        'Use larger batches, or order="sequential".',
    ),
}


@pytest.mark.parametrize("case", TOO_FEW)
def test_data_that_give_no_variance_are_an_error_and_nothing_is_changed(case: str) -> None:
    options, sizes, message = TOO_FEW[case]
    model = Deep()
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, [torch.randn(n, 4) for n in sizes], **options)
    assert str(caught.value) == message
    assert everything(model) == before


def test_an_empty_batch_changes_nothing_not_even_the_counter() -> None:
    model, same = single(), single()
    same.load_state_dict(model.state_dict())
    x = torch.randn(8, 2, dtype=torch.float64)
    bn.recalibrate(model, [x, x[:0]])
    bn.recalibrate(same, [x])
    assert all(torch.equal(t, same.state_dict()[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "label"],
        lambda x: {"x": x},
        lambda x: ({"x": x}, "label"),
        lambda x: ((x,), "label"),
        lambda x: [[x], "label"],
    ],
    ids=["tensor", "tuple", "list", "dict", "dict in a tuple", "arguments in a tuple", "list in a list"],
)
def test_batches_as_loaders_give_them(wrap: Any) -> None:
    model = Deep()
    # A list inside is the model's own business: a detector takes a list of images.
    model.register_forward_pre_hook(lambda m, args: args[0][0] if args and isinstance(args[0], list) else None)
    assert bn.recalibrate(model, [wrap(torch.randn(8, 4))]).layers["norm"].count == 8


def test_forward_says_how_a_batch_is_run() -> None:
    model = Deep()
    report = bn.recalibrate(model, ["ab", "cde"], forward=lambda m, text: m(torch.randn(len(text), 4)))
    assert report.layers["norm"].count == 5


def test_counters_of_torchs_layers_and_float32_buffers() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), bn.BatchNorm2d(2)).to(torch.bfloat16)
    bn.recalibrate(model, [torch.randn(4, 2, 3, 3).bfloat16() for _ in range(2)])
    assert model[0].running_mean.dtype == torch.bfloat16  # torch's own were cast with the model
    assert model[1].running_mean.dtype == torch.float32
    assert [int(layer.num_batches_tracked) for layer in model] == [2, 2]


def test_half_of_the_data_is_not_the_other_half() -> None:
    """The variance between batches counts: "pooled" sees it, "paper" does not."""
    batches = [torch.randn(64, 1, dtype=torch.float64) + mean for mean in (-10.0, 10.0)]
    found = {}
    for estimator in ("pooled", "paper"):
        model = single(1)
        bn.recalibrate(model, batches, estimator=estimator)  # type: ignore[arg-type]
        found[estimator] = float(model[0].running_var)
    assert 95 < found["pooled"] < 110
    assert 0.5 < found["paper"] < 1.5


def test_the_report_is_a_table() -> None:
    model = nn.ModuleDict({"norm": bn.BatchNorm1d(2), "unused": bn.BatchNorm1d(2)})
    x = torch.tensor([[1.0, 10.0], [3.0, 14.0], [5.0, 18.0]])
    report = bn.recalibrate(model, [x], forward=lambda m, batch: m["norm"](batch))
    assert report.layers["norm"].mean_shift == 14.0 / 4.0
    assert report.layers["norm"].variance_ratio == (4.0, 16.0)
    assert str(report) == (
        "recalibrated 1 of 2 layers on 1 batch in 1 pass, order 'joint', estimator 'pooled'\n"
        "layer         values   mean moved by  variance times\n"
        "norm               3         3.5 std  4 to 16\n"
        "unused             0  not reached by any batch, left as it was"
    )


class Frozen(nn.Module):
    """As torchvision, timm and detectron2 define it: all four are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 1.0), ("running_mean", 3.0), ("running_var", 4.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt() * self.weight + self.bias


@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_frozen_layers_are_left_alone_and_reported(order: Any) -> None:
    model = nn.Sequential(Frozen(2), bn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(16, 2)
    report = bn.recalibrate(model, [x], skip_eval=True, order=order)
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    assert report.left_alone == {
        "0": "Frozen, whose parameters are buffers: frozen",
        "3": "in eval mode (skip_eval=True)",
    }
    assert str(report).splitlines()[-2:] == [
        "0                    left alone: Frozen, whose parameters are buffers: frozen",
        "3                    left alone: in eval mode (skip_eval=True)",
    ]


def test_a_layer_that_does_not_know_its_channels_yet_is_refused() -> None:
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(8, 2)])
    assert str(caught.value) == (
        "recalibrate: expected layers that know their channels, got 0 (LazyBatchNorm1d), which has seen no input. "
        "Run the model once on a batch."
    )


def test_a_constant_channel_shows_in_the_report_without_nan() -> None:
    model = nn.Sequential(bn.BatchNorm1d(2))
    model[0].running_var[1] = 0
    layer = bn.recalibrate(model, [torch.tensor([[1.0, 2.0], [3.0, 2.0]])]).layers["0"]
    assert layer.mean_shift == float("inf")
    assert layer.variance_ratio == (1.0, 2.0)
