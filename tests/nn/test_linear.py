"""The note's block: its own example, and each of its faults mended."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import ArgumentError
from tolerances import assert_close, to_float64

FEATURES, OUT = 6, 3


@pytest.fixture
def layer() -> bn.BatchNormLinear:
    return bn.BatchNormLinear(FEATURES, OUT, dtype=torch.float64)


def projected(x_hat: Any, layer: bn.BatchNormLinear) -> reference.Array:
    return np.asarray(x_hat @ to_float64(layer.linear.weight).T + to_float64(layer.linear.bias))


def test_the_notes_own_example() -> None:
    x = torch.tensor([[1.1, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26]], dtype=torch.float32)
    x2 = torch.rand((3, 6), dtype=torch.float)
    block = bn.BatchNormLinear(6, 3)
    first, second, inferred = block(x), block(x2), block(x, inference=True)
    assert first.shape == second.shape == inferred.shape == (3, 3)
    expected = projected(reference.batch_norm_forward(to_float64(x), eps=1e-3).x_hat, block)
    assert_close(first, expected, dtype="float32", quantity="y", scale=10)
    # Two batches in, by the note's 0.95 for the old value.
    running = reference.Population(np.zeros(6), np.ones(6))
    for batch in (x, x2):
        running = reference.running_update(running, reference.mini_batch_statistics(to_float64(batch)), 1 - 0.95)
    fixed = reference.batch_norm_forward(to_float64(x), eps=1e-3, population=running).x_hat
    assert_close(inferred, projected(fixed, block), dtype="float32", quantity="y", scale=100)


def test_its_statistics_are_state(layer: bn.BatchNormLinear) -> None:
    keys = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "linear.weight", "linear.bias"]
    assert list(layer.state_dict()) == keys
    layer(torch.randn(8, FEATURES, dtype=torch.float64))
    other = bn.BatchNormLinear(FEATURES, OUT, dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, FEATURES, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    assert layer.float().norm.running_mean.dtype == torch.float32
    assert layer.to("meta").norm.running_var.device.type == "meta"


def test_the_shape_of_the_statistics_stays(layer: bn.BatchNormLinear) -> None:
    layer(torch.randn(8, FEATURES, dtype=torch.float64))
    assert layer.norm.running_mean.shape == layer.norm.running_var.shape == (FEATURES,)


def test_inference_before_training_is_the_projection_of_the_input(layer: bn.BatchNormLinear) -> None:
    """The note began with a variance of 0 and divided by √ε."""
    x = torch.randn(8, FEATURES, dtype=torch.float64)
    expected = projected(to_float64(x) / np.sqrt(1 + 1e-3), layer)
    assert_close(layer(x, inference=True), expected, dtype="float64", quantity="y")


def test_no_graph_outlives_its_step(layer: bn.BatchNormLinear) -> None:
    x = torch.randn(8, FEATURES, dtype=torch.float64, requires_grad=True)
    layer(x)
    assert layer.norm.running_mean.grad_fn is None
    assert not layer.norm.running_var.requires_grad


def test_one_sample_is_an_error_and_not_a_nan(layer: bn.BatchNormLinear) -> None:
    with pytest.raises(ValueError) as caught:
        layer(torch.zeros(1, FEATURES, dtype=torch.float64))
    assert (
        str(caught.value) == "Expected more than 1 value per channel when training, got input size torch.Size([1, 6])"
    )
    assert int(layer.norm.num_batches_tracked) == 0
    patient = bn.BatchNormLinear(FEATURES, OUT, too_few="running")
    assert patient(torch.zeros(1, FEATURES)).isfinite().all()
    assert int(patient.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("inference", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_count_unless_the_call_says_otherwise(training: bool, inference: bool | None) -> None:
    layer = bn.BatchNormLinear(FEATURES, OUT, dtype=torch.float64)
    layer(torch.randn(8, FEATURES, dtype=torch.float64) + 2)
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, FEATURES, dtype=torch.float64)
    y = layer(x, inference=inference)
    by_running = (not training) if inference is None else inference
    population = reference.Population(to_float64(before["norm.running_mean"]), to_float64(before["norm.running_var"]))
    x_hat = reference.batch_norm_forward(to_float64(x), eps=1e-3, population=population if by_running else None).x_hat
    assert_close(y, projected(x_hat, layer), dtype="float64", quantity="y", scale=10)
    moved = not torch.equal(before["norm.running_mean"], layer.norm.running_mean)
    assert moved is not by_running
    assert int(layer.norm.num_batches_tracked) == (1 if by_running else 2)
    assert layer.training is training
    assert layer.norm.training is training


def test_the_statistics_follow_with_a_twentieth_of_the_new_batch(layer: bn.BatchNormLinear) -> None:
    x = torch.randn(8, FEATURES, dtype=torch.float64) * 3 + 1
    layer(x)
    batch = reference.mini_batch_statistics(to_float64(x))
    after = reference.running_update(reference.Population(np.zeros(6), np.ones(6)), batch, 0.05)
    scale = np.sqrt(batch.var)
    assert_close(layer.norm.running_mean, after.mean, dtype="float64", quantity="running_mean", scale=scale)
    assert_close(layer.norm.running_var, after.var, dtype="float64", quantity="running_var")


@pytest.mark.parametrize("shape", [(7, FEATURES), (2, 5, FEATURES), (2, 3, 2, FEATURES)])
def test_every_position_before_the_features_is_a_sample(shape: tuple[int, ...], layer: bn.BatchNormLinear) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    x_hat = reference.batch_norm_forward(to_float64(x).reshape(-1, FEATURES), eps=1e-3).x_hat
    assert_close(y.reshape(-1, OUT), projected(x_hat, layer), dtype="float64", quantity="y", scale=10)
    strided = torch.randn(*shape[:-1], FEATURES * 2, dtype=torch.float64)[..., ::2]
    assert layer(strided).shape == (*shape[:-1], OUT)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fold_is_what_inference_comes_down_to(dtype: torch.dtype, bias: bool, affine: bool) -> None:
    layer = bn.BatchNormLinear(FEATURES, OUT, affine=affine, bias=bias, dtype=dtype)
    for _ in range(3):
        layer(torch.randn(8, FEATURES, dtype=dtype) * 2 + 1)
    if affine:
        nn.init.normal_(layer.norm.weight)
        nn.init.normal_(layer.norm.bias)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    folded = layer.fold()
    assert type(folded) is nn.Linear
    assert not folded.training
    assert folded.weight.dtype == dtype
    assert (folded.in_features, folded.out_features) == (FEATURES, OUT)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    x = torch.randn(8, FEATURES, dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_close(folded(x), to_float64(exact), dtype=dtype, quantity="y", scale=50)
    # What is folded can be trained on.
    assert folded.weight.requires_grad
    assert folded.bias.requires_grad


def test_its_gradients_are_finite_differences() -> None:
    for options in ({}, {"affine": True}):
        layer = bn.BatchNormLinear(3, 2, dtype=torch.float64, **options)  # type: ignore[arg-type]
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

        def function(x: Tensor, *_: Tensor, layer: Any = layer) -> Tensor:
            y: Tensor = layer(x)
            return y

        assert gradcheck(function, (x, *layer.parameters()))
        assert gradgradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize(("shape", "shown"), [((4, 5), "(4, 5)"), ((6,), "(6,)"), ((4, 6, 1), "(4, 6, 1)")])
def test_an_input_of_other_features_is_refused(shape: tuple[int, ...], shown: str, layer: bn.BatchNormLinear) -> None:
    with pytest.raises(ArgumentError) as caught:
        layer(torch.zeros(shape, dtype=torch.float64))
    assert str(caught.value) == (
        f"BatchNormLinear: expected an input of shape (..., 6) with at least 2 dimensions, got {shown}. "
        "Add the batch dimension, or build the layer for these features."
    )
