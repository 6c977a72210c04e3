"""The reference against what it was not made from: differences, PyTorch in float64, fractions, the paper."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from batchnorm import reference
from batchnorm.reference import (
    Population,
    batch_norm_backward,
    batch_norm_forward,
    mini_batch_statistics,
    population_statistics,
)
from tolerances import assert_close, silence_kinks

Array = reference.Array
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
SHAPES = [(7, 3), (5, 3, 4), (4, 3, 2, 5), (3, 3, 2, 3, 2)]
EPS = 1e-3


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def case(shape: tuple[int, ...], activation: str, seed: int = 0) -> dict[str, Any]:
    """Random arguments of `batch_norm_forward`, and a random dy that is 0 where a kink is near."""
    r = rng(seed)
    channels = shape[1]
    inputs = {
        "x": r.normal(3.0, 2.0, shape),
        "weight": r.normal(1.0, 0.5, channels),
        "bias": r.normal(0.0, 0.5, channels),
        "residual": r.normal(0.0, 1.0, shape),
    }
    options = {"eps": EPS, "activation": activation, "negative_slope": 0.2}
    return {"inputs": inputs, "options": options, "dy": r.normal(0.0, 1.0, shape)}


def quiet(dy: Array, z: Array, activation: str) -> Array:
    if activation not in ("relu", "leaky_relu"):
        return dy
    return silence_kinks(torch.from_numpy(dy), z, margin=1e-3).numpy()


def central_difference(loss: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """(loss(v + h) - loss(v - h)) / 2h for every element, one at a time."""
    grad = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (loss(up) - loss(down)) / (up[index] - down[index])
    return grad


def sum_of_terms(dz: Array, x_hat: Array | None = None) -> Array:
    """The scale of dbias, and with x_hat that of dweight."""
    return reference.sum_over_batch(np.abs(dz if x_hat is None else dz * x_hat))


PLACES: dict[str, dict[str, Any]] = {
    "all": {},
    "mask of samples": {"mask": np.array([True, False, True, True])},
    "mask of positions": {"mask": rng(5).random((4, 5)) > 0.3},
    "mask of places": {"mask": rng(6).random((4, 3, 5)) > 0.3},
    "weights of samples": {"sample_weight": np.array([1.0, 0.0, 2.5, 3.0])},
    "weights of positions": {"sample_weight": rng(7).gamma(1.0, 1.0, (4, 1, 5))},
    "mask and weights": {
        "mask": rng(8).random((4, 5)) > 0.3,
        "sample_weight": np.array([1.0, 0.5, 2.5, 3.0]),
    },
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_finite_differences(activation: str, places: str, training: bool) -> None:
    given = case((4, 3, 5), activation)
    population = None if training else Population(np.array([2.0, 3.0, 4.0]), np.array([1.0, 4.0, 0.3]))
    options = given["options"] | PLACES[places] | {"population": population}
    inputs = given["inputs"]
    dy = quiet(given["dy"], batch_norm_forward(**inputs, **options).z, activation)
    grad = batch_norm_backward(dy, **inputs, **options)
    for name, found in zip(("x", "weight", "bias", "residual"), grad[:4], strict=True):

        def loss(value: Array, name: str = name) -> float:
            return float((dy * batch_norm_forward(**(inputs | {name: value}), **options).y).sum())

        expected = central_difference(loss, inputs[name])
        assert np.abs(expected).max() > 0.1
        assert_close(found, expected, dtype="float64", quantity="difference", what=f"d{name}")


def test_gradients_of_the_statistics_are_finite_differences() -> None:
    """The paper's second and third equation, with mean and variance as free inputs."""
    given = case((4, 3, 5), "tanh")
    inputs, dy = given["inputs"], given["dy"]
    fixed = Population(np.array([2.0, 3.0, 4.0]), np.array([1.0, 4.0, 0.3]))
    grad = batch_norm_backward(dy, **inputs, **given["options"], population=fixed)

    def loss(mean: Array, var: Array) -> float:
        population = Population(mean, var)
        return float((dy * batch_norm_forward(**inputs, **given["options"], population=population).y).sum())

    by_mean = central_difference(lambda mean: loss(mean, fixed.var), fixed.mean)
    by_var = central_difference(lambda var: loss(fixed.mean, var), fixed.var)
    assert_close(grad.dmean, by_mean, dtype="float64", quantity="difference")
    assert_close(grad.dvar, by_var, dtype="float64", quantity="difference")


