"""Networks as users build them, with random weights and realistic statistics: every norm folded, the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from folding import assert_folded_alike, fold, outputs, randomized
from packages import package


def transformers_model(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = package("transformers")
        config = getattr(transformers, f"{kind}Config")(**options)
        model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
        return model

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: package("timm").create_model(name, pretrained=False, **options)


# Each network, the size of its images, its norms, and how many of them have no layer that could take them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "transformers ResNet": (
        transformers_model("ResNet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 2, 1]), 48, 22, 0,
    ),
    "transformers MobileNetV2": (transformers_model("MobileNetV2", depth_multiplier=0.35), 48, 52, 0),
    "transformers EfficientNet": (
        transformers_model("EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640), 48, 31, 0,
    ),
    "timm resnet18": (timm_model("resnet18"), 32, 20, 0),
    "timm mobilenetv2_100": (timm_model("mobilenetv2_100"), 32, 52, 0),
    "timm efficientnet_b0": (timm_model("efficientnet_b0"), 32, 49, 0),
    # It pads by itself, in a subclass of Conv2d.
    "timm tf_efficientnet_b0": (timm_model("tf_efficientnet_b0"), 32, 49, 0),
    # Its norms with an activation inside come after concatenations.
    "timm densenet121": (timm_model("densenet121", growth_rate=8), 32, 121, 62),
    # A branch is a norm alone.
    "timm repvgg_a0": (timm_model("repvgg_a0"), 32, 61, 17),
    "timm levit_128s": (timm_model("levit_128s"), 224, 52, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_that_has_a_layer_to_go_into_is_folded(name: str) -> None:
    build, size, norms, apart = NETWORKS[name]
    torch.manual_seed(0)
    model = randomized(build())
    x = torch.randn(2, 3, size, size)
    folded = fold(model, x)
    report = folded.fold_report
    assert type(folded) is type(model)
    assert not report.left
    assert (len(report.decisions), len(report.decisions) - report.folded) == (norms, apart)
    assert_folded_alike(model, folded, x)


@pytest.mark.parametrize("name", ["transformers ResNet", "timm mobilenetv2_100"])
def test_a_network_in_float64_is_the_same_to_twelve_digits(name: str) -> None:
    build, size, _, _ = NETWORKS[name]
    model, x = randomized(build()).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    assert_folded_alike(model, fold(model, x), x)


def test_inputs_by_name_and_outputs_in_a_class() -> None:
    build, size, _, _ = NETWORKS["transformers ResNet"]
    model, x = randomized(build()), torch.randn(1, 3, size, size)
    folded = fold(model, pixel_values=x, output_hidden_states=True)
    given = {"pixel_values": x, "output_hidden_states": True}
    truth = outputs(copy.deepcopy(model).eval(), **given)
    got = outputs(folded, **given)
    assert len(got) == len(truth) == 6
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max())) for a, b in zip(got, truth, strict=True))


def test_frozen_layers_of_timm_and_transformers() -> None:
    timm = package("timm")
    model = timm.layers.freeze_batch_norm_2d(randomized(timm.create_model("densenet121", growth_rate=8)))
    x = torch.randn(2, 3, 32, 32)
    folded = fold(model, x)
    assert folded.fold_report.folded == 59
    assert {each.kind for each in folded.fold_report.decisions} == {"FrozenBatchNormAct2d"}
    assert_folded_alike(model, folded, x)
    package("transformers")
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    other = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), DetrFrozenBatchNorm2d(4), nn.ReLU()))
    folded = fold(other, x)
    assert folded.fold_report.folded == 1
    assert_folded_alike(other, folded, x)


def test_our_layers_in_a_network_of_theirs() -> None:
    package("timm")
    model = timm_model("resnet18", norm_layer=bn.BatchNorm2d)()
    assert any(isinstance(module, bn.BatchNorm2d) for module in model.modules())
    model, x = randomized(model), torch.randn(2, 3, 32, 32)
    folded = fold(model, x)
    assert folded.fold_report.folded == 20
    assert_folded_alike(model, folded, x)
