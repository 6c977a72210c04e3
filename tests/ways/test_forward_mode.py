"""Forward-mode automatic differentiation through the layer, with and without parameters that require grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ways.common import activations, agree, both_modes, data, pair, same

way = pytest.mark.way
WHERE = "forward-mode automatic differentiation"
X, DX = data(), data(seed=3)


def tangent(y: Tensor) -> Tensor:
    found = forward_ad.unpack_dual(y).tangent
    assert found is not None, "the tangent was dropped"
    return found


@way(WHERE, "a dual input, parameters that require grad or do not, also under `no_grad`", "works")
@both_modes
@activations
@pytest.mark.parametrize("how", ["parameters require grad", "parameters do not", "no_grad"])
def test_a_tangent_of_the_input(how: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        layer.requires_grad_(how == "parameters require grad")
        with torch.set_grad_enabled(how != "no_grad"), forward_ad.dual_level():
            y = layer(forward_ad.make_dual(X, DX))
            return forward_ad.unpack_dual(y).primal, tangent(y)

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "a dual weight or bias beside a plain input", "works")
@both_modes
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_tangent_of_a_parameter(activation: str | None, name: str, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        norm: Any = layer[0]  # type: ignore[index]
        p = getattr(norm, name).detach()
        delattr(norm, name)
        with forward_ad.dual_level():
            setattr(norm, name, forward_ad.make_dual(p, torch.tensor([1.0, -2.0, 0.5], dtype=p.dtype)))
            found = tangent(layer(X)).clone()
        delattr(norm, name)
        norm.register_parameter(name, nn.Parameter(p))
        return found

    agree(scenario, activation, "dx", training=training)


def written_out(norm: Any, x: Tensor, training: bool) -> Tensor:
    """The layer in elementary operations."""
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    if training:
        mean = x.mean((0, 2, 3), keepdim=True)
        var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y: Tensor = (x - mean) / torch.sqrt(var + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y


@way(WHERE, "the gradient of a tangent (forward over reverse)", "right; with torch's layer in training: wrong")
@both_modes
@activations
def test_the_gradient_of_a_tangent(activation: str | None, training: bool) -> None:
    # torch's own gradient of a tangent is wrong in training, so the formula itself is the yardstick.
    ours, torchs = pair(activation, training=training)
    found = []
    for layer in (ours, lambda x: torchs[1](written_out(torchs[0], x, training))):
        leaf, parameters = X.clone().requires_grad_(), (ours if layer is ours else torchs).parameters()
        with forward_ad.dual_level():
            total = tangent(layer(forward_ad.make_dual(leaf, DX))).pow(2).sum()
            wanted = [leaf, *parameters]
            found.append(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    same(found[0], found[1], "difference")


@way(WHERE, "the tangent of a gradient (reverse over forward)", "works")
@both_modes
@activations
def test_the_tangent_of_a_gradient(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        with forward_ad.dual_level():
            y = layer(leaf)
            (dx,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(data(seed=8), DX), create_graph=True)
            return tangent(dx)

    agree(scenario, activation, "difference", training=training)


@way(WHERE, "a dual residual", "works")
@both_modes
def test_a_tangent_of_the_residual(training: bool) -> None:
    ours, torchs = pair("relu", training=training)
    residual = data(seed=6)
    with forward_ad.dual_level():
        got = tangent(ours[0](X, residual=forward_ad.make_dual(residual, DX)))
        expected = tangent(torch.relu(torchs[0](X) + forward_ad.make_dual(residual, DX)))
    same(got, expected, "dx")


@way(WHERE, "`gradcheck` with `check_forward_ad`, `check_batched_grad`, `gradgradcheck`", "pass")
@both_modes
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_in_both_directions(activation: str | None, training: bool) -> None:
    layer = pair(activation, training=training, rank=1, channels=2, momentum=0.0)[0]
    x = data(3, 2, 2).requires_grad_()
    torch.autograd.gradcheck(
        layer, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    torch.autograd.gradgradcheck(layer, (x,), check_batched_grad=True, check_fwd_over_rev=True)