@pytest.mark.parametrize("places", PLACES)
def test_the_six_equations_come_to_the_usual_short_form(places: str) -> None:
    """dx_i = weight / sqrt(var + eps) * (dz_i - w_i (sum dz + x_hat_i sum dz x_hat) / W)."""
    given = case((4, 3, 5), "silu")
    inputs, options = given["inputs"], given["options"] | PLACES[places]
    out = batch_norm_forward(**inputs, **options)
    grad = batch_norm_backward(given["dy"], **inputs, **options)
    w = reference.weights_of(inputs["x"], options.get("mask"), options.get("sample_weight"))
    m, _, var, _ = (reference.per_channel(s, inputs["x"]) for s in out.statistics)
    factor = reference.per_channel(inputs["weight"], inputs["x"]) / np.sqrt(var + EPS)
    dz = grad.dresidual
    sum_dz, sum_dz_x_hat = dz.sum((0, 2), keepdims=True), (dz * out.x_hat).sum((0, 2), keepdims=True)
    expected = factor * (dz - w * (sum_dz + out.x_hat * sum_dz_x_hat) / m)
    assert_close(grad.dx, expected, dtype="float64", quantity="dx")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_against_torch(shape: tuple[int, ...], activation: str, training: bool) -> None:
    given = case(shape, activation, seed=len(shape))
    inputs, options = given["inputs"], given["options"]
    mean, var = np.array([2.0, 3.0, 4.0]), np.array([1.0, 4.0, 0.3])
    population = None if training else Population(mean, var)
    out = batch_norm_forward(**inputs, **options, population=population)
    dy = quiet(given["dy"], out.z, activation)
    grad = batch_norm_backward(dy, **inputs, **options, population=population)

    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in inputs.items()}
    running = torch.tensor(mean), torch.tensor(var)
    z = F.batch_norm(leaves["x"], *running, leaves["weight"], leaves["bias"], training, 0.25, EPS)
    y = ACTIVATIONS[activation](z + leaves["residual"])
    y.backward(torch.tensor(dy))

    assert_close(y, out.y, dtype="float64", quantity="y", scale=np.abs(out.z).max())
    assert_close(leaves["x"].grad, grad.dx, dtype="float64", quantity="dx")
    assert_close(leaves["residual"].grad, grad.dresidual, dtype="float64", quantity="dresidual")
    terms = sum_of_terms(grad.dresidual, out.x_hat)
    assert_close(leaves["weight"].grad, grad.dweight, dtype="float64", quantity="dweight", scale=terms)
    terms = sum_of_terms(grad.dresidual)
    assert_close(leaves["bias"].grad, grad.dbias, dtype="float64", quantity="dbias", scale=terms)
    if training:
        updated = reference.running_update(Population(mean, var), out.statistics, momentum=0.25)
        std = np.sqrt(out.statistics.var)
        assert_close(running[0], updated.mean, dtype="float64", quantity="running_mean", scale=std)
        assert_close(running[1], updated.var, dtype="float64", quantity="running_var")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_derivatives_against_torch(activation: str) -> None:
    z = np.concatenate([np.linspace(-6.0, 6.0, 241), [0.0, -40.0, 40.0, -800.0, 800.0]])
    leaf = torch.tensor(z, requires_grad=True)
    y = ACTIVATIONS[activation](leaf)
    y.backward(torch.ones_like(leaf))
    assert leaf.grad is not None
    assert_close(reference.activate(z, activation, 0.2), y.detach(), dtype="float64", quantity="y", scale=1.0)
    slope = reference.activation_derivative(z, activation, 0.2)
    assert_close(slope, leaf.grad, dtype="float64", quantity="dx", scale=1.0)


