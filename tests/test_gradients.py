"""Derivatives of the public function and the layers: of first, second and third order, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm import reference
from batchnorm.functional import batch_norm
from conformance import EPS, FACTORS, MOMENTUM, Case, allowed, expected_of, inputs_of
from pairwise import pairwise
from tolerances import assert_close, to_float64

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")
SHAPE = (4, 2, 3)
MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
MARGIN = 1e-3  # no z nearer to a kink than this: gradcheck steps by 1e-6

CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": ACTIVATIONS,
    "places": ("all", "mask", "weights", "mask and weights"),
    "residual": ("none", "full", "broadcast", "x itself"),
    "training": (True, False),
    "frozen": ("nothing", "weight and bias", "weight", "bias", "x", "no parameters"),
}


def meaningful(row: Mapping[str, Any]) -> bool:
    return not (row.get("frozen") == "x" and row.get("residual") == "x itself")


def problem(
    activation: str | None, places: str, residual: str, training: bool, frozen: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of those tensors that need a gradient, far from every kink."""
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)

        def normal(*size: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64)

        tensors = {"x": normal(*SHAPE) * 1.5 + 0.5, "weight": normal(2) + 1.5, "bias": normal(2) * 0.5}
        if residual in ("full", "broadcast"):
            tensors["residual"] = normal(*SHAPE) if residual == "full" else normal(1, 2, 1)
        if "weights" in places:
            tensors["sample_weight"] = torch.rand(4, 1, 3, generator=g, dtype=torch.float64) + 0.5
        running = normal(2), torch.rand(2, generator=g, dtype=torch.float64) + 0.5
        if frozen == "no parameters":
            del tensors["weight"], tensors["bias"]
        if not training:
            tensors.pop("sample_weight", None)
        free = [name for name in tensors if name not in frozen.split(" and ")]

        def function(
            *given: Tensor, activate: bool = True, tensors: Any = tensors, running: Any = running, free: Any = free
        ) -> Tensor:
            t = tensors | dict(zip(free, given, strict=True))
            more = t["x"] if residual == "x itself" else t.get("residual")
            return batch_norm(
                t["x"],
                running[0].clone(),
                running[1].clone(),
                t.get("weight"),
                t.get("bias"),
                training,
                eps=EPS,
                mask=MASK if "mask" in places else None,
                sample_weight=t.get("sample_weight"),
                residual=more,
                activation=activation if activate else None,
                negative_slope=0.2,
            )

        inputs = [tensors[name] for name in free]
        z = function(*inputs, activate=False)
        if activation not in ("relu", "leaky_relu") or z[z != 0].abs().min() > MARGIN:
            return function, tuple(t.requires_grad_() for t in inputs)
    raise AssertionError("every seed lies near a kink")


