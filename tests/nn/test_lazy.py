"""The lazy layers: torch's, with our extras, and ours when the first input has come."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

import batchnorm as bn
from tolerances import assert_close, to_float64

LAYERS: dict[str, tuple[Any, Any, Any, tuple[int, ...]]] = {
    "1d": (bn.LazyBatchNorm1d, nn.LazyBatchNorm1d, bn.BatchNorm1d, (6, 3)),
    "2d": (bn.LazyBatchNorm2d, nn.LazyBatchNorm2d, bn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (bn.LazyBatchNorm3d, nn.LazyBatchNorm3d, bn.BatchNorm3d, (2, 3, 3, 2, 2)),
}


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}])
@pytest.mark.parametrize("rank", LAYERS)
def test_a_lazy_layer_is_the_plain_one_after_its_first_input(rank: str, options: dict[str, Any]) -> None:
    ours_by, theirs_by, becomes, shape = LAYERS[rank]
    ours, theirs = (
        ours_by(**options, eps=1e-3, dtype=torch.float64),
        theirs_by(**options, eps=1e-3, dtype=torch.float64),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(ours(x), to_float64(theirs(x)), dtype="float64", quantity="y")
    assert type(ours) is becomes
    assert ours.num_features == 3
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }
    assert set(ours.__dict__) == set(becomes(3).__dict__)


def test_the_extras_are_kept() -> None:
    layer = bn.LazyBatchNorm2d(activation="leaky_relu", negative_slope=0.3, too_few="running", nonfinite="skip")
    layer(torch.randn(4, 3, 2, 2))
    assert (layer.activation, layer.negative_slope, layer.too_few, layer.nonfinite) == (
        "leaky_relu",
        0.3,
        "running",
        "skip",
    )


def test_a_checkpoint_of_the_plain_layer_materializes_a_lazy_one() -> None:
    plain, lazy = bn.BatchNorm1d(3), bn.LazyBatchNorm1d()
    plain(torch.randn(8, 3))
    assert isinstance(lazy.weight, UninitializedParameter)
    lazy.load_state_dict(plain.state_dict())
    assert torch.equal(lazy.running_mean, plain.running_mean)
    x = torch.randn(8, 3)
    assert torch.equal(lazy(x), plain(x))
    assert type(lazy) is bn.BatchNorm1d


def test_a_cast_before_the_first_input_holds() -> None:
    layer = bn.LazyBatchNorm1d().double()
    assert layer(torch.randn(8, 3, dtype=torch.float64)).dtype == torch.float64
    assert layer.running_var.dtype == torch.float64


def test_it_takes_what_torchs_lazy_layer_takes_in_the_same_order() -> None:
    theirs = list(inspect.signature(nn.LazyBatchNorm1d.__init__).parameters)
    ours = list(inspect.signature(bn.LazyBatchNorm1d.__init__).parameters)
    assert ours[: len(theirs)] == theirs