def test_a_weight_of_two_is_the_sample_twice() -> None:
    given = case((4, 3, 5), "gelu")
    inputs, options, dy = given["inputs"], given["options"], given["dy"]
    weight = np.array([1.0, 2.0, 1.0, 3.0])
    again = [0, 1, 1, 2, 3, 3, 3]
    repeated = inputs | {name: inputs[name][again] for name in ("x", "residual")}
    out = batch_norm_forward(**inputs, **options, sample_weight=weight)
    out_repeated = batch_norm_forward(**repeated, **options)
    assert_close(out_repeated.y, out.y[again], dtype="float64", quantity="y")
    assert out.statistics.m.tolist() == out_repeated.statistics.m.tolist() == [35.0] * 3
    assert_close(
        reference.unbiased_variance(out.statistics),
        np.var(repeated["x"], axis=(0, 2), ddof=1),
        dtype="float64",
        quantity="var",
    )
    # A sample that counts twice is one in the loss: its copies share its dy, and their dx add up to its dx.
    shared = (dy / weight[:, None, None])[again]
    grad = batch_norm_backward(dy, **inputs, **options, sample_weight=weight)
    grad_repeated = batch_norm_backward(shared, **repeated, **options)
    gathered = np.zeros_like(dy)
    np.add.at(gathered, again, grad_repeated.dx)
    assert_close(gathered, grad.dx, dtype="float64", quantity="dx")
    terms = sum_of_terms(grad.dresidual, out.x_hat)
    assert_close(grad_repeated.dweight, grad.dweight, dtype="float64", quantity="dweight", scale=terms)


def test_a_weight_of_zero_is_normalized_but_not_measured() -> None:
    x = np.array([[1.0], [3.0], [100.0]])
    out = batch_norm_forward(x, eps=0.0, sample_weight=[1.0, 1.0, 0.0])
    assert out.y.ravel().tolist() == [-1.0, 1.0, 98.0]
    grad = batch_norm_backward([[0.0], [0.0], [1.0]], x, eps=0.0, sample_weight=[1.0, 1.0, 0.0])
    assert grad.dx[2, 0] == 1.0


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_a_masked_sample_is_a_removed_sample(activation: str) -> None:
    given = case((6, 3), activation)
    inputs, options, dy = given["inputs"], given["options"], given["dy"]
    mask = np.array([True, False, True, True, False, True])
    for array in (inputs["x"], inputs["residual"], dy):
        array[~mask] = np.nan  # what is absent may hold anything
    kept = inputs | {name: inputs[name][mask] for name in ("x", "residual")}
    out = batch_norm_forward(**inputs, **options, mask=mask)
    grad = batch_norm_backward(dy, **inputs, **options, mask=mask)
    out_kept = batch_norm_forward(**kept, **options)
    grad_kept = batch_norm_backward(dy[mask], **kept, **options)

    for found in (out.y, grad.dx, grad.dresidual):
        assert (found[~mask] == 0.0).all()
    assert_close(out.y[mask], out_kept.y, dtype="float64", quantity="y")
    assert_close(grad.dx[mask], grad_kept.dx, dtype="float64", quantity="dx")
    terms = sum_of_terms(grad_kept.dresidual, out_kept.x_hat)
    assert_close(grad.dweight, grad_kept.dweight, dtype="float64", quantity="dweight", scale=terms)
    terms = sum_of_terms(grad_kept.dresidual)
    assert_close(grad.dbias, grad_kept.dbias, dtype="float64", quantity="dbias", scale=terms)


def test_masked_positions_are_left_out_of_a_sequence() -> None:
    x = rng(1).normal(size=(3, 2, 4))
    lengths = np.array([4, 2, 3])
    mask = np.arange(4) < lengths[:, None]
    present = np.concatenate([x[n, :, :length].T for n, length in enumerate(lengths)])  # (values, channels)
    found = mini_batch_statistics(np.where(mask[:, None], x, np.inf), mask=mask)
    expected = mini_batch_statistics(present)
    assert found.m.tolist() == [9.0, 9.0]
    std = np.sqrt(expected.var)
    assert_close(found.mean, expected.mean, dtype="float64", quantity="mean", scale=std)
    assert_close(found.var, expected.var, dtype="float64", quantity="var")


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_right_to_the_last_digits_at_any_mean(mean: float, dtype: type) -> None:
    """Against exact fractions. A mean that is only rounded to float64 puts y off by 7e-9 at 1e8."""
    x = rng(2).normal(mean, 1.0 if mean < 1e8 or dtype is np.float64 else 100.0, (301, 1)).astype(dtype)
    values = [Fraction(float(v)) for v in x.ravel()]
    exact_mean = sum(values, Fraction(0)) / len(values)
    exact_var = float(sum(((v - exact_mean) ** 2 for v in values), Fraction(0)) / len(values))
    out = batch_norm_forward(x, eps=0.0)
    expected = np.array([[float(v - exact_mean)] for v in values]) / np.sqrt(exact_var)
    assert out.statistics.mean + out.statistics.rest == out.statistics.mean
    found_mean = Fraction(float(out.statistics.mean[0])) + Fraction(float(out.statistics.rest[0]))
    assert abs(found_mean - exact_mean) <= 1e-15 * np.sqrt(exact_var)
    assert_close(out.statistics.var, np.array([exact_var]), dtype="float64", quantity="var")
    assert np.abs(out.y - expected).max() <= 1e-14
    assert_close(out.y, expected, dtype="float64", quantity="y")


