"""What the layers refuse, in torch's words where torch has words, and that nothing is changed then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, BatchNormError, DtypeError, MismatchError, NonFiniteError
from tolerances import assert_close, to_float64

LAYERS = {
    "1d": (bn.BatchNorm1d, nn.BatchNorm1d),
    "2d": (bn.BatchNorm2d, nn.BatchNorm2d),
    "3d": (bn.BatchNorm3d, nn.BatchNorm3d),
}


def bits(layer: nn.Module) -> dict[str, bytes]:
    """The state to the last bit, NaN included."""
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in layer.state_dict().items()}


@contextmanager
def unchanged(layer: nn.Module) -> Iterator[None]:
    before, modes = bits(layer), [m.training for m in layer.modules()]
    yield
    assert bits(layer) == before
    assert [m.training for m in layer.modules()] == modes


def used(layer: Any, shape: tuple[int, ...] = (8, 3, 4, 4)) -> Any:
    """The layer after a batch, so that its state is not what it began with."""
    layer(torch.randn(shape[: {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 4}.get(type(layer).__name__, 4)]) + 1)
    return layer


INPUTS: dict[str, tuple[str, dict[str, Any], bool, Tensor]] = {
    "a vector": ("1d", {}, True, torch.zeros(3)),
    "four dimensions of 1d": ("1d", {}, True, torch.zeros(2, 3, 4, 4)),
    "two dimensions of 2d": ("2d", {}, True, torch.zeros(2, 3)),
    "three dimensions of 2d": ("2d", {}, False, torch.zeros(2, 3, 4)),
    "five dimensions of 2d": ("2d", {}, False, torch.zeros(2, 3, 4, 4, 4)),
    "four dimensions of 3d": ("3d", {}, True, torch.zeros(2, 3, 4, 4)),
    "other channels in training": ("2d", {}, True, torch.zeros(2, 5, 4, 4)),
    "other channels in eval": ("2d", {}, False, torch.zeros(2, 5, 4, 4)),
    "other channels, untracked": ("2d", {"track_running_stats": False}, True, torch.zeros(2, 5, 4, 4)),
    "one value a channel": ("1d", {}, True, torch.zeros(1, 3)),
    "one value a channel in a map": ("2d", {}, True, torch.zeros(1, 3, 1, 1)),
    "one value a channel, untracked": ("1d", {"track_running_stats": False}, False, torch.zeros(1, 3)),
    "one value a channel, bare": ("1d", {"track_running_stats": False, "affine": False}, True, torch.zeros(1, 3)),
    "eps of zero": ("1d", {"eps": 0.0}, True, torch.zeros(4, 3)),
    "eps below zero": ("1d", {"eps": -0.5}, True, torch.zeros(4, 3)),
    "one value and other channels": ("1d", {}, True, torch.zeros(1, 5)),
    "eps of zero and other channels": ("1d", {"eps": 0.0}, True, torch.zeros(4, 5)),
    "eps of zero and one value": ("1d", {"eps": 0.0}, True, torch.zeros(1, 3)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_in_the_words_of_torch(case: str) -> None:
    kind, options, training, x = INPUTS[case]
    messages, kinds = [], []
    for by in LAYERS[kind]:
        layer = by(3, **options).train(training)
        # torch's own raises its counter before it looks.
        with unchanged(layer) if by is LAYERS[kind][0] else nullcontext(), pytest.raises(Exception) as caught:
            layer(x)
        messages.append(str(caught.value))
        kinds.append(caught.type)
    assert messages[0] == messages[1]
    assert issubclass(kinds[0], kinds[1])
    assert issubclass(kinds[0], BatchNormError)


def test_the_words_that_libraries_look_for() -> None:
    with pytest.raises(ValueError) as caught:
        bn.BatchNorm1d(3)(torch.zeros(1, 3))
    assert (
        str(caught.value) == "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])"
    )
    with pytest.raises(ValueError) as caught:
        bn.BatchNorm2d(3)(torch.zeros(2, 3))
    assert str(caught.value) == "expected 4D input (got 2D input)"
    with pytest.raises(RuntimeError) as caught:
        bn.BatchNorm2d(3)(torch.zeros(2, 5, 2, 2))
    assert str(caught.value) == "running_mean should contain 5 elements not 3"
    with pytest.raises(ValueError) as caught:
        bn.BatchNorm(3)(torch.zeros(3))
    assert str(caught.value) == "expected 2D or higher input (got 1D input)"


def test_eval_takes_one_value_a_channel() -> None:
    layer = used(bn.BatchNorm1d(3)).eval()
    with unchanged(layer):
        assert layer(torch.zeros(1, 3)).isfinite().all()


OURS: dict[str, tuple[dict[str, Any], Tensor, dict[str, Any], type[Exception], str]] = {
    "float64 beside float32": (
        {},
        torch.zeros(4, 3, dtype=torch.float64),
        {},
        DtypeError,
        "BatchNorm1d: expected running_mean of a dtype that goes with an input of torch.float64, got torch.float32. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "float32 beside float64": (
        {"dtype": torch.float64},
        torch.zeros(4, 3),
        {},
        DtypeError,
        "BatchNorm1d: expected weight of a dtype that goes with an input of torch.float32, got torch.float64. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "float64 beside float32 parameters": (
        {"track_running_stats": False},
        torch.zeros(4, 3, dtype=torch.float64),
        {},
        DtypeError,
        "BatchNorm1d: expected weight of a dtype that goes with an input of torch.float64, got torch.float32. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "float32 beside bfloat16": (
        {"dtype": torch.bfloat16},
        torch.zeros(4, 3),
        {},
        DtypeError,
        "BatchNorm1d: expected weight of a dtype that goes with an input of torch.float32, got torch.bfloat16. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "integers": (
        {},
        torch.zeros(4, 3, dtype=torch.int64),
        {},
        DtypeError,
        "BatchNorm1d: expected an input of dtype float32, float64, bfloat16, float16, got torch.int64. "
        "Convert it first, e.g. input.float(); complex values can be normalized as two real channels.",
    ),
    "complex": (
        {},
        torch.zeros(4, 3, dtype=torch.complex64),
        {},
        DtypeError,
        "BatchNorm1d: expected an input of dtype float32, float64, bfloat16, float16, got torch.complex64. "
        "Convert it first, e.g. input.float(); complex values can be normalized as two real channels.",
    ),
    "another device": (
        {},
        torch.zeros(4, 3, device="meta"),
        {},
        MismatchError,
        "BatchNorm1d: expected running_mean on meta, where the input is, got cpu. "
        "Move one of them, e.g. module.to('meta').",
    ),
    "a residual that does not broadcast": (
        {},
        torch.zeros(4, 3),
        {"residual": torch.zeros(4, 2)},
        MismatchError,
        "BatchNorm1d: expected a residual that broadcasts to (4, 3), got shape (4, 2). "
        "Reshape or project the residual.",
    ),
    "a residual of another dtype": (
        {},
        torch.zeros(4, 3),
        {"residual": torch.zeros(4, 3, dtype=torch.float64)},
        DtypeError,
        "BatchNorm1d: expected a residual of torch.float32 on cpu, got torch.float64 on cpu. "
        "Convert it with residual.to(input).",
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", OURS)
def test_in_our_own_words(case: str, training: bool) -> None:
    options, x, more, kind, message = OURS[case]
    layer = bn.BatchNorm1d(3, **options).train(training)
    with unchanged(layer), pytest.raises(kind) as caught:
        layer(x, **more)
    assert str(caught.value) == message
    assert isinstance(caught.value, (ValueError, RuntimeError))


CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "too_few": (
        {"too_few": "skip"},
        "BatchNorm2d: expected too_few to be one of ('raise', 'running'), got 'skip'. Choose one of them.",
    ),
    "nonfinite": (
        {"nonfinite": "ignore"},
        "BatchNorm2d: expected nonfinite to be one of ('propagate', 'raise', 'skip'), got 'ignore'. "
        "Choose one of them.",
    ),
    "activation": (
        {"activation": "swish"},
        "activation: expected one of (None, 'relu', 'leaky_relu', 'silu', 'gelu', 'sigmoid', 'tanh'), got 'swish'. "
        "Apply any other function to the result.",
    ),
    "nothing tracked": (
        {"too_few": "running", "track_running_stats": False},
        'BatchNorm2d: expected running statistics for too_few="running", got none tracked. '
        'Track them, or leave too_few="raise".',
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_a_layer_that_cannot_be_built(case: str) -> None:
    options, message = CONSTRUCTION[case]
    with pytest.raises(ArgumentError) as caught:
        bn.BatchNorm2d(3, **options)
    assert str(caught.value) == message


def test_extras_of_the_layer_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        bn.BatchNorm2d(3, 1e-5, 0.1, True, True, None, None, True)  # type: ignore[misc]


# Too few values


def test_too_few_running_normalizes_one_value_as_in_eval_mode_and_counts_it_nowhere() -> None:
    layer = used(bn.BatchNorm2d(3, too_few="running", dtype=torch.float32))
    nn.init.normal_(layer.weight)
    x, dy = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 3, 1, 1)
    with unchanged(layer):
        y = layer(x)
    assert torch.equal(y, copy.deepcopy(layer).eval()(x))
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = dy.double() * (layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()).view(1, 3, 1, 1)
    assert_close(dx, to_float64(expected), dtype="float32", quantity="dx")
    assert layer.training
    two = torch.randn(1, 3, 1, 2)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict())
    assert_close(layer(two), to_float64(plain(two)), dtype="float32", quantity="y", scale=10)
    assert int(layer.num_batches_tracked) == 2


# What is not finite


def stack(nonfinite: str) -> nn.Module:
    model = nn.Module()
    model.layer1 = nn.Sequential(nn.Module())
    model.layer1[0].bn2 = bn.BatchNorm1d(3, nonfinite=nonfinite)
    return model


@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), float("nan")])
def test_skip_leaves_statistics_and_counter_as_they_were(poison: float) -> None:
    layer, twin = bn.BatchNorm1d(3, nonfinite="skip"), nn.BatchNorm1d(3)
    good = [torch.randn(8, 3) for _ in range(3)]
    bad = torch.randn(8, 3)
    bad[2, 1] = poison
    for batch in good[:2]:
        layer(batch)
        twin(batch)
    with unchanged(layer):
        y = layer(bad)
    assert y[:, 1].isnan().all()
    assert_close(y[:, [0, 2]], to_float64(twin(bad)[:, [0, 2]]), dtype="float32", quantity="y")
    twin = nn.BatchNorm1d(3)
    for batch in good[:2]:
        twin(batch)
    assert_close(layer(good[2]), to_float64(twin(good[2])), dtype="float32", quantity="y")
    for name, t in twin.state_dict().items():
        assert_close(layer.state_dict()[name].float(), to_float64(t), dtype="float32", quantity="y", what=name)
    assert int(layer.num_batches_tracked) == 3


def test_skip_looks_at_what_the_statistics_would_become() -> None:
    """Values of 1e30 are finite, but their variance is not in float32."""
    layer = used(bn.BatchNorm1d(3, nonfinite="skip"))
    with unchanged(layer):
        assert layer(torch.randn(8, 3) * 1e30).isfinite().all()


def test_skip_counts_no_skipped_batch_in_a_cumulative_average() -> None:
    layer, twin = bn.BatchNorm1d(3, momentum=None, nonfinite="skip"), nn.BatchNorm1d(3, momentum=None)
    for i in range(4):
        batch = torch.randn(8, 3)
        if i == 1:
            layer(batch / 0.0)
            continue
        layer(batch)
        twin(batch)
    for name, t in twin.state_dict().items():
        assert_close(layer.state_dict()[name].float(), to_float64(t), dtype="float32", quantity="y", what=name)


def test_raise_names_layer_channel_and_batch() -> None:
    model = stack("raise")
    layer = model.layer1[0].bn2
    layer(torch.randn(8, 3))
    bad = torch.randn(8, 3)
    bad[5, 2] = float("inf")
    with unchanged(model), pytest.raises(NonFiniteError) as caught:
        layer(bad)
    assert str(caught.value) == (
        "layer1.0.bn2 (BatchNorm1d): expected finite values, got Inf or NaN in channel 2 of batch 2. "
        'Look at the layers before it, lower the learning rate, or drop such batches with nonfinite="skip".'
    )
    assert isinstance(caught.value, RuntimeError)


def test_raise_without_a_model_names_the_class_and_at_most_eight_channels() -> None:
    layer = bn.BatchNorm1d(12, nonfinite="raise")
    bad = torch.randn(8, 12) / 0.0
    with unchanged(layer), pytest.raises(NonFiniteError) as caught:
        layer(bad)
    assert str(caught.value).startswith(
        "BatchNorm1d: expected finite values, got Inf or NaN in channels 0, 1, 2, 3, 4, 5, 6, 7, ... of batch 1. "
    )


def test_raise_without_statistics_has_no_number_of_the_batch() -> None:
    layer = bn.BatchNorm1d(2, nonfinite="raise", track_running_stats=False)
    with pytest.raises(NonFiniteError) as caught:
        layer(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]))
    assert str(caught.value).startswith("BatchNorm1d: expected finite values, got Inf or NaN in channel 0. Look at")


def test_propagate_is_torchs_way() -> None:
    layer, theirs = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    bad = torch.randn(8, 3)
    bad[0, 0] = float("nan")
    layer(bad)
    theirs(bad)
    assert layer.running_mean.isnan().tolist() == theirs.running_mean.isnan().tolist() == [True, False, False]
    assert layer.running_var.isnan().tolist() == theirs.running_var.isnan().tolist() == [True, False, False]
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_finite_batches_train_as_ever(nonfinite: str) -> None:
    layer, plain = bn.BatchNorm2d(3, nonfinite=nonfinite, activation="relu"), bn.BatchNorm2d(3, activation="relu")
    for _ in range(3):
        x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        results = []
        for module in (layer, plain):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
        for a, b in zip(*results, strict=True):
            assert_close(a, to_float64(b), dtype="float32", quantity="dx")
    for name, t in plain.state_dict().items():
        assert_close(layer.state_dict()[name].float(), to_float64(t), dtype="float32", quantity="y", what=name)


# Nothing


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_values_changes_nothing(training: bool) -> None:
    layer = used(bn.BatchNorm2d(3)).train(training)
    with unchanged(layer):
        assert layer(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
