"""Tracers record the layer as operations that every tool of PyTorch knows, and give what the layer gives."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm as bn
from ways.common import MORE, activations, agree, alone, both_modes, data, more, pair, same, step

way = pytest.mark.way
JIT, FX, COMPILE = "TorchScript", "torch.fx", "torch.compile"
X, OTHER, DX = data(), data(seed=2), data(seed=3)
silent_jit = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def network(norm: nn.Module) -> nn.Sequential:
    """A convolution in front of the layer, with fixed weights."""
    convolution = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        for p in convolution.parameters():
            p.copy_(torch.linspace(-0.3, 0.4, p.numel(), dtype=p.dtype).view_as(p))
    return nn.Sequential(convolution, norm).train(norm.training)


@way(JIT, "`torch.jit.trace`, with and without grad, in training and eval", "works; running statistics are updated")
@silent_jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own checks of sizes give it
@both_modes
@activations
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(grad: bool, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(layer, X, check_trace=not training)
            return step(traced, OTHER, DX) if grad else traced(OTHER)

    agree(scenario, activation, "dx", training=training)


@way(
    JIT, "a traced model, saved and loaded in a process that never imports `batchnorm`", "works; its graph is `aten`'s"
)
@silent_jit
@activations
def test_a_traced_model_needs_no_batchnorm(activation: str | None, tmp_path: Path) -> None:
    ours, torchs = pair(activation, training=False)
    with torch.no_grad():
        traced = torch.jit.trace(network(ours), X)
    graph = str(traced.inlined_graph)
    assert "aten::batch_norm" in graph
    assert "batchnorm::" not in graph
    torch.jit.save(traced, str(tmp_path / "model.pt"))
    torch.save((X, network(torchs)(X).detach()), tmp_path / "data.pt")
    code = f"""
    model = torch.jit.load({str(tmp_path / "model.pt")!r})
    x, y = torch.load({str(tmp_path / "data.pt")!r})
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-12, atol=1e-12)
    assert "batchnorm" not in sys.modules
    """
    alone(code, library=False)


@way(JIT, "`torch.jit.freeze` after `trace`", "folds the layer into the convolution, as torch's")
@silent_jit
@pytest.mark.parametrize("which", ["ours", "torch"])
def test_freezing_folds_the_layer_into_a_convolution(which: str) -> None:
    net = network(pair("relu", training=False)[which == "torch"]).eval()
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(net, X))
        assert "batch_norm" not in str(frozen.graph)
        same(frozen(OTHER), net(OTHER))


@way(JIT, "`torch.jit.script`, with activation and residual, saved and loaded", "works")
@silent_jit
@both_modes
@activations
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        *(pytest.param(o, marks=MORE) for o in ({"affine": False}, {"track_running_stats": False})),
    ],
    ids=str,
)
def test_jit_script(options: dict[str, Any], activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        scripted = torch.jit.script(layer)
        given = step(scripted, OTHER, DX)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        return given, torch.jit.load(buffer)(X).detach(), scripted(X).detach()

    agree(scenario, activation, "dx", training=training, **options)


@way(JIT, "a model after `torch.jit.script`", "is as it was, down to the type of each layer")
@silent_jit
def test_scripting_leaves_the_model_alone() -> None:
    # torch puts what __prepare_scriptable__ gives into the model that is scripted.
    net = pair("relu")[0]
    kind, keys = type(net[0]), list(net.state_dict())
    torch.jit.script(net)
    assert type(net[0]) is kind
    assert list(net.state_dict()) == keys
    same(step(net, X, DX), step(pair("relu")[1], X, DX), "dx")


@way(JIT, "`torch.jit.script`, with activation and residual, saved and loaded", "works")
@silent_jit
@both_modes
def test_jit_script_with_a_residual(training: bool) -> None:
    ours, torchs = pair("relu", training=training)
    scripted = torch.jit.script(ours[0])
    same(scripted(X, residual=OTHER).detach(), torch.relu(torchs[0](X) + OTHER).detach())


@way(FX, "`torch.fx.symbolic_trace`", "the layer is one `call_module` leaf; its hooks run once")
@both_modes
@activations
def test_symbolic_trace(activation: str | None, training: bool) -> None:
    ours, torchs = (network(layer[0]) for layer in pair(activation, training=training))
    calls: list[str] = []
    ours[1].register_forward_hook(lambda *_: calls.append("after"))
    ours[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    graphs: list[GraphModule] = [symbolic_trace(net) for net in (ours, torchs)]
    assert calls in ([], ["before", "after"])  # torch's tracer goes through __call__ of a leaf as well, or does not
    nodes = [[(node.op, str(node.target)) for node in g.graph.nodes if node.op != "output"] for g in graphs]
    assert nodes[0] == nodes[1]
    assert nodes[0][2] == ("call_module", "1")
    calls.clear()
    got = graphs[0](X)
    assert calls == ["before", "after"]
    expected = graphs[1](X)
    same(got.detach(), nn.Sequential(pair(activation)[1][1])(expected).detach())
    same(dict(ours.state_dict()), dict(torchs.state_dict()))


@way(FX, "`torch.fx.symbolic_trace` with `residual=`, `mask=`", "the leaf takes them")
@both_modes
def test_symbolic_trace_with_keywords(training: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pair("relu", training=training)[0][0]

        def forward(self, x: Tensor, r: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.norm(x, residual=r, mask=mask)
            return y

    block = Block().train(training)
    mask = torch.arange(X[:, :1].numel()).view_as(X[:, :1]) % 3 != 0
    graph = symbolic_trace(copy.deepcopy(block))
    assert [node.op for node in graph.graph.nodes] == [*["placeholder"] * 3, "call_module", "output"]
    same(graph(X, OTHER, mask).detach(), block(X, OTHER, mask).detach())
    same(dict(graph.state_dict()), dict(block.state_dict()))


@way(FX, "`torch.fx.symbolic_trace` over `BatchNormLinear`", "works")
@both_modes
def test_symbolic_trace_of_the_block(training: bool) -> None:
    block = bn.BatchNormLinear(3, 2, dtype=torch.float64).train(training)
    net = nn.Sequential(copy.deepcopy(block))
    graph = symbolic_trace(net)
    x = data(6, 3)
    same(graph(x).detach(), block(x).detach())
    same(dict(net[0].state_dict()), dict(block.state_dict()))


@way(FX, "`make_fx`, real, fake and symbolic", "works; its graph is `aten`'s")
@both_modes
@activations
@pytest.mark.parametrize("mode", ["symbolic", *more("real", "fake")])
def test_make_fx(mode: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

        def of(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = functional_call(layer, (p, b), (x,))
            return y

        graph = make_fx(of, tracing_mode=mode)(parameters, {n: b.clone() for n, b in buffers.items()}, X)
        called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        assert not any(name.startswith("batchnorm") for name in called), called
        assert any("batch_norm" in name for name in called) or training, called
        return graph(parameters, buffers, OTHER).detach()

    agree(scenario, activation, training=training)


@way(FX, "`make_fx` over a gradient", "works")
@both_modes
@activations
def test_make_fx_over_a_gradient(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

        def of(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Any:
            y = functional_call(layer, (p, b), (x,))
            return torch.autograd.grad(y, [x, *p.values()], DX)

        graph = make_fx(of)(parameters, {n: b.clone() for n, b in buffers.items()}, X.clone().requires_grad_())
        return graph(parameters, buffers, OTHER.clone().requires_grad_())

    agree(scenario, activation, "dx", training=training)


@way(COMPILE, "`fullgraph=True`, `aot_eager`", "one graph, the layer as operators of this library")
@both_modes
@activations
def test_compile(activation: str | None, training: bool) -> None:
    torch._dynamo.reset()
    agree(
        lambda layer: step(torch.compile(layer, backend="aot_eager", fullgraph=True), OTHER, DX),
        activation, "dx", training=training,
    )  # fmt: skip


@way(COMPILE, "the default backend", "works where there is a C++ compiler")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile's inductor needs")
@both_modes
def test_inductor(training: bool) -> None:
    torch._dynamo.reset()
    agree(lambda layer: step(torch.compile(layer, fullgraph=True), OTHER, DX), "relu", "dx", training=training)