@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 12345.678])
def test_a_constant_channel_gives_exactly_the_bias(value: float) -> None:
    x = np.full((7, 1, 3), value)
    out = batch_norm_forward(x, [1.7], [0.3], eps=1e-5)
    assert (out.y == 0.3).all()
    assert out.statistics.var.tolist() == [0.0]
    grad = batch_norm_backward(rng().normal(size=x.shape), x, [1.7], [0.3], eps=1e-5)
    assert np.isfinite(grad.dx).all()
    assert grad.dweight.tolist() == [0.0]


# What the paper says


def test_section_3_2_a_feature_map_is_one_mini_batch() -> None:
    x = rng(3).normal(size=(4, 2, 3, 5))
    flat = x.transpose(0, 2, 3, 1).reshape(-1, 2)
    found, expected = mini_batch_statistics(x), mini_batch_statistics(flat)
    assert found.m.tolist() == [4 * 3 * 5] * 2
    assert_close(found.mean, expected.mean, dtype="float64", quantity="mean", scale=1.0)
    assert_close(found.var, expected.var, dtype="float64", quantity="var")


def test_section_3_2_the_bias_before_is_cancelled() -> None:
    x = rng(3).normal(size=(6, 3))
    shifted = batch_norm_forward(x + np.array([5.0, -7.0, 100.0]))
    assert_close(shifted.y, batch_norm_forward(x).y, dtype="float64", quantity="y", scale=100.0)


@pytest.mark.parametrize("a", [0.25, 3.0, 1e3])
def test_section_3_3_the_scale_of_the_weights_does_not_matter(a: float) -> None:
    """BN((aW)u) = BN(Wu), d/du is the same, and d/d(aW) is 1/a of d/dW."""
    r = rng(4)
    u, w, dy = r.normal(size=(9, 4)), r.normal(size=(3, 4)), r.normal(size=(9, 3))
    weight, bias = r.normal(1.0, 0.5, 3), r.normal(size=3)
    one, scaled = u @ w.T, u @ (a * w).T
    y = batch_norm_forward(one, weight, bias, eps=0.0).y
    assert_close(batch_norm_forward(scaled, weight, bias, eps=0.0).y, y, dtype="float64", quantity="y")
    dx_one = batch_norm_backward(dy, one, weight, bias, eps=0.0).dx
    dx_scaled = batch_norm_backward(dy, scaled, weight, bias, eps=0.0).dx
    assert_close(dx_scaled @ (a * w), dx_one @ w, dtype="float64", quantity="dx")
    assert_close(dx_scaled.T @ u, dx_one.T @ u / a, dtype="float64", quantity="dx")


def test_algorithm_2_line_11_is_a_linear_map_of_x() -> None:
    r = rng(9)
    x, weight, bias = r.normal(size=(5, 3)), r.normal(size=3), r.normal(size=3)
    mean, var = r.normal(size=3), r.gamma(2.0, 1.0, 3)
    slope = weight / np.sqrt(var + EPS)
    expected = slope * x + (bias - slope * mean)
    found = batch_norm_forward(x, weight, bias, EPS, population=Population(mean, var)).y
    assert_close(found, expected, dtype="float64", quantity="y")


