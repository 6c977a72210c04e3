"""The layer that a ``torch.nn.SyncBatchNorm`` becomes: ours on one rank, torch's exchange on several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError
from batchnorm.nn import distributed
from batchnorm.nn.distributed import SyncBatchNorm, ranks
from tolerances import assert_close, to_float64


def test_nothing_is_distributed_here() -> None:
    assert ranks(None) == 1


def test_on_one_rank_it_is_the_layer_of_any_rank() -> None:
    synced, plain = SyncBatchNorm(3, activation="relu"), bn.BatchNorm(3, activation="relu")
    for shape in ((8, 3), (4, 3, 5), (2, 3, 4, 4)):
        x, residual = torch.randn(shape), torch.randn(shape)
        assert torch.equal(synced(x, residual=residual), plain(x, residual=residual))
    assert torch.equal(synced.running_var, plain.running_var)


def test_on_several_ranks_training_is_torchs_forward_with_the_rest_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def several(group: object) -> int:
        groups.append(group)
        return 2

    monkeypatch.setattr(distributed, "ranks", several)
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group="the group")).double()
    bn.convert(model)
    layer = model[0]
    layer.activation = "relu"
    x, residual = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    handed: list[nn.Module] = []

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        handed.append(self)
        return 2 * input

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    expected = torch.relu(2 * x + residual)
    assert_close(layer(x, residual=residual), to_float64(expected), dtype="float64", quantity="y")
    assert (handed, groups) == ([layer], ["the group"])
    with pytest.raises(ArgumentError) as error:
        layer(x, mask=torch.ones(4, dtype=torch.bool))
    assert str(error.value) == (
        "SyncBatchNorm: expected no mask or sample_weight over several ranks, got one. "
        "Leave them away, or train on one rank."
    )
    layer.eval()
    layer(x)
    assert handed == [layer]
    bn.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group == "the group"


def test_torchs_own_forward_accepts_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    assert ranks(None) == 2
    model = bn.convert(nn.Sequential(nn.SyncBatchNorm(3)))
    # On a CPU torch's forward gets as far as asking for a GPU.
    with pytest.raises(ValueError) as error:
        model(torch.randn(4, 3))
    assert str(error.value).startswith("SyncBatchNorm expected input tensor to be on")
