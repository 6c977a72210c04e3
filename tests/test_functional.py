"""The public function: out=, in place, masks of every shape, and what it refuses, word for word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import kernels, reference
from batchnorm.errors import ArgumentError, BackendError, DtypeError, MismatchError
from batchnorm.functional import batch_norm, batch_norm_with_statistics
from batchnorm.kernels import BACKENDS
from conformance import EPS, LAYOUTS, ON_THE_CPU, arrange
from tolerances import assert_close, to_float64

SHAPE = (6, 5, 4, 7)
MASKS = [(6,), (6, 4, 7), (6, 1, 1, 1), (6, 1, 4, 7), (6, 5, 4, 7), (1, 1, 4, 7), (1, 1, 1, 7)]


def population() -> tuple[Tensor, Tensor]:
    return torch.randn(5), torch.rand(5) + 0.5


def inferred(x: Tensor, mean: Tensor, var: Tensor, **more: Any) -> reference.Array:
    fixed = reference.Population(to_float64(mean), to_float64(var))
    y: reference.Array = reference.batch_norm_forward(to_float64(x), eps=EPS, population=fixed, **more).y
    return y


# As torch's


def test_the_first_eight_arguments_are_those_of_torch() -> None:
    x, weight, bias = torch.randn(SHAPE, dtype=torch.float64), *torch.randn(2, 5, dtype=torch.float64)
    results = []
    for function in (batch_norm, F.batch_norm):
        mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        y = function(x, mean, var, weight, bias, True, 0.3, 0.01)
        results.append((y, mean, var, function(x, mean, var, weight, bias, False, 0.3, 0.01)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, to_float64(theirs), dtype="float64", quantity="y", scale=10)
    assert_close(batch_norm(x, mean, var), to_float64(F.batch_norm(x, mean, var)), dtype="float64", quantity="y")


def test_without_running_statistics_it_trains_on_the_batch_alone() -> None:
    x = torch.randn(SHAPE)
    y = batch_norm(x, None, None, training=True, eps=EPS)
    assert_close(y, reference.batch_norm_forward(to_float64(x), eps=EPS).y, dtype="float32", quantity="y")


# Into out, and in place


@pytest.mark.parametrize("into", LAYOUTS[:6])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_inference_into_out(into: str, activation: str | None) -> None:
    x, (mean, var) = torch.randn(SHAPE), population()
    out = arrange(torch.full(SHAPE, float("nan")), into)
    strides = out.stride()
    y = batch_norm(x, mean, var, eps=EPS, activation=activation, out=out)
    assert y is out
    assert out.stride() == strides
    assert_close(out, inferred(x, mean, var, activation=activation or "identity"), dtype="float32", quantity="y")


@pytest.mark.parametrize("layout", LAYOUTS[:6])
def test_inference_in_place(layout: str) -> None:
    x, residual, (mean, var) = arrange(torch.randn(SHAPE), layout), torch.randn(SHAPE), population()
    mask = torch.rand(6, 4, 7) > 0.3
    expected = inferred(x, mean, var, residual=to_float64(residual), activation="relu", mask=mask.numpy())
    address = x.data_ptr()
    y = batch_norm(x, mean, var, eps=EPS, activation="relu", residual=residual, mask=mask, out=x)
    assert y is x
    assert x.data_ptr() == address
    assert_close(x, expected, dtype="float32", quantity="y", scale=10)


def test_out_may_be_the_residual() -> None:
    x, residual, (mean, var) = torch.randn(SHAPE), torch.randn(SHAPE), population()
    expected = inferred(x, mean, var, residual=to_float64(residual))
    batch_norm(x, mean, var, eps=EPS, residual=residual, out=residual)
    assert_close(residual, expected, dtype="float32", quantity="y", scale=10)


def test_out_may_lie_across_the_input() -> None:
    mean, var = population()
    x = torch.randn(5, 5)
    expected = inferred(x, mean, var)
    batch_norm(x, mean, var, eps=EPS, out=x.t())
    assert_close(x.t(), expected, dtype="float32", quantity="y", scale=10)
    long = torch.randn(9, 5)
    expected = inferred(long[:8], mean, var)
    batch_norm(long[:8], mean, var, eps=EPS, out=long[1:])
    assert_close(long[1:], expected, dtype="float32", quantity="y", scale=10)


def test_out_beside_tensors_that_need_gradients_is_for_no_grad_alone() -> None:
    x, (mean, var) = torch.randn(SHAPE, requires_grad=True), population()
    with pytest.raises(MismatchError) as caught:
        batch_norm(x, mean, var, out=torch.empty(SHAPE))
    assert str(caught.value) == (
        "batch_norm: expected no gradient to flow beside out=, got one that would. "
        "Call it under torch.no_grad(), or leave out= away."
    )
    with torch.no_grad():
        assert not batch_norm(x, mean, var, out=torch.empty(SHAPE)).requires_grad


# Masks and weights


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_every_documented_shape(shape: tuple[int, ...], training: bool) -> None:
    x, dy, (mean, var) = torch.randn(SHAPE), torch.randn(SHAPE), population()
    mask = torch.rand(shape) > 0.3
    mask.view(-1)[0] = True
    # The reference takes a mask of x's rank and broadcasts.
    fixed = None if training else reference.Population(to_float64(mean), to_float64(var))
    arguments = {"eps": EPS, "population": fixed, "mask": mask.numpy()}
    expected = reference.batch_norm_forward(to_float64(x), **arguments)
    gradients = reference.batch_norm_backward(to_float64(dy), to_float64(x), **arguments)
    places = np.broadcast_to(reference.places(mask.numpy(), to_float64(x)) != 0, SHAPE)
    x = torch.where(torch.from_numpy(places.copy()), x, float("nan")).requires_grad_()
    y = batch_norm(x, mean, var, training=training, eps=EPS, mask=mask)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(y, expected.y, dtype="float32", quantity="y", scale=10)
    assert_close(dx, gradients.dx, dtype="float32", quantity="dx", scale=10)
    assert (y.detach()[~torch.from_numpy(places.copy())] == 0).all()


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_weights_of_every_documented_shape_are_repeats(shape: tuple[int, ...]) -> None:
    x = torch.randn(SHAPE)
    weight = torch.randint(0, 4, shape).float()
    weight.view(-1)[0] = 3.0
    running = torch.zeros(5), torch.ones(5)
    y = batch_norm(x, *running, training=True, momentum=1.0, eps=EPS, sample_weight=weight)
    expected = reference.batch_norm_forward(to_float64(x), eps=EPS, sample_weight=to_float64(weight))
    assert_close(y, expected.y, dtype="float32", quantity="y", scale=10)
    unbiased = reference.unbiased_variance(expected.statistics)
    assert_close(running[1], unbiased, dtype="float32", quantity="running_var")


def test_integer_weights_are_counts() -> None:
    x, counts = torch.randn(6, 3), torch.tensor([1, 2, 0, 1, 3, 1])
    weighted, repeated = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    y = batch_norm(x, *weighted, training=True, sample_weight=counts)
    twice = batch_norm(x.repeat_interleave(counts, 0), *repeated, training=True)
    assert_close(y.repeat_interleave(counts, 0), to_float64(twice), dtype="float32", quantity="y")
    for a, b in zip(weighted, repeated, strict=True):
        assert_close(a, to_float64(b), dtype="float32", quantity="y", scale=2)


def test_a_weight_of_zero_is_normalized_but_not_measured() -> None:
    x = torch.randn(8, 3)
    weight = torch.ones(8)
    weight[3] = 0.0
    y = batch_norm(x, None, None, training=True, sample_weight=weight, eps=EPS)
    rest = [i for i in range(8) if i != 3]
    alone = batch_norm(x[rest], None, None, training=True, eps=EPS)
    assert_close(y[rest], to_float64(alone), dtype="float32", quantity="y")
    assert (y[3] != 0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_masked_batches_move_the_running_statistics_by_what_is_present(momentum: float) -> None:
    x = torch.randn(8, 3, 5)
    mask = torch.rand(8, 5) > 0.4
    before = torch.full((3,), 0.5), torch.full((3,), 2.0)
    running = before[0].clone(), before[1].clone()
    batch_norm(torch.where(mask[:, None], x, float("inf")), *running, training=True, momentum=momentum, mask=mask)
    statistics = reference.mini_batch_statistics(to_float64(x), mask=mask.numpy())
    start = reference.Population(to_float64(before[0]), to_float64(before[1]))
    after = reference.running_update(start, statistics, momentum)
    scale = np.sqrt(statistics.var) + 1
    assert_close(running[0], after.mean, dtype="float32", quantity="running_mean", scale=scale)
    assert_close(running[1], after.var, dtype="float32", quantity="running_var")


# What is refused

X = torch.zeros(4, 3, 2)
STATISTICS = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
TRAIN = {"running_mean": None, "running_var": None, "training": True}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activation": (
        TRAIN | {"activation": "swish"},
        ArgumentError,
        "activation: expected one of (None, 'relu', 'leaky_relu', 'silu', 'gelu', 'sigmoid', 'tanh'), got 'swish'. "
        "Apply any other function to the result.",
    ),
    "integers": (
        STATISTICS | {"input": torch.zeros(4, 3, dtype=torch.int32)},
        DtypeError,
        "batch_norm: expected an input of dtype float32, float64, bfloat16, float16, got torch.int32. "
        "Convert it first, e.g. input.float(); complex values can be normalized as two real channels.",
    ),
    "a vector": (
        STATISTICS | {"input": torch.zeros(3)},
        ArgumentError,
        "batch_norm: expected an input of shape (N, C, ...), got shape (3,). "
        "Add the missing dimension, e.g. input.unsqueeze(0).",
    ),
    "eps": (
        TRAIN | {"eps": 0.0},
        ArgumentError,
        "batch_norm eps must be positive during training, but got 0.0",
    ),
    "one value": (
        TRAIN | {"input": torch.zeros(1, 3)},
        ArgumentError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])",
    ),
    "no statistics": (
        {"running_mean": None, "running_var": None},
        MismatchError,
        "running_mean must be defined in evaluation mode",
    ),
    "one of two statistics": (
        {"running_mean": torch.zeros(3), "running_var": None, "training": True},
        ArgumentError,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "channels of the mean": (
        STATISTICS | {"running_mean": torch.zeros(5)},
        MismatchError,
        "running_mean should contain 3 elements not 5",
    ),
    "channels of the variance": (
        STATISTICS | {"running_var": torch.ones(5), "training": True},
        MismatchError,
        "running_var should contain 3 elements not 5",
    ),
    "channels of the weight": (
        STATISTICS | {"weight": torch.ones(2)},
        MismatchError,
        "weight should contain 3 elements not 2",
    ),
    "channels of the bias": (
        STATISTICS | {"bias": torch.ones(4)},
        MismatchError,
        "bias should contain 3 elements not 4",
    ),
    "dtype of the statistics": (
        STATISTICS | {"input": torch.zeros(4, 3, dtype=torch.float64)},
        DtypeError,
        "batch_norm: expected running_mean of a dtype that goes with an input of torch.float64, got torch.float32. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "dtype of the bias": (
        TRAIN | {"bias": torch.zeros(3, dtype=torch.float64)},
        DtypeError,
        "batch_norm: expected bias of a dtype that goes with an input of torch.float32, got torch.float64. "
        "Cast one of them, e.g. module.double() or input.float().",
    ),
    "mask of numbers": (
        TRAIN | {"mask": torch.ones(4)},
        DtypeError,
        "batch_norm: expected a mask of dtype torch.bool, got torch.float32. "
        "Compare it first, e.g. mask != 0; weights go to sample_weight.",
    ),
    "shape of the mask": (
        TRAIN | {"mask": torch.ones(3, dtype=torch.bool)},
        ArgumentError,
        "batch_norm: expected mask of shape (4,), (4, 2) or broadcastable to (4, 3, 2), got (3,). Reshape the mask.",
    ),
    "shape of the weights": (
        TRAIN | {"sample_weight": torch.ones(4, 3)},
        ArgumentError,
        "batch_norm: expected sample_weight of shape (4,), (4, 2) or broadcastable to (4, 3, 2), got (4, 3). "
        "Reshape the sample_weight.",
    ),
    "negative weights": (
        TRAIN | {"sample_weight": torch.tensor([1.0, -1.0, 1.0, 1.0])},
        ArgumentError,
        "batch_norm: expected finite sample weights of 0 or more, got others. Clip or drop the others.",
    ),
    "weights that are not finite": (
        TRAIN | {"sample_weight": torch.tensor([1.0, float("nan"), 1.0, 1.0])},
        ArgumentError,
        "batch_norm: expected finite sample weights of 0 or more, got others. Clip or drop the others.",
    ),
    "too little weight": (
        TRAIN | {"sample_weight": torch.full((4,), 0.125)},
        ArgumentError,
        "batch_norm: expected more than 1 present value per channel when training (the sum of the weights), got 1. "
        "Leave such a batch out, or give it more present values.",
    ),
    "too little present": (
        TRAIN | {"mask": torch.zeros(4, dtype=torch.bool)},
        ArgumentError,
        "batch_norm: expected more than 1 present value per channel when training (the sum of the weights), got 0. "
        "Leave such a batch out, or give it more present values.",
    ),
    "residual": (
        TRAIN | {"residual": torch.zeros(4, 3, 3)},
        MismatchError,
        "batch_norm: expected a residual that broadcasts to (4, 3, 2), got shape (4, 3, 3). "
        "Reshape or project the residual.",
    ),
    "out in training": (
        TRAIN | {"out": torch.zeros(4, 3, 2)},
        ArgumentError,
        "batch_norm: expected out= in inference only, got training=True. "
        "Leave out= away in training: backward needs the input.",
    ),
    "shape of out": (
        STATISTICS | {"out": torch.zeros(4, 3)},
        MismatchError,
        "batch_norm: expected out of shape (4, 3, 2), torch.float32 on cpu, got (4, 3), torch.float32 on cpu. "
        "Give torch.empty_like(input).",
    ),
    "dtype of out": (
        STATISTICS | {"out": torch.zeros(4, 3, 2, dtype=torch.bfloat16)},
        MismatchError,
        "batch_norm: expected out of shape (4, 3, 2), torch.float32 on cpu, got (4, 3, 2), torch.bfloat16 on cpu. "
        "Give torch.empty_like(input).",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_change_nothing(case: str) -> None:
    arguments, kind, message = ERRORS[case]
    tensors = {k: t.clone() for k, t in arguments.items() if isinstance(t, Tensor)}
    with pytest.raises(kind) as caught:
        batch_norm(**({"input": X} | arguments | tensors))
    assert str(caught.value) == message
    assert isinstance(caught.value, bn.BatchNormError)
    for name, t in tensors.items():
        assert torch.equal(t, arguments[name]) or name == "sample_weight", f"{name} was changed"


# Which kernel runs


@pytest.fixture
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without BATCHNORM_BACKEND, with which the tests themselves may be run."""
    monkeypatch.setattr(kernels, "ENVIRONMENT", None)