@pytest.mark.parametrize("choice", pairwise(CHOICES, meaningful), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_first_and_second_derivatives_are_finite_differences(choice: dict[str, Any]) -> None:
    function, inputs = problem(**choice)
    assert gradcheck(function, inputs)
    # The second derivative of what is piecewise linear is 0 in places, so gradgradcheck gets a random dy itself.
    assert gradgradcheck(function, inputs)


LAYERS: dict[str, tuple[type[bn.BatchNorm], tuple[int, ...]]] = {
    "1d": (bn.BatchNorm1d, (6, 2)),
    "2d": (bn.BatchNorm2d, (3, 2, 2, 2)),
    "3d": (bn.BatchNorm3d, (2, 2, 2, 1, 2)),
    "any": (bn.BatchNorm, (2, 2, 1, 2, 1, 2)),
}
LAYER_CHOICES = {
    "layer": tuple(LAYERS),
    "activation": ACTIVATIONS,
    "training": (True, False),
    "affine": (True, False),
    "residual": (True, False),
}


@pytest.mark.parametrize(
    "choice", pairwise(LAYER_CHOICES, lambda _: True), ids=lambda c: "-".join(str(v) for v in c.values())
)
def test_layers_pass_gradcheck(choice: dict[str, Any]) -> None:
    made_by, shape = LAYERS[choice["layer"]]
    layer = made_by(2, affine=choice["affine"], activation=choice["activation"], dtype=torch.float64)
    layer.train(choice["training"])
    layer.running_mean.copy_(torch.tensor([0.3, -0.2]))
    layer.running_var.copy_(torch.tensor([0.7, 1.9]))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, *([residual] if choice["residual"] else []), *layer.parameters())

    def function(x: Tensor, *others: Tensor) -> Tensor:
        y: Tensor = layer(x, residual=others[0] if choice["residual"] else None)
        return y

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid", "tanh", None, "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives_are_differences_of_the_reference(activation: str | None, training: bool) -> None:
    """torch's own are wrong here by a third. d²/dsdt of the reference's ∂(Σ c·y)/∂x·u along v and w."""
    r = np.random.default_rng(3)
    x0, c, u, v, w = (r.normal(size=(5, 2, 3)) for _ in range(5))
    weight, bias = r.normal(1.0, 0.3, 2), r.normal(size=2)
    population = None if training else reference.Population(np.array([0.2, -0.1]), np.array([0.8, 1.4]))
    name = activation or "identity"

    def first(x: reference.Array) -> float:
        grad = reference.batch_norm_backward(
            c, x, weight, bias, EPS, population=population, activation=name, negative_slope=0.2
        )
        return float((grad.dx * u).sum())

    def mixed(h: float) -> float:
        corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
        return sum(a * b * first(x0 + h * (a * v + b * w)) for a, b in corners) / (4 * h * h)

    # Richardson: the error of the one step cancels that of the other to fourth order.
    expected = (4 * mixed(5e-4) - mixed(1e-3)) / 3

    x = torch.from_numpy(x0).requires_grad_()
    running = (None, None) if population is None else tuple(torch.from_numpy(p) for p in population)
    parameters = torch.from_numpy(weight), torch.from_numpy(bias)
    y = batch_norm(x, *running, *parameters, training, eps=EPS, activation=activation, negative_slope=0.2)
    found = (y * torch.from_numpy(c)).sum()
    for direction in (u, v, w):
        if not found.requires_grad:
            found = torch.zeros((), dtype=torch.float64)  # a linear function's derivative does not depend on x
            break
        (grad,) = torch.autograd.grad(found, x, create_graph=True)
        found = (grad * torch.from_numpy(direction)).sum()
    scale = max(1.0, abs(expected))
    if training:
        assert abs(expected) > 0.1
    assert_close(
        found.detach().reshape(1), np.array([expected]), dtype="float64", quantity="difference", scale=10 * scale
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The textbook's formula in operations that autograd differentiates any number of times."""
    mean = x.mean((0, 2), keepdim=True)
    var = (x - mean).square().mean((0, 2), keepdim=True)
    return (x - mean) / (var + EPS).sqrt() * weight.view(1, -1, 1) + bias.view(1, -1, 1)


def test_derivatives_up_to_the_fifth_are_those_of_the_plain_formula() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    directions = [torch.randn(x.shape, dtype=torch.float64) for _ in range(6)]
    found = []
    for y in (batch_norm(x, None, None, weight, bias, True, eps=EPS), plain(x, weight, bias)):
        values = []
        loss = (y * directions[0]).sum()
        for direction in directions[1:]:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            values.append(grad.detach())
            loss = (grad * direction).sum()
        found.append(values)
    for ours, plains in zip(*found, strict=True):
        assert_close(ours, plains, dtype="float64", quantity="difference")


GRAPH_CASES = [
    Case(**row)
    for row in pairwise(
        {**FACTORS, "shape": ((7, 3), (5, 6, 7), (4, 3, 5, 5)), "values": ("normal", "constant channel")},
        allowed,
        seed=5,
    )
]


@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_with_create_graph_the_gradients_are_the_same(case: Case) -> None:
    inputs = inputs_of(case)
    expected = expected_of(inputs)
    tensors = {key: getattr(inputs, key) for key in ("x", "weight", "bias", "residual")}
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items() if t is not None}
    y = batch_norm(
        leaves["x"],
        inputs.running_mean.clone(),
        inputs.running_var.clone(),
        leaves.get("weight"),
        leaves.get("bias"),
        inputs.training,
        MOMENTUM,
        EPS,
        mask=inputs.mask,
        sample_weight=inputs.sample_weight,
        residual=leaves.get("residual"),
        activation=None if inputs.activation.name == "identity" else inputs.activation.name,
        negative_slope=inputs.activation.negative_slope,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy, create_graph=True)
    for key, grad in zip(leaves, grads, strict=True):
        expected.check(f"d{key}", grad, "create_graph")


def test_the_gradient_of_the_weights_is_a_finite_difference_of_the_reference() -> None:
    r = np.random.default_rng(1)
    x, dy, w = r.normal(size=(6, 2, 3)), r.normal(size=(6, 2, 3)), r.uniform(0.5, 2.0, 6)

    def loss(w: reference.Array) -> float:
        return float((dy * reference.batch_norm_forward(x, eps=EPS, sample_weight=w).y).sum())

    expected = np.array([(loss(w + h) - loss(w - h)) / 2e-5 for h in np.eye(6) * 1e-5])
    weights = torch.from_numpy(w).requires_grad_()
    y = batch_norm(torch.from_numpy(x), None, None, training=True, eps=EPS, sample_weight=weights)
    (found,) = torch.autograd.grad(y, weights, torch.from_numpy(dy))
    assert_close(found, expected, dtype="float64", quantity="difference", scale=10.0)


