"""Networks of other packages, converted, unfolded and folded: what leaves Python gives what eval gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from architectures import ARCHITECTURES, built, images

NEAR = 1e-5
"""Issue 8: ONNX agrees within 1e-5 of the largest output; float32 arithmetic in another order."""

pytestmark = [pytest.mark.filterwarnings("ignore")]  # what exporters say about themselves
networks = pytest.mark.parametrize("name", ARCHITECTURES)
both = pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])


class Logits(nn.Module):
    """The network as a function of a tensor to a tensor, as exporters want it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def prepared(name: str, folded: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The network with our layers, or folded; another batch, and what eval gives for it."""
    net = Logits(bn.convert(built(name))).eval()
    x = images(5)
    with torch.no_grad():
        expected = net(x)
    return (bn.fold(net, images(2), measure=False) if folded else net), x, expected


def assert_near(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= NEAR * expected.abs().max()


def dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=2)},)


@both
@networks
def test_an_exported_program_holds_standard_operators_and_gives_the_same(name: str, folded: bool) -> None:
    net, x, expected = prepared(name, folded)
    for shapes in (None, dynamic()):
        program = torch.export.export(net, (images(5 if shapes is None else 3),), dynamic_shapes=shapes)
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert not [target for target in called if target.startswith("batchnorm")]
        assert any("batch_norm" in target for target in called) != folded
        with torch.no_grad():
            assert_near(program.module()(x), expected)


@both
@networks
def test_onnxruntime_gives_the_same(name: str, folded: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net, x, expected = prepared(name, folded)
    path = tmp_path / "network.onnx"
    torch.onnx.export(net, (images(3),), path, dynamo=True, dynamic_shapes=dynamic(), verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_near(torch.from_numpy(np.asarray(result)), expected)


@both
@networks
def test_a_trace_gives_the_same(name: str, folded: bool) -> None:
    net, x, expected = prepared(name, folded)
    traced = torch.jit.trace(net, images(3), check_trace=False)
    with torch.no_grad():
        assert_near(traced(x), expected)


@both
def test_compiled_ahead_by_aot_eager_it_gives_the_same(folded: bool) -> None:
    net, x, expected = prepared("transformers ResNet", folded)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()


@pytest.mark.slow
@both
def test_compiled_by_inductor_it_gives_the_same(folded: bool) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler for inductor")
    net, x, expected = prepared("transformers ResNet", folded)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(torch.compile(net, backend="inductor", fullgraph=True)(x), expected)
    torch._dynamo.reset()
