"""``torch.func``: derivatives, vmap and functional calls over a layer give what they give over torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from batchnorm.errors import BatchNormError
from ways.common import activations, agree, both_modes, data, more, pair, same

way = pytest.mark.way
WHERE = "torch.func and vectorized derivatives"

X = data()
MANY = data(5, *X.shape, seed=2)
DX = data(seed=3)
SMALL = data(3, 2, 2)

State = dict[str, Tensor]


def state(layer: nn.Module) -> tuple[State, State]:
    return (
        {name: p.detach().clone() for name, p in layer.named_parameters()},
        {name: b.clone() for name, b in layer.named_buffers()},
    )


def loss(parameters: State, buffers: State, x: Tensor, layer: nn.Module) -> Tensor:
    y: Tensor = functional_call(layer, (parameters, buffers), (x,))
    return (y.pow(3) * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def value(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def of(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return (y.pow(3) * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()

    return of


# Layers that update no buffers can be captured: in eval, and without running statistics.
CAPTURED: dict[str, dict[str, Any]] = {
    "eval": {"training": False},
    "untracked": {"training": True, "track_running_stats": False},
}
captured = pytest.mark.parametrize("options", CAPTURED.values(), ids=CAPTURED)
second_order = pytest.mark.parametrize("activation", [None, "silu", *more("relu", "tanh")])


@way(WHERE, "`grad` over a layer", "works")
@captured
@activations
def test_grad(activation: str | None, options: dict[str, Any]) -> None:
    agree(lambda layer: grad(value(layer))(X), activation, "dx", **options)


@way(WHERE, "`vjp`, `jacrev`, `jacfwd`", "work")
@captured
@activations
def test_jacobians(activation: str | None, options: dict[str, Any]) -> None:
    agree(lambda layer: vjp(layer, X)[1](DX), activation, "dx", **options)
    agree(lambda layer: [jacrev(layer)(X), jacfwd(layer)(X)], activation, "dx", **options)


@way(WHERE, "`jvp`", "works")
@captured
@activations
def test_jvp(activation: str | None, options: dict[str, Any]) -> None:
    agree(lambda layer: jvp(layer, (X,), (DX,)), activation, "dx", **options)


@way(WHERE, "`hessian`, `grad` of `grad`", "work")
@captured
@second_order
def test_hessian(activation: str | None, options: dict[str, Any]) -> None:
    small = {"rank": 1, "channels": 2, **options}
    agree(lambda layer: hessian(value(layer))(SMALL), activation, "difference", **small)
    agree(lambda layer: grad(lambda x: grad(value(layer))(x).pow(2).sum())(SMALL), activation, "difference", **small)


@way(WHERE, "`linearize`", "works")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@captured
@activations
def test_linearize(activation: str | None, options: dict[str, Any]) -> None:
    def scenario(layer: nn.Module) -> Any:
        y, tangent = linearize(layer, X)
        return y, tangent(DX)

    agree(scenario, activation, "dx", **options)


@way(WHERE, "`functionalize`", "works, running statistics are updated")
@both_modes
@activations
def test_functionalize(activation: str | None, training: bool) -> None:
    agree(lambda layer: functionalize(layer)(X), activation, training=training)


@way(WHERE, "`functional_call`", "works")
@both_modes
@activations
def test_functional_call_with_plain_tensors(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = state(layer)
        leaf = X.clone().requires_grad_()
        y = functional_call(layer, (parameters, buffers), (leaf,))
        return y, torch.autograd.grad(y, leaf, DX), buffers

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`grad` in training, buffers passed by `functional_call`", "works, the buffers passed are updated")
@both_modes
@activations
def test_gradients_of_parameters_beside_buffers(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = state(layer)
        return grad(loss, argnums=(0, 2))(parameters, buffers, X, layer), buffers

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`jvp`, `jacfwd` in training, buffers copied inside the function", "work")
@both_modes
@activations
def test_forward_mode_beside_buffers(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = state(layer)

        def of(p: State, x: Tensor) -> Tensor:
            own = {name: b.clone() for name, b in buffers.items()}
            y: Tensor = functional_call(layer, (p, own), (x,))
            return y

        tangents = ({name: torch.ones_like(p) for name, p in parameters.items()}, DX)
        return jvp(of, (parameters, X), tangents), jacfwd(of, argnums=1)(parameters, X), buffers

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`vmap` over inputs", "works")
@captured
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap(in_dim: int, options: dict[str, Any]) -> None:
    for activation in (None, "relu", "gelu"):
        agree(lambda layer: vmap(layer, in_dims=in_dim)(MANY.movedim(0, in_dim)), activation, **options)


@way(WHERE, "`vmap` of a training layer with buffers for each", "works, each has its own statistics")
@activations
def test_vmap_with_buffers_for_each(activation: str | None) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = state(layer)
        each = {name: torch.stack([b] * len(MANY)) for name, b in buffers.items()}

        def of(b: State, x: Tensor) -> tuple[Tensor, State]:
            return functional_call(layer, (parameters, b), (x,)), b

        return vmap(of)(each, MANY)

    agree(scenario, activation)


@way(WHERE, "gradients per sample: `vmap` of `grad`", "works")
@captured
@activations
def test_gradients_per_sample(activation: str | None, options: dict[str, Any]) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = state(layer)
        return vmap(grad(loss), in_dims=(None, None, 0, None))(parameters, buffers, MANY, layer)

    agree(scenario, activation, "dx", **options)


@way(WHERE, "ensembles by `stack_module_state`", "work, each model has its own statistics")
@both_modes
@activations
def test_an_ensemble(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        models = [copy.deepcopy(layer) for _ in range(5)]
        for i, model in enumerate(models):
            with torch.no_grad():
                model[0].weight.add_(i)  # type: ignore[index]
        parameters, buffers = stack_module_state(models)
        base = copy.deepcopy(layer).to("meta")

        def of(p: State, b: State, x: Tensor) -> Tensor:
            y: Tensor = functional_call(base, (p, b), (x,))
            return y

        shared = vmap(of, in_dims=(0, 0, None))(parameters, buffers, X)
        own = vmap(of)(parameters, buffers, MANY)
        gradients = torch.autograd.grad((own * MANY).sum(), list(parameters.values()))
        return shared, own, gradients, buffers

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`torch.autograd.grad(…, is_grads_batched=True)`", "works")
@both_modes
@activations
def test_batched_gradients(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        inputs = [leaf, *layer.parameters()]
        return torch.autograd.grad(y, inputs, data(7, *X.shape, seed=9), is_grads_batched=True)

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`torch.compile` over `vmap` and `grad`", "works")
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_compiled_transforms(transform: str) -> None:
    def scenario(layer: nn.Module) -> Any:
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = functional_call(layer, {**state, **p}, (x,))
            return (y * data(seed=5)).sum()

        function: Callable[..., Any] = vmap(layer) if transform == "vmap" else grad(loss, argnums=(0, 1))
        given = (torch.stack((X, 2 * X)),) if transform == "vmap" else (dict(layer.named_parameters()), X)
        torch._dynamo.reset()
        found = torch.compile(function, backend="aot_eager")(*given)
        torch._dynamo.reset()
        return found.detach() if transform == "vmap" else [*found[0].values(), found[1]]

    agree(scenario, "relu", "dx", training=False)


@way(WHERE, "`is_grads_batched=True` with a mask, sample weights or a residual", "works")
@both_modes
@pytest.mark.parametrize("extra", ["mask", "sample_weight", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_batched_gradients_with_extras(activation: str | None, extra: str, training: bool) -> None:
    """Each row is the gradient of one vector alone."""
    layer = pair(activation, training=training)[0][0]
    given = {"mask": X[:, 0] > -1, "sample_weight": X[:, 0, 0, 0].abs() + 0.5, "residual": data(seed=4)}[extra]
    leaf = X.clone().requires_grad_()
    y = layer(leaf, **{extra: given})
    vectors, inputs = data(3, *X.shape, seed=9), [leaf, *layer.parameters()]
    batched = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in vectors]
    same(list(batched), [torch.stack(rows) for rows in zip(*single, strict=True)], "dx")


@way(WHERE, "`jacobian(…, vectorize=True)`, reverse and forward mode", "works")
@both_modes
@activations
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(strategy: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        return jacobian(layer, SMALL, vectorize=True, strategy=strategy)

    agree(scenario, activation, "dx", training=training, rank=1, channels=2)


@way(WHERE, "`hessian(…, vectorize=True)`", "works")
@both_modes
@second_order
def test_vectorized_hessian(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        return torch.autograd.functional.hessian(value(layer), SMALL, vectorize=True)

    agree(scenario, activation, "difference", training=training, rank=1, channels=2)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda layer: grad(value(layer))(X),
    "vjp": lambda layer: vjp(layer, X),
    "jvp": lambda layer: jvp(layer, (X,), (DX,)),
    "jacrev": lambda layer: jacrev(layer)(X),
    "jacfwd": lambda layer: jacfwd(layer)(X),
    "hessian": lambda layer: hessian(value(layer))(X),
    "vmap": lambda layer: vmap(layer)(MANY),
    "vmap of grad": lambda layer: vmap(grad(value(layer)))(MANY),
}


@way(WHERE, "a training layer whose buffers are captured", "one sentence names `functional_call`; torch raises too")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_captured_running_statistics_are_refused_in_one_sentence(transform: str, activation: str | None) -> None:
    ours, torchs = pair(activation)
    with pytest.raises(RuntimeError):
        TRANSFORMS[transform](torchs)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(BatchNormError) as caught:
        TRANSFORMS[transform](ours)
    assert "functional_call" in str(caught.value)
    assert "\n" not in str(caught.value)
    same(dict(ours.state_dict()), before)
    # The layer is as good as before.
    same(ours(X), pair(activation)[1](X))


@way(WHERE, "`mask=`, `sample_weight=`, `residual=` under `grad` and `vmap`", "work")
@both_modes
def test_what_torch_has_no_argument_for(training: bool) -> None:
    layer = pair("relu", training=training, track_running_stats=not training)[0][0]
    mask = torch.arange(X.numel()).view_as(X)[:, :1] % 3 != 0
    weights = torch.rand(len(X), dtype=torch.float64) + 0.5
    residual = data(seed=5)

    def of(x: Tensor) -> Tensor:
        y: Tensor = layer(x, mask=mask, sample_weight=weights, residual=residual)
        return (y * DX).sum()

    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of(leaf), leaf)
    same(grad(of)(X), expected, "dx")
    each = [layer(x, mask=mask, sample_weight=weights, residual=residual).detach() for x in MANY]
    got = vmap(lambda x: layer(x, mask=mask, sample_weight=weights, residual=residual))(MANY)
    same(got.detach(), torch.stack(each))
