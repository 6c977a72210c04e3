"""The network of the training step: torchvision's in all that matters, and the same with every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.bench.measure import Plan, Samples
from batchnorm.errors import BatchNormError
from benchmarks import resnet

# Of torchvision's resnet50 with 1000 classes.
PARAMETERS = 25_557_032


def test_it_has_the_size_of_resnet50() -> None:
    model = resnet.ResNet50("torch")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 53


@pytest.mark.parametrize(("variant", "fused"), [("ours", 0), ("fused", 49)])
def test_ours_take_the_place_of_all_53(variant: str, fused: int) -> None:
    layers = [m for m in resnet.ResNet50(variant).modules() if isinstance(m, bn.BatchNorm2d)]
    assert len(layers) == 53
    # All but the four of the projections are followed by a ReLU.
    assert sum(layer.activation == "relu" for layer in layers) == fused


def test_without_them_nothing_normalizes() -> None:
    model = resnet.ResNet50(resnet.WITHOUT)
    assert not any(isinstance(m, (nn.BatchNorm2d, bn.BatchNorm2d)) for m in model.modules())
    assert sum(isinstance(m, nn.Identity) for m in model.modules()) == 53


def test_a_share_is_what_the_layers_add_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "torch": (1.25, 12.5, 2.0),
        "ours": (1.0, 10.0, 1.0),
        "fused": (0.8, 8.0, 0.8),
        resnet.WITHOUT: (1.0, 10.0, 1.0),
    }
    monkeypatch.setattr(resnet, "_training_step", lambda *_: lambda: 7.0)
    monkeypatch.setattr(resnet, "interleave", lambda steps, _: {name: Samples(seconds[name], 1) for name in steps})
    found = resnet.measure(batch=2, size=32)
    assert {name: step["share"] for name, step in found["steps"].items()} == {
        "torch": pytest.approx(0.2),
        "ours": 0.0,
        "fused": pytest.approx(-0.25),
    }
    assert found["without"] == 1.0


@pytest.mark.slow
def test_the_step_is_measured_with_every_kind_of_layer() -> None:
    torch.set_num_threads(1)
    plan = Plan(least=0.0, rounds=1, enough=1, budget=0.0)
    # Smaller, and the last stage has so few values a channel that rounding alone decides the loss.
    found = resnet.measure(batch=4, size=64, layout="channels_last", threads=2, plan=plan)
    assert set(found["steps"]) == {"torch", "ours", "fused"}
    assert (found["batch"], found["size"], found["layout"], found["threads"]) == (4, 64, "channels_last", 2)
    for step in found["steps"].values():
        assert step["share"] == pytest.approx(1 - found["without"] / step["median"])
    assert torch.get_num_threads() == 1


def test_networks_that_differ_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"torch": 7.0, "ours": 7.0001, "fused": 7.5, resnet.WITHOUT: 900.0}
    monkeypatch.setattr(resnet, "_training_step", lambda variant, *_: lambda: losses[variant])
    with pytest.raises(BatchNormError) as raised:
        resnet.measure(batch=2, size=32)
    assert str(raised.value) == "bench: ResNet-50's loss is 7.5 with fused, 7 with torch"
