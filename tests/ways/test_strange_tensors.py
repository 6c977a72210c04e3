"""Tensors that are no plain strided memory: they give what they give with torch's layer, and never end the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.functional import batch_norm
from ways.common import activations, agree, both_modes, data, in_a_fork, pair, same
from ways.wrappers import Logging, Plain, Wrapper

way = pytest.mark.way
WHERE = "strange tensors"
X, OTHER, DY = data(), data(seed=2), data(seed=3)


def negated(x: Tensor) -> Tensor:
    """The same values behind torch's lazy negation, which shows in ``is_neg`` only."""
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg()
    assert torch.equal(found, x)
    return found


def bare(t: Any) -> Any:
    """The result as a plain tensor."""
    if isinstance(t, (Wrapper, Logging)):
        return t.inner
    if isinstance(t, Tensor) and t.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return t.to_dense()
    return t.detach().as_subclass(Tensor) if isinstance(t, Tensor) else t


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "plain subclass": lambda t: t.clone().as_subclass(Plain),
    "wrapper": lambda t: Wrapper(t.clone()),
    "logging": lambda t: Logging(t.clone()),
    "conj().imag": negated,
    "_neg_view": lambda t: torch._neg_view(-t),
    "imag of conj, sliced": lambda t: negated(torch.stack((t, t)))[1],
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "expanded": lambda t: t.flatten()[:1].expand(t.shape),
}
made = pytest.mark.parametrize("kind", MADE)


@way(WHERE, "a subclass in name only, as input", "works, the type survives")
@way(WHERE, "`_make_wrapper_subclass`, as input", "works, the wrapper sees `aten` operations")
@way(WHERE, "a `__torch_dispatch__` subclass with memory of its own, as input", "works")
@way(WHERE, "conjugate and negative views (`z.conj().imag`), as input", "work")
@way(WHERE, "ZeroTensor, as input", "works")
@both_modes
@activations
@made
@in_a_fork
def test_as_input(kind: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.no_grad():
            y = layer(MADE[kind](X))
        return type(y).__name__, bare(y)

    agree(scenario, activation, training=training)


@way(WHERE, "any of these, as input that requires grad", "works, forward and backward")
@both_modes
@activations
@made
@in_a_fork
def test_as_input_with_gradients(kind: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        x = MADE[kind](X).detach().requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], DY if type(y) is Tensor else MADE[kind](DY))
        return type(y).__name__, bare(y), [bare(g) for g in gradients]

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "any of these, as the gradient that arrives", "works")
@both_modes
@activations
@made
@in_a_fork
def test_as_gradient(kind: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        x = X.clone().requires_grad_()
        return [bare(g) for g in torch.autograd.grad(layer(x), [x, *layer.parameters()], MADE[kind](DY))]

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "any of these, as weight or bias", "works, never ignored")
@both_modes
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("requires_grad", [True, False])
@made
@in_a_fork
def test_as_parameter(kind: str, requires_grad: bool, name: str, training: bool) -> None:
    values = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)

    def scenario(layer: nn.Module) -> Any:
        norm: Any = layer[0]  # type: ignore[index]
        p = MADE[kind](values)
        p = nn.Parameter(p, requires_grad) if type(p) in (Wrapper, Plain, Logging) else p.requires_grad_(requires_grad)
        delattr(norm, name)
        setattr(norm, name, p)
        x = X.clone().requires_grad_()
        y = norm(x)
        found = torch.autograd.grad(
            y, [x, *([p] if requires_grad else [])], DY if type(y) is Tensor else MADE[kind](DY)
        )
        delattr(norm, name)
        setattr(norm, name, nn.Parameter(values))
        return bare(y), [bare(g) for g in found]

    agree(scenario, None, "dx", training=training)


@way(WHERE, "any of these, as running statistics", "works as torch's, or raises with torch")
@both_modes
@made
@in_a_fork
def test_as_running_statistics(kind: str, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        norm: Any = layer[0]  # type: ignore[index]
        mean, var = (MADE[kind](t) for t in (torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 1.0, 0.5])))
        norm.running_mean, norm.running_var = mean.double(), var.double()
        y = bare(norm(X))
        found = bare(norm.running_mean), bare(norm.running_var)
        norm.running_mean, norm.running_var = torch.zeros(3).double(), torch.ones(3).double()
        return y.detach(), found

    if kind == "expanded" and training:
        pytest.skip("torch writes each channel into the one place that they share")
    agree(scenario, None, training=training)


