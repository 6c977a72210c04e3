"""Tools of PyTorch that cannot handle a layer of ours say so, and name the way out."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn


def test_synchronizing_a_layer_with_extras_is_an_error_that_names_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, activation="relu", nonfinite="skip"))
    with pytest.raises(bn.BatchNormError) as caught:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert str(caught.value) == (
        "convert_sync_batchnorm: expected a layer without extras, got BatchNorm2d(activation='relu', "
        "nonfinite='skip'). They would be lost. Call batchnorm.convert(model, process_group=\"world\"), which keeps "
        "them, or batchnorm.revert(model) first."
    )
    assert isinstance(model[1], bn.BatchNorm2d)


def test_synchronizing_a_layer_without_extras_works() -> None:
    layer = bn.BatchNorm2d(3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]
    assert type(converted) is nn.SyncBatchNorm
    assert converted.weight is layer.weight


@pytest.mark.parametrize("name", ["qconfig", "parametrizations"])
def test_to_everyone_else_the_attribute_is_absent_until_it_is_set(name: str) -> None:
    layer = bn.BatchNorm2d(3, activation="relu")
    assert not hasattr(layer, name)
    assert getattr(layer, name, None) is None
    with pytest.raises(AttributeError) as caught:
        getattr(layer, name)
    assert str(caught.value) == f"'BatchNorm2d' object has no attribute '{name}'"
    assert name not in dict(inspect.getmembers(layer))
    setattr(layer, name, 3)
    assert getattr(layer, name) == 3
    delattr(layer, name)
    assert not hasattr(layer, name)


class Doubled(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def test_parametrizations_are_found_where_there_are_some() -> None:
    layer = bn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert parametrize.is_parametrized(layer)
    assert list(layer.parametrizations) == ["weight"]
    parametrize.remove_parametrizations(layer, "weight")
    assert not parametrize.is_parametrized(layer)
