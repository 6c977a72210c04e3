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
from tolerances import assert_close, to_float64

often = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that recalibration may have touched: state to the last bit, modes, flags, hooks."""
    return {
        "state": {
            k: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in model.state_dict().items()
        },
        "modes": [m.training for m in model.modules()],
        "flags": [(getattr(m, "track_running_stats", None), getattr(m, "momentum", None)) for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "gradients": [p.requires_grad for p in model.parameters()],
    }


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
def test_a_batch_of_one_value_is_an_error_and_nothing_is_changed(too_few: Any) -> None:
    model = single()
    for layer in model.modules():
        if isinstance(layer, bn.BatchNorm):
            layer.too_few = too_few
    before = everything(model)
    with pytest.raises(ValueError) as caught:
        bn.recalibrate(model, [torch.randn(8, 2, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)])
    size = "torch.Size([1, 2])"
    assert str(caught.value) == f"Expected more than 1 value per channel when training, got input size {size}"
    assert everything(model) == before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "label"],
        lambda x: {"x": x},
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_batches_as_loaders_give_them(wrap: Any) -> None:
    model = Deep()
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
        "1 batches, estimator 'pooled'\n"
        "layer         values   mean moved by  variance times\n"
        "norm               3         3.5 std  4 to 16\n"
        "unused             0  not reached by any batch, left as it was"
    )


def test_progress_counts_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    bn.recalibrate(single(), [torch.randn(8, 2, dtype=torch.float64)] * 2, progress=True)
    captured = capsys.readouterr()
    assert captured.err == "\rrecalibrate: 1 batches\rrecalibrate: 2 batches\n"
    assert captured.out == ""