def test_a_backend_without_a_name_is_an_error() -> None:
    with pytest.raises(BackendError) as caught, bn.use_backend("fastest"):
        pass
    assert str(caught.value) == (
        f"use_backend: expected one of {[*BACKENDS, 'composite']}, got 'fastest'. Correct the name."
    )


@pytest.mark.usefixtures("nothing_named")
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_explain_says_what_runs_and_why_each_other_does_not(name: str) -> None:
    x = torch.randn(8, 3)
    with bn.use_backend(name):
        found = bn.explain(x)
    assert found.backend == name
    assert found.named
    assert list(found.reasons) == list(BACKENDS)
    assert found.reasons[name] is None
    assert all(found.reasons[other] for other in BACKENDS if other != name)
    assert str(found).splitlines()[0] == f"{name}: runs (named outright)"
    assert not bn.explain(x).named


@pytest.mark.usefixtures("nothing_named")
def test_use_backend_ends_with_its_block_even_on_an_error() -> None:
    with pytest.raises(ZeroDivisionError), bn.use_backend("eager"):
        raise ZeroDivisionError
    assert not bn.explain(torch.randn(8, 3)).named


def test_new_statistics_are_the_old_ones_where_an_unseen_mask_leaves_too_few() -> None:
    x, mean, var = torch.randn(3, 2), torch.full((2,), 0.5), torch.full((2,), 2.0)

    def new(mask: Tensor) -> tuple[Tensor, Tensor]:
        found = batch_norm_with_statistics(x, mean, var, mask=mask)
        return found.running_mean, found.running_var

    masks = torch.tensor([[True, False, False], [True, True, True]])
    means, variances = torch.func.vmap(new)(masks)
    assert torch.equal(means[0], mean) and torch.equal(variances[0], var)
    assert not torch.equal(means[1], mean) and not torch.equal(variances[1], var)
