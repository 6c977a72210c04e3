"""``FrozenBatchNorm2d``, and the frozen layers of other libraries that it stands in for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError
from tolerances import assert_close, to_float64


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and, with ``num_batches_tracked`` registered as None, detectron2 have it."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class WithoutEps(FrozenBatchNorm2d):
    """As transformers' DETR has it: the eps stands in the forward."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.__dict__.pop("eps")

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class EpsOutside(FrozenBatchNorm2d):
    """The same buffers and something else computed from them."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) / (self.running_var.reshape(1, -1, 1, 1).sqrt() + self.eps)
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class WithAct(FrozenBatchNorm2d):
    """As timm's ``FrozenBatchNormAct2d``: an activation inside."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()


def filled(layer: nn.Module) -> nn.Module:
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, WithoutEps])
def test_a_frozen_layer_of_another_library_is_converted_and_comes_back(
    kind: Any, dtype: torch.dtype, training: bool
) -> None:
    model = nn.Sequential(filled(kind(3))).to(dtype).train(training)
    twin = copy.deepcopy(model).double()
    buffers, attributes = dict(model[0]._buffers), set(model[0].__dict__)
    bn.convert(model)
    assert type(model[0]) is bn.FrozenBatchNorm2d
    assert all(buffer is buffers[name] for name, buffer in model[0]._buffers.items())
    assert list(model.parameters()) == []
    x, dy = torch.randn(2, 3, 4, 5, dtype=dtype), torch.randn(2, 3, 4, 5, dtype=dtype)
    found = []
    for each, given in ((model, x), (twin, x.double())):
        leaf = given.clone().requires_grad_()
        y = each(leaf)
        found.append((y, torch.autograd.grad(y, leaf, dy.to(given.dtype))[0]))
    name = str(dtype).removeprefix("torch.")
    assert_close(found[0][0], to_float64(found[1][0]), dtype=name, quantity="y", scale=10.0)
    assert_close(found[0][1], to_float64(found[1][1]), dtype=name, quantity="dx")
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    bn.revert(model)
    assert type(model[0]) is kind
    assert set(model[0].__dict__) == attributes


def test_torchvisions_own_is_converted() -> None:
    try:
        from torchvision.ops import FrozenBatchNorm2d as Theirs
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision: {error}")
    model = nn.Sequential(filled(Theirs(3)))
    x = torch.randn(2, 3, 4, 4)
    y = copy.deepcopy(model).double()(x.double())
    assert type(bn.convert(model)[0]) is bn.FrozenBatchNorm2d
    assert_close(model(x), to_float64(y), dtype="float32", quantity="y", scale=10.0)
    assert type(bn.revert(model)[0]) is Theirs


def test_transformers_own_is_converted() -> None:
    try:
        from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers: {error}")
    model = nn.Sequential(filled(DetrFrozenBatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    y = copy.deepcopy(model).double()(x.double())
    assert type(bn.convert(model)[0]) is bn.FrozenBatchNorm2d
    assert_close(model(x), to_float64(y), dtype="float32", quantity="y", scale=10.0)
    assert type(bn.revert(model)[0]) is DetrFrozenBatchNorm2d


def test_what_only_looks_frozen_is_left_with_the_reason() -> None:
    reports: list[Any] = []
    model = nn.Sequential(EpsOutside(3), WithAct(3))
    bn.convert(model, report=reports.append)
    assert [(each.before, each.reason) for each in reports[0].left] == [
        ("EpsOutside", "EpsOutside holds the buffers of a frozen layer and computes something else"),
        ("WithAct", "WithAct has modules of its own: act"),
    ]
    assert [type(m) for m in model] == [EpsOutside, WithAct]


def test_a_relu_after_a_frozen_layer_and_a_residual_are_joined() -> None:
    model = nn.Sequential(filled(FrozenBatchNorm2d(3)), nn.ReLU(inplace=True)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = model(x)
    bn.convert(model, fuse=True, example_inputs=x)
    assert model[0].activation == "relu"
    assert_close(model(x), to_float64(y), dtype="float64", quantity="y")
    residual = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    bn.revert(model)
    expected = torch.relu(model[0](x) + residual)
    layer = bn.FrozenBatchNorm2d(3, activation="relu").double()
    layer.load_state_dict(model[0].state_dict())
    assert_close(layer(x, residual=residual), to_float64(expected), dtype="float64", quantity="y")


def test_the_result_has_the_dtype_of_input_and_buffers_together() -> None:
    layer = bn.FrozenBatchNorm2d(3)
    assert layer(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.float32
    assert layer(torch.randn(2, 3, 4, 4).double()).dtype == torch.float64
    assert layer.bfloat16()(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_the_layer_takes_checkpoints_with_a_counter_and_refuses_other_ranks() -> None:
    layer = bn.FrozenBatchNorm2d(3, activation="leaky_relu", negative_slope=0.2)
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert repr(layer) == "FrozenBatchNorm2d(3, eps=1e-05, activation='leaky_relu')"
    layer.negative_slope = 0.5
    assert layer.negative_slope == 0.5
    layer.activation = None
    assert layer.activation is None
    with pytest.raises(ArgumentError) as error:
        layer(torch.randn(2, 3))
    assert str(error.value) == "expected 4D input (got 2D input)"