# What is kept


def kept_by(run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors that a forward keeps for backward, and its result."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return kept, y


def of_tensor_size(kept: list[Tensor], x: Tensor) -> set[int]:
    """Addresses of what is kept and larger than a few values a channel."""
    return {t.data_ptr() for t in kept if t.numel() > 4 * x.shape[1]}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 5, 5, requires_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_keeps_x_and_a_few_values_a_channel(
    activation: str | None, layout: torch.memory_format, x: Tensor
) -> None:
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    layer = bn.BatchNorm2d(3, activation=activation)
    kept, _ = kept_by(lambda: layer(x))
    assert of_tensor_size(kept, x) == {x.data_ptr()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_residual_costs_at_most_one_tensor_more(activation: str | None, x: Tensor) -> None:
    """None without an activation; the result, which the next layer keeps anyway, for a ReLU; else itself."""
    layer, residual = bn.BatchNorm2d(3, activation=activation), torch.randn(x.shape, requires_grad=True)
    kept, y = kept_by(lambda: layer(x, residual=residual))
    more = {None: set(), "relu": {y.data_ptr()}, "leaky_relu": {y.data_ptr()}}.get(activation, {residual.data_ptr()})
    assert of_tensor_size(kept, x) == {x.data_ptr()} | more


def test_frozen_inference_keeps_nothing_of_tensor_size(x: Tensor) -> None:
    layer = bn.BatchNorm2d(3).eval().requires_grad_(False)
    kept, _ = kept_by(lambda: layer(x))
    assert of_tensor_size(kept, x) == set()


def test_frozen_inference_with_relu_keeps_its_result_alone(x: Tensor) -> None:
    layer = bn.BatchNorm2d(3, activation="relu").eval().requires_grad_(False)
    kept, y = kept_by(lambda: layer(x))
    assert of_tensor_size(kept, x) == {y.data_ptr()}


def test_inference_keeps_x_where_the_weight_asks_for_it(x: Tensor) -> None:
    kept, _ = kept_by(lambda: bn.BatchNorm2d(3).eval()(x))
    assert of_tensor_size(kept, x) == {x.data_ptr()}
    with torch.no_grad():
        kept, y = kept_by(lambda: bn.BatchNorm2d(3)(x))
    assert kept == []
    assert not y.requires_grad


# What may not go wrong silently


def test_running_statistics_that_move_on_do_not_change_a_gradient(x: Tensor) -> None:
    layer = bn.BatchNorm2d(3).eval()
    dy = torch.randn(x.shape)
    (before,) = torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    layer.running_var.mul_(7.0)
    layer.running_mean.add_(1.0)
    (after,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(before, after)


def test_an_input_changed_in_place_is_an_error_and_a_result_that_is_not_kept_may_be(x: Tensor) -> None:
    layer = bn.BatchNorm2d(3, activation="relu")
    changed = x * 1.0
    y = layer(changed)
    changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(x.shape))

    dy = torch.randn(x.shape)
    (plain_grad,) = torch.autograd.grad(layer(x) * 2.0, x, dy)
    (inplace_grad,) = torch.autograd.grad(layer(x).mul_(2.0), x, dy)
    assert torch.equal(plain_grad, inplace_grad)

    y = layer(x, residual=torch.randn(x.shape))
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_a_second_backward_needs_the_graph(x: Tensor) -> None:
    y = bn.BatchNorm2d(3)(x)
    dy = torch.randn(x.shape)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, dy)


def test_running_statistics_hold_no_graph(x: Tensor) -> None:
    layer = bn.BatchNorm2d(3)
    layer(x * 1.0)
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None
    assert layer.running_var.grad_fn is None


def test_scaling_the_weights_before_it_changes_nothing_but_their_own_gradient() -> None:
    """Section 3.3: BN((aW)u) = BN(Wu), ∂BN/∂u is the same and ∂BN/∂(aW) = (1/a) ∂BN/∂W. (With eps small beside it.)"""
    u = torch.randn(32, 6, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 6, dtype=torch.float64)
    dy = torch.randn(32, 4, dtype=torch.float64)
    layer = bn.BatchNorm1d(4, eps=1e-30, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    results = []
    for a in (1.0, 37.5):
        scaled = (a * matrix).requires_grad_()
        y = layer(u @ scaled.T)
        results.append((y.detach(), *torch.autograd.grad(y, (u, scaled), dy)))
    for name, ours, theirs in zip(("y", "dx", "dx"), results[1], results[0], strict=True):
        factor = 37.5 if ours.shape == matrix.shape else 1.0
        assert_close(ours * factor, to_float64(theirs), dtype="float64", quantity=name, scale=10 * theirs.abs().max())
