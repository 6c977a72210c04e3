"""Frozen layers stay as they are, whatever ``train`` says."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.memory import kept
from batchnorm.errors import ArgumentError
from model_state import everything

KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
KINDS += [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d, bn.BatchNorm]
SHAPES = {"BatchNorm1d": (6, 3), "BatchNorm3d": (4, 3, 2, 2, 2)}


def data(layer: nn.Module, **options: Any) -> Tensor:
    return torch.randn(SHAPES.get(type(layer).__name__, (4, 3, 2, 2)), **options)


def settled(kind: type[nn.Module]) -> nn.Module:
    """A layer whose parameters and statistics are not those that it begins with."""
    layer = kind(3)
    with torch.no_grad():
        for t in (*layer.parameters(), layer.running_mean, layer.running_var):
            t.copy_(torch.rand(3) + 0.5)
    return layer


def normalized(layer: nn.Module, x: Tensor) -> Tensor:
    shape = (1, 3, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        t.detach().view(shape) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / torch.sqrt(var + layer.eps) * weight + bias


class Special(nn.BatchNorm2d):
    """A subclass with a child and a ``train`` of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def train(self, mode: bool = True) -> Any:
        self.calls += 1
        return super().train(mode)


@pytest.mark.parametrize("kind", [*KINDS, Special], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_statistics_survive_train(kind: type[nn.Module]) -> None:
    layer = settled(kind)
    model = nn.Sequential(layer)
    x = data(layer)
    assert bn.freeze(model) is model
    before = copy.deepcopy(model.state_dict())
    model.train()
    y = model(x)
    torch.testing.assert_close(y, normalized(layer, x))
    y.sum().backward()
    assert layer.weight.grad is not None
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert (model.training, layer.training) == (True, False)
    bn.unfreeze(model)
    assert layer.training
    if kind is not nn.SyncBatchNorm:  # which trains on a GPU alone
        model(x)
        assert layer.num_batches_tracked == 1


def test_a_layers_own_train_and_children_still_hear_of_the_mode() -> None:
    layer = bn.freeze(Special(3))
    layer.train()
    assert (layer.calls, layer.training, layer.drop.training) == (1, False, True)
    layer.eval()
    assert (layer.calls, layer.drop.training) == (2, False)
    assert not bn.unfreeze(layer).training


@pytest.mark.parametrize("module", [nn, bn])
def test_affine_parameters_leave_the_gradient_and_come_back(module: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), module.BatchNorm2d(3))
    model[1].bias.requires_grad_(False)
    bn.freeze(model, statistics=False, affine=True)
    model.train()
    model(data(model)).square().sum().backward()
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None
    assert model[1].num_batches_tracked == 1
    bn.freeze(model)  # adds to it
    model(data(model))
    assert model[1].num_batches_tracked == 1
    bn.unfreeze(model)
    assert [p.requires_grad for p in model[1].parameters()] == [True, False]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_wholly_backward_keeps_no_input(activation: str | None) -> None:
    layer = bn.BatchNorm2d(16, activation=activation)
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    y = layer(x)  # anything that is made once is made
    size = x.numel() * x.element_size()
    assert kept(lambda: layer(x), layer) >= size
    bn.freeze(layer, affine=True).train()
    # A ReLU keeps its result, which the next layer keeps anyway.
    assert kept(lambda: layer(x), layer) <= 2 * 16 * 8 + (size if activation else 0)
    y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    std = torch.sqrt(layer.running_var + layer.eps).view(1, -1, 1, 1)
    torch.testing.assert_close(dx, (dy if activation is None else dy * (y > 0)) / std)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("module", [nn, bn])
def test_copies_are_frozen_and_apart(how: Any, module: Any) -> None:
    model = bn.freeze(nn.Sequential(module.BatchNorm2d(3)), affine=True)
    twin = how(model).train()
    twin(data(twin))
    assert twin[0].num_batches_tracked == 0
    assert [p.requires_grad for p in twin.parameters()] == [False, False]
    bn.unfreeze(model)
    assert not twin[0].training
    assert bn.unfreeze(twin)[0].training
    assert all(p.requires_grad for p in twin.parameters())