@way(WHERE, "any of these, as `residual=` and `mask=`", "works")
@both_modes
@made
@in_a_fork
def test_as_residual(kind: str, training: bool) -> None:
    ours, torchs = pair("relu", training=training)
    residual = MADE[kind](OTHER)
    expected = torch.relu(torchs[0](X) + bare(residual)).detach()
    same(bare(ours[0](X, residual=residual)), expected)


@way(WHERE, "a mask that is a wrapper or a subclass", "works")
@both_modes
@pytest.mark.parametrize("kind", ["plain subclass", "wrapper", "logging"])
@in_a_fork
def test_as_mask(kind: str, training: bool) -> None:
    layer, twin = (pair("relu", training=training)[0][0] for _ in range(2))
    mask = torch.arange(X[:, :1].numel()).view_as(X[:, :1]) % 3 != 0
    same(bare(layer(X, mask=MADE[kind](mask))), twin(X, mask=mask).detach())


@way(WHERE, "`_make_wrapper_subclass`, as input", "works, the wrapper sees `aten` operations")
@both_modes
@in_a_fork
def test_a_wrapper_sees_standard_operations(training: bool) -> None:
    layer = pair("relu", training=training)[0]
    for kind in (Wrapper, Logging):
        kind.seen.clear()
        with torch.no_grad():
            layer(MADE[kind.__name__.lower()](X))
        assert kind.seen
        assert all(name.startswith("aten.") for name in kind.seen), kind.seen


@way(
    WHERE, '`torch.set_default_device("meta")`, `with torch.device("meta")` around calls', "CPU tensors work as before"
)
@both_modes
@activations
@pytest.mark.parametrize("how", ["default", "context"])
@in_a_fork
def test_another_default_device(how: str, activation: str | None, training: bool) -> None:
    ours, torchs = pair(activation, training=training)
    mask = torch.arange(X[:, :1].numel()).view_as(X[:, :1]) % 3 != 0
    masked = pair(activation, training=training)[0][0](X, mask=mask).detach()
    again = pair(activation, training=training)[0][0]

    def step_of(layer: nn.Module) -> list[Tensor]:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], DY)]

    if how == "default":
        torch.set_default_device("meta")
        context: Any = contextlib.nullcontext()
    else:
        context = torch.device("meta")
    with context:
        got, expected = step_of(ours), step_of(torchs)
        got_masked = again(X, mask=mask)
        # What a meta call may leave behind must not reach the next call.
        fresh = bn.BatchNorm2d(3, activation=activation)
        y = fresh(torch.empty(4, 3, 5, 2))
        assert (y.device.type, y.shape) == ("meta", (4, 3, 5, 2))
        more = step_of(ours), step_of(torchs)
    torch.set_default_device("cpu")
    same(got, expected, "dx")
    same(got_masked.detach(), masked)
    same(*more, "dx")
    same(step_of(ours), step_of(torchs), "dx")


@way(WHERE, "meta tensors", "work, forward and backward")
@both_modes
@activations
@in_a_fork
def test_meta_tensors(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        x = torch.empty(4, 3, 5, 2, dtype=torch.float64, device="meta").requires_grad_()
        y = layer.to("meta")(x)
        given = [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))]
        return [(str(t.device), t.shape, t.stride(), t.dtype) for t in given]

    ours, torchs = pair(activation, training=training)
    assert scenario(ours) == scenario(torchs)


@way(WHERE, "mkldnn tensors", "as torch's layer: eval works, the result is an mkldnn tensor")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without mkldnn")
@both_modes
@activations
@in_a_fork
def test_mkldnn_tensors(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.no_grad():
            y = layer(X.float().to_mkldnn())
        return str(y.layout), y.to_dense()

    agree(scenario, activation, training=training, dtype=torch.float32)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: X.to_sparse(),
    "sparse csr": lambda: X[:, :, 0, 0].to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8),
    "complex": lambda: torch.complex(X, X),
    "integers": lambda: X.long(),
    "bool": lambda: X > 0,
    "nested": lambda: torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged),
    "no dimensions": lambda: X[0, 0, 0, 0],
}


@way(WHERE, "sparse, quantized, nested, complex and integer tensors", "an error, as with torch's layer")
@pytest.mark.filterwarnings("ignore")
@both_modes
@pytest.mark.parametrize("kind", LAYOUTS)
@in_a_fork
def test_what_torch_refuses_is_refused(kind: str, training: bool) -> None:
    x = LAYOUTS[kind]()
    buffers = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for function in (nn.functional.batch_norm, batch_norm):
        with pytest.raises(Exception):  # noqa: B017 - of whatever kind, as torch's own
            function(x, *buffers, training=training)