def test_algorithm_2_by_hand() -> None:
    """Two mini-batches of three: means 2 and 6, biased variances 2/3 and 8/3."""
    batches = [mini_batch_statistics([[1.0], [2.0], [3.0]]), mini_batch_statistics([[4.0], [6.0], [8.0]])]
    paper = population_statistics(batches, "paper")
    assert paper.mean.tolist() == [4.0]
    assert_close(paper.var, np.array([3 / 2 * (2 / 3 + 8 / 3) / 2]), dtype="float64", quantity="var")
    # All six together: squares about 4 are 9 + 4 + 1 + 0 + 4 + 16 = 34.
    pooled = population_statistics(batches, "pooled")
    assert pooled.mean.tolist() == [4.0]
    assert_close(pooled.var, np.array([34 / 5]), dtype="float64", quantity="var")


def test_pooled_statistics_do_not_depend_on_the_cut() -> None:
    x = rng(10).normal(50.0, 3.0, (40, 2, 3))
    cuts = [(0, 40), (0, 13, 14, 40), (0, 1, 2, 39, 40)]
    for cut in cuts:
        batches = [mini_batch_statistics(x[a:b]) for a, b in pairwise(cut)]
        for order in (batches, batches[::-1]):
            found = population_statistics(order, "pooled")
            assert_close(found.mean, x.mean((0, 2)), dtype="float64", quantity="mean", scale=3.0)
            assert_close(found.var, x.var((0, 2), ddof=1), dtype="float64", quantity="var")


def test_running_averages_against_torch() -> None:
    for momentum in (0.1, 1.0, None):
        layer = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
        running = Population(np.zeros(3), np.ones(3))
        for step in range(1, 5):
            x = rng(step).normal(step, 2.0, (6, 3))
            layer(torch.tensor(x))
            batch = mini_batch_statistics(x)
            if momentum is None:
                running = reference.cumulative_update(running, batch, step)
            else:
                running = reference.running_update(running, batch, momentum)
        assert_close(layer.running_mean, running.mean, dtype="float64", quantity="running_mean", scale=2.0)
        assert_close(layer.running_var, running.var, dtype="float64", quantity="running_var")


def test_the_plain_average_of_equal_batches_is_the_papers_estimator() -> None:
    batches = [mini_batch_statistics(rng(step).normal(step, 2.0, (6, 3))) for step in range(5)]
    running = Population(np.zeros(3), np.ones(3))
    for step, batch in enumerate(batches, 1):
        running = reference.cumulative_update(running, batch, step)
    paper = population_statistics(batches, "paper")
    assert_close(running.mean, paper.mean, dtype="float64", quantity="mean", scale=2.0)
    assert_close(running.var, paper.var, dtype="float64", quantity="var")


# Errors, word for word

ONE = mini_batch_statistics([[1.0]])
TWO = mini_batch_statistics([[1.0], [2.0]])
X = np.zeros((2, 3, 4))
ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: mini_batch_statistics([[1.0, 1.0]], mask=[[True, False]]),
        "mini_batch_statistics: expected a positive sum of weights in each channel, got [1.0, 0.0]. "
        "Leave the channel or the batch out.",
    ),
    (
        lambda: reference.unbiased_variance(ONE),
        "unbiased_variance: expected more than 1 value in each channel, got [1.0]. Use larger mini-batches.",
    ),
    (
        lambda: population_statistics([]),
        "population_statistics: expected at least one mini-batch, got none. Give some data.",
    ),
    (
        lambda: population_statistics([TWO, ONE]),
        "population_statistics: expected mini-batches of one size for the paper's estimator, got [1.0, 2.0]. "
        'Use "pooled".',
    ),
    (
        lambda: population_statistics([TWO], "median"),
        'population_statistics: expected estimator "paper" or "pooled", got \'median\'. Name one of them.',
    ),
    (
        lambda: batch_norm_forward(X, mask=np.ones((2, 3), dtype=bool)),
        "places: expected shape (N,), (N, *spatial) or the rank of x (2, 3, 4), got (2, 3). "
        "Reshape the mask or weights.",
    ),
    (
        lambda: batch_norm_forward(np.eye(3), activation="swish"),
        "activate: expected one of identity, relu, leaky_relu, silu, gelu, sigmoid, tanh, got 'swish'. "
        "Name one of them.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
