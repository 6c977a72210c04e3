"""``batch_norm_with_statistics``: new running statistics as results, inside function transforms too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

import batchnorm as bn
from batchnorm.errors import AutogradError
from batchnorm.functional import batch_norm, batch_norm_with_statistics
from batchnorm.kernels import use_backend


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, mean, var, weight, bias and dy."""
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(6, 3, 4, generator=draw, dtype=dtype) for _ in range(2))
    mean, bias = (torch.randn(3, generator=draw, dtype=dtype) for _ in range(2))
    var, weight = (torch.rand(3, generator=draw, dtype=dtype) + 0.5 for _ in range(2))
    return x, mean, var, weight, bias, dy


@pytest.mark.parametrize("backend", ["cpu", "eager", "composite"])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("extras", [False, True])
def test_it_gives_what_batch_norm_gives_and_writes(backend: str, momentum: float, extras: bool) -> None:
    x, mean, var, weight, bias, dy = problem(torch.float32)
    options: dict[str, Any] = {}
    if extras:
        mask = torch.rand(6, 4) > 0.3
        options = {"mask": mask, "sample_weight": torch.rand(6) + 0.5, "residual": dy, "activation": "relu"}
    before = mean.clone(), var.clone()
    with use_backend(backend):
        y, new_mean, new_var = batch_norm_with_statistics(x, mean, var, weight, bias, momentum, **options)
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        expected = batch_norm(x, mean, var, weight, bias, True, momentum, **options)
    assert torch.equal(y, expected)
    assert (new_mean.dtype, new_var.dtype) == (mean.dtype, var.dtype)
    torch.testing.assert_close(new_mean, mean, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(new_var, var, rtol=3e-7, atol=3e-7)


def by_autograd(wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient and the new statistics, without transforms."""
    x, mean, var, weight, bias, dy = problem()
    inputs = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    y = batch_norm(x, mean, var, weight, bias, True, 0.2)
    return torch.autograd.grad(y, inputs[wanted], dy)[0], mean, var


def test_grad_with_the_statistics_as_aux() -> None:
    x, mean, var, weight, bias, dy = problem()

    def loss(weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, *statistics = batch_norm_with_statistics(x, mean, var, weight, bias, 0.2)
        return (y * dy).sum(), tuple(statistics)

    found, statistics = grad(loss, has_aux=True)(weight)
    expected = by_autograd("weight")
    torch.testing.assert_close([found, *statistics], list(expected))


def test_vjp_and_jvp() -> None:
    x, mean, var, weight, bias, dy = problem()

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, *statistics = batch_norm_with_statistics(x, mean, var, weight, bias, 0.2)
        return y, tuple(statistics)

    _, pull, statistics = vjp(forward, x, has_aux=True)
    dx, *expected = by_autograd("x")
    torch.testing.assert_close(pull(dy)[0], dx)
    torch.testing.assert_close(list(statistics), expected)
    direction = torch.randn_like(x)
    _, tangent, statistics = jvp(forward, (x,), (direction,), has_aux=True)
    torch.testing.assert_close((tangent * dy).sum(), (dx * direction).sum())
    torch.testing.assert_close(list(statistics), expected)


@pytest.mark.parametrize("models", [False, True])
def test_under_vmap_each_example_has_statistics_of_its_own(models: bool) -> None:
    """A stack of batches on one model, and an ensemble of models."""
    _, mean, var, weight, bias, _ = problem()
    x = torch.randn(5, 6, 3, 4, dtype=torch.float64)
    state = [mean, var, weight, bias]
    if models:
        state = [torch.stack([t + 0.1 * i for i in range(5)]) for t in state]
    found = vmap(batch_norm_with_statistics, in_dims=(0, *([0 if models else None] * 4)))(x, *state)
    for i in range(5):
        one = batch_norm_with_statistics(x[i], *(t[i] if models else t for t in state))
        torch.testing.assert_close([t[i] for t in found], list(one))


def test_gradients_of_a_whole_ensemble() -> None:
    """vmap over grad, as people train ensembles: statistics go around as state."""
    _, mean, var, weight, bias, dy = problem()
    x = torch.randn(5, 6, 3, 4, dtype=torch.float64)
    weights = torch.stack([weight + 0.1 * i for i in range(5)])

    def loss(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, new_mean, _ = batch_norm_with_statistics(x, mean, var, weight, bias, 0.2)
        return (y * dy).sum(), new_mean

    found, means = vmap(grad(loss, has_aux=True))(weights, x)
    for i in range(5):
        one, new_mean = grad(loss, has_aux=True)(weights[i], x[i])
        torch.testing.assert_close([found[i], means[i]], [one, new_mean])


def test_the_statistics_carry_no_graph_and_an_empty_batch_changes_none() -> None:
    x, mean, var, weight, bias, _ = problem()
    y, new_mean, new_var = batch_norm_with_statistics(x.requires_grad_(), mean, var, weight.requires_grad_(), bias)
    assert (y.requires_grad, new_mean.requires_grad, new_var.requires_grad) == (True, False, False)
    _, same_mean, same_var = batch_norm_with_statistics(x[:0], mean, var)
    assert torch.equal(same_mean, mean)
    assert torch.equal(same_var, var)


def test_a_layers_error_inside_a_transform_names_it() -> None:
    layer = bn.BatchNorm1d(3).double()
    x = problem()[0]
    with pytest.raises(AutogradError) as caught:
        vmap(layer)(torch.stack([x, x]))
    assert str(caught.value) == (
        "batch_norm: expected running statistics that were passed into the function transform, got captured ones, "
        "which it cannot write. Pass the buffers into the transformed function and use torch.func.functional_call, "
        "call functional.batch_norm_with_statistics, which returns the new ones, or normalize by running statistics "
        "with eval()."
    )
    assert layer.num_batches_tracked == 0
    # What it says works.
    buffers = {name: torch.stack([t, t]) for name, t in layer.named_buffers()}

    def call(buffers: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional_call(layer, buffers, (x,))
        return y, buffers["num_batches_tracked"]

    y, _ = vmap(call)(buffers, torch.stack([x, x + 1]))
    torch.testing.assert_close(y[0], y[1])


def test_a_single_value_a_channel_is_refused_as_ever() -> None:
    with pytest.raises(ValueError) as caught:
        batch_norm_with_statistics(torch.randn(1, 3), torch.zeros(3), torch.ones(3))
    assert str(caught.value) == (
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])"
    )


@pytest.mark.slow
def test_compiled() -> None:
    x, mean, var, weight, bias, _ = problem()
    compiled = torch.compile(batch_norm_with_statistics, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        list(compiled(x, mean, var, weight, bias)), list(batch_norm_with_statistics(x, mean, var, weight, bias))
    )
