"""Under a compiler's eyes the layers give what they give without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm as bn
from conformance import arrange
from tolerances import assert_close, to_float64

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "relu": {"activation": "relu"},
    "skip": {"nonfinite": "skip"},
    "raise": {"nonfinite": "raise", "activation": "tanh"},
}


# What needs no look at the values, so that one graph holds it all.
WHOLE = {
    "default": {},
    "cumulative": {"momentum": None},
    "forgetful": {"momentum": 1.0},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "skip": {"nonfinite": "skip"},
    "no parameters": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


class Network(nn.Module):
    """Convolution, normalization with or without a residual, and a head."""

    def __init__(self, residual: bool = False, **options: Any) -> None:
        super().__init__()
        self.residual = residual
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = bn.BatchNorm2d(3, **options)
        self.head = bn.BatchNormLinear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x)
        y: Tensor = self.head(self.norm(h, residual=h if self.residual else None).mean((2, 3)))
        return y


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_state(actual: nn.Module, expected: nn.Module) -> None:
    for name, t in expected.state_dict().items():
        assert_close(actual.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", WHOLE)
def test_a_compiled_network_trains_as_it_does_without_and_is_compiled_once(options: str, residual: bool) -> None:
    net = Network(residual, **WHOLE[options]).double()
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    runs = [(run, torch.optim.SGD(m.parameters(), lr=0.1)) for run, m in ((net, net), (compiled, twin))]
    for _ in range(4):
        x, target = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
        for run, optimizer in runs:
            optimizer.zero_grad()
            ((run(x) - target) ** 2).mean().backward()
            optimizer.step()
    same_state(twin, net)
    assert counter.frame_count == 1


def test_another_batch_size_compiles_once_more_and_not_again() -> None:
    layer = bn.BatchNorm2d(3, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for n in (4, 5, 6, 7):
        x = torch.randn(n, 3, 5, 5, dtype=torch.float64)
        assert_close(compiled(x), to_float64(layer(x)), dtype="float64", quantity="y")
    same_state(twin, layer)
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", WHOLE)
def test_an_exported_network_gives_the_same_for_any_batch_size(options: str, training: bool) -> None:
    net = Network(True, **WHOLE[options]).double().train(training)
    batch = torch.export.Dim("batch", min=2)
    given = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    exported = torch.export.export(copy.deepcopy(net), (given,), dynamic_shapes=({0: batch},)).module()
    for n in (4, 9):
        x = torch.randn(n, 2, 5, 5, dtype=torch.float64)
        assert_close(exported(x), to_float64(net(x)), dtype="float64", quantity="y")
    same_state(exported, net)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
def test_a_layer_on_fake_tensors_tells_what_it_would_give(layout: str, training: bool) -> None:
    x = arrange(torch.randn(4, 3, 5, 6), layout)
    with FakeTensorMode() as mode:
        told = bn.BatchNorm2d(3, activation="relu").train(training)(mode.from_tensor(x))
    y = bn.BatchNorm2d(3, activation="relu").train(training)(x)
    assert (told.shape, told.stride(), told.dtype) == (y.shape, y.stride(), y.dtype)


# Dynamo looks at y.grad where the graph breaks (nonfinite="raise"), and hides this warning from users itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_gradients_and_statistics_are_the_same(options: str, training: bool) -> None:
    layer = bn.BatchNorm2d(3, **OPTIONS[options], dtype=torch.float64)
    layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    layer.train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager")
    for _ in range(2):
        x, dy = (torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(2))
        results = []
        for run, module in ((layer, layer), (compiled, twin)):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
        for quantity, a, b in zip(("y", "dx", "dx", "dx"), *results, strict=True):
            assert_close(b, to_float64(a), dtype="float64", quantity=quantity)
        same_state(twin, layer)