def test_the_state_dict_does_not_hold_it_and_loads_into_frozen_layers() -> None:
    model, other = bn.freeze(nn.Sequential(settled(bn.BatchNorm2d))), nn.Sequential(settled(bn.BatchNorm2d))
    assert model.state_dict().keys() == other.state_dict().keys()
    model.load_state_dict(other.state_dict())
    x = data(model[0])
    torch.testing.assert_close(model.train()(x), normalized(other[0], x))


@pytest.mark.parametrize("back", [False, True])
def test_convert_and_revert_keep_it(back: bool) -> None:
    model = bn.freeze(nn.Sequential(bn.BatchNorm2d(3) if back else nn.BatchNorm2d(3)), affine=True)
    bn.revert(model) if back else bn.convert(model)
    assert type(model[0]) is (nn.BatchNorm2d if back else bn.BatchNorm2d)
    model.train()(data(model))
    assert model[0].num_batches_tracked == 0
    bn.unfreeze(model)
    assert model[0].training
    assert model[0].weight.requires_grad
    plain = nn.Sequential(nn.BatchNorm2d(3) if back else bn.convert(nn.Sequential(nn.BatchNorm2d(3)))[0])
    assert everything(model)["attributes"] == everything(plain)["attributes"]


def test_recalibrate_leaves_frozen_statistics_alone() -> None:
    model = nn.Sequential(bn.freeze(bn.BatchNorm1d(3)), bn.BatchNorm1d(3))
    before = everything(model[0])
    report = bn.recalibrate(model, [torch.randn(8, 3) + 2])
    assert report.left_alone == {"0": "frozen by batchnorm.freeze"}
    assert everything(model[0]) == before
    assert model[1].num_batches_tracked == 1


def test_with_blocks_of_updates_and_domains() -> None:
    model = bn.domains(nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3)), ["source", "target"])
    bn.freeze(model[0])
    before = everything(model[0])
    with bn.defer_updates(model) as updates, bn.use_domain(model, "target"), bn.accumulate_statistics(model):
        model.train()(torch.randn(8, 3))
    updates.commit()
    assert everything(model[0]) == before
    assert model[1].num_batches_tracked__target == 1


def test_the_norm_of_a_linear_block_stays_frozen_whatever_the_call_asks_for() -> None:
    layer = bn.freeze(bn.BatchNormLinear(3, 2).train())
    for inference in (False, True, None):
        layer(torch.randn(8, 3), inference=inference)
    assert layer.norm.num_batches_tracked == 0
    assert bn.unfreeze(layer).norm.training


def test_layers_that_are_frozen_by_class_or_track_nothing_stay_as_they_are() -> None:
    model = nn.Sequential(bn.FrozenBatchNorm2d(3), bn.BatchNorm2d(3, track_running_stats=False))
    bn.freeze(model)
    model.train()
    assert model[0].training
    assert model[1].training
    bn.freeze(nn.Sequential(bn.FrozenBatchNorm2d(3)))


def test_torchs_converter_that_would_lose_it_is_told_and_the_layer_shows_it() -> None:
    model = bn.freeze(nn.Sequential(bn.BatchNorm2d(3)))
    assert "frozen=True" in repr(model)
    with pytest.raises(ArgumentError):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "frozen" not in repr(bn.unfreeze(model))


def test_scripted_and_exported_it_is_frozen_too() -> None:
    layer = bn.freeze(settled(bn.BatchNorm2d)).train()
    x = data(layer)
    torch.testing.assert_close(torch.jit.script(layer)(x), normalized(layer, x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), normalized(layer, x))
    assert layer.num_batches_tracked == 0


def test_each_misuse_has_its_message() -> None:
    with pytest.raises(ArgumentError) as caught:
        bn.freeze(nn.Linear(2, 2))
    assert str(caught.value) == (
        "freeze: expected a model with batch normalization layers, got one without. Give the model that holds the "
        "layers."
    )
    with pytest.raises(ArgumentError) as caught:
        bn.freeze(bn.BatchNorm1d(3), statistics=False)
    assert str(caught.value) == (
        "freeze: expected statistics or affine to freeze, got neither. Choose one of them or both; unfreeze(model) is "
        "the way back."
    )
