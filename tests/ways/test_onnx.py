"""``torch.onnx.export`` by ``torch.export``, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tolerances import assert_close, to_float64
from ways.common import MORE, data, pair

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

way = pytest.mark.way
WHERE = "ONNX"
# What the exporter and the libraries below it say about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def export(net: nn.Module, x: Tensor, path: Path, *, dynamic: bool = False) -> Any:
    shapes = ({0: Dim("batch", min=2)},) if dynamic else None
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    return onnx.load(path)


def run(path: Path, x: Tensor) -> np.ndarray[Any, Any]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(result)


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@way(WHERE, "eval, each activation, static and dynamic batch, checked with onnxruntime", "works: `BatchNormalization`")
@pytest.mark.parametrize(
    ("activation", "dynamic"),
    [(None, False), ("relu", True), pytest.param(None, True, marks=MORE), pytest.param("relu", False, marks=MORE)]
    + [pytest.param(name, True, marks=MORE) for name in ("leaky_relu", "silu", "gelu", "sigmoid", "tanh")],
)
def test_onnxruntime_gives_what_eval_gives(activation: str | None, dynamic: bool, tmp_path: Path) -> None:
    ours, torchs = pair(activation, training=False, dtype=torch.float32)
    x = data(dtype=torch.float32)
    model = export(ours, x, tmp_path / "model.onnx", dynamic=dynamic)
    assert "BatchNormalization" in kinds(model)
    assert not model.functions
    for given in (data(seed=2, dtype=torch.float32), data(9, *x.shape[1:], dtype=torch.float32))[: 1 + dynamic]:
        reference = to_float64(torchs.double()(given.double()))
        torchs.float()
        assert_close(run(tmp_path / "model.onnx", given), reference, dtype="float32", quantity="y", scale=10.0)


@way(WHERE, "behind a convolution", "the exporter folds the layer into it, as torch's")
def test_folded_into_a_convolution(tmp_path: Path) -> None:
    x = data(dtype=torch.float32)
    found = []
    for i, layer in enumerate(pair("relu", training=False, dtype=torch.float32)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), layer).eval()
        path = tmp_path / f"{i}.onnx"
        found.append(kinds(export(net, x, path)))
        reference = to_float64(net.double()(x.double()))
        assert_close(run(path, x), reference, dtype="float32", quantity="y", scale=10.0)
    assert found == [["Conv", "Relu"]] * 2


@way(WHERE, "a layer with a residual", "works")
def test_a_residual(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pair("relu", training=False, dtype=torch.float32)[0][0]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x, residual=x)
            return y

    block, x = Block().eval(), data(dtype=torch.float32)
    model = export(block, x, tmp_path / "model.onnx")
    assert "BatchNormalization" in kinds(model)
    reference = torch.relu(pair(training=False)[1](x.double()) + x.double())
    assert_close(run(tmp_path / "model.onnx", x), to_float64(reference), dtype="float32", quantity="y", scale=10.0)


@way(WHERE, "`BatchNormLinear`", "works")
def test_the_block(tmp_path: Path) -> None:
    import batchnorm as bn

    block, x = bn.BatchNormLinear(3, 2), data(6, 3, dtype=torch.float32)
    block(data(8, 3, seed=5, dtype=torch.float32))
    block.eval()
    export(block, x, tmp_path / "model.onnx")
    reference = to_float64(block.double()(x.double()))
    assert_close(run(tmp_path / "model.onnx", x), reference, dtype="float32", quantity="y", scale=10.0)


@way(WHERE, "a model in training mode", "exported as it trains, or with torch's word that it is not in eval")
def test_training_mode_is_as_torchs(tmp_path: Path) -> None:
    outcomes = []
    for i, layer in enumerate(pair(training=True, dtype=torch.float32)):
        try:
            export(layer, data(dtype=torch.float32), tmp_path / f"{i}.onnx")
            outcomes.append("exported")
        except torch.onnx.errors.OnnxExporterError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]
