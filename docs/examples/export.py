"""A trained network leaves Python: torch.export, ONNX and a trace, unfolded and folded, each held against eval."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm as bn


def trained() -> nn.Module:
    """A small network with a residual block whose norms apply the activation, after a few steps of training."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), bn.BatchNorm2d(16, activation="relu"),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), bn.BatchNorm2d(16, activation="leaky_relu", negative_slope=0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), bn.BatchNormLinear(16, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(5):
        x, target = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
    return net.eval()


def difference(result: Tensor, expected: Tensor) -> float:
    """The largest one, relative to the largest output."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


def with_onnxruntime(net: nn.Module, given: Tensor, x: Tensor) -> Tensor | None:
    """The network exported on ``given`` and run on ``x``, or None where the packages are missing."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        shapes = ({0: torch.export.Dim("batch", min=2)},)
        torch.onnx.export(net, (given,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


def main() -> None:
    warnings.simplefilter("ignore")  # what exporters say about themselves
    given, x = torch.randn(4, 3, 16, 16), torch.randn(7, 3, 16, 16)
    net = trained()
    for name, model in {"unfolded": net, "folded": bn.fold(net, given)}.items():
        with torch.no_grad():
            expected = net(x)

            # Standard operators only: a program that knows nothing of this library can load it.
            shapes = ({0: torch.export.Dim("batch", min=2)},)
            program = torch.export.export(model, (given,), dynamic_shapes=shapes)
            operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            assert all(operator.startswith("aten.") for operator in operators), operators
            norms = sum("batch_norm" in str(node.target) for node in program.graph.nodes)
            print(f"{name}: {norms} batch norms in the exported program")
            print(f"  torch.export   off by {difference(program.module()(x), expected):.0e}")
            assert difference(program.module()(x), expected) < 1e-5

            traced = torch.jit.trace(model, given)
            print(f"  torch.jit      off by {difference(traced(x), expected):.0e}")
            assert difference(traced(x), expected) < 1e-5

            result = with_onnxruntime(model, given, x)
            if result is None:
                print("  ONNX           skipped: onnx, onnxscript or onnxruntime is not installed")
            else:
                print(f"  ONNX           off by {difference(result, expected):.0e}")
                assert difference(result, expected) < 1e-5


if __name__ == "__main__":
    main()
