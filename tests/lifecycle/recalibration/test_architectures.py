"""Recalibration on architectures that people use, with random weights; what is not installed is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn

ORDERS: list[Any] = ["joint", "sequential"]


def transformers_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)  # type: ignore[no-any-return]


def transformers_mobilenet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=5)
    return transformers.MobileNetV2ForImageClassification(config)  # type: ignore[no-any-return]


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # timm needs torchvision, which must fit torch
            pytest.skip(f"timm cannot be imported: {error}")
        model: nn.Module = timm.create_model(name, num_classes=5)
        return model

    return build


MODELS = {
    "transformers ResNet": transformers_resnet,
    "transformers MobileNetV2": transformers_mobilenet,
    "timm resnet18": timm_model("resnet18"),
    "timm mobilenetv3": timm_model("mobilenetv3_small_050"),
}


def ours(model: nn.Module) -> None:
    """Every torch.nn.BatchNorm2d, of that very class, replaced by ours with the same state."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                layer = bn.BatchNorm2d(child.num_features, child.eps, child.momentum)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["torch's", "ours"])
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_gap_is_closed(name: str, kind: str, order: Any) -> None:
    model = MODELS[name]()
    if kind == "ours":
        ours(model)
    model.double().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(2, 3)
                module.running_var.uniform_(0.1, 20)
    batches = [(torch.randn(n, 3, 32, 32, dtype=torch.float64), "label") for n in (64, 48, 1)]
    report = bn.recalibrate(model, batches, order=order, gap_batches=2)
    assert report.gap_before is not None and report.gap_after is not None
    assert report.gap_before > 0.8
    # What is left of the output's gap is the noise of a batch, which networks that were never trained amplify.
    assert report.gap_after < report.gap_before
    for layer in report.layers.values():
        assert layer.gap_before is not None and layer.gap_after is not None
        assert layer.gap_before > 0.8
        assert layer.gap_after < (0.2 if order == "joint" else 0.02)
    if order == "joint":
        return
    assert report.passes <= len(report.layers)
    # By induction over the layers: exact in the sense of the order if in eval mode each layer's statistics are
    # those of what reaches it.
    inputs: dict[str, list[Tensor]] = {}
    for key in report.layers:
        layer = model.get_submodule(key)
        layer.register_forward_pre_hook(lambda m, args, key=key: inputs.setdefault(key, []).append(args[0]))
    model.eval()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for key, seen in inputs.items():
        x = torch.cat(seen).transpose(0, 1).flatten(1)
        layer = model.get_submodule(key)
        torch.testing.assert_close(layer.running_mean, x.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.running_var, x.var(1), rtol=1e-9, atol=1e-12)
