"""Small networks of random weights, built by the packages that a user would build them with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

LABELS = 5
SIDE = 32


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=LABELS)
    )


def mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE, num_labels=LABELS, classifier_dropout_prob=0.0)
    )


def efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=SIDE,
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
            num_labels=LABELS,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
        )
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "transformers ResNet": resnet,
    "transformers MobileNetV2": mobilenet,
    "transformers EfficientNet": efficientnet,
}


def built(name: str) -> nn.Module:
    """The network, with statistics and weights of a few steps of training; skips where the package is missing."""
    try:
        model = ARCHITECTURES[name]()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")
    train(model, 3)
    return model.eval()


def train(model: nn.Module, steps: int, seed: int = 0) -> list[float]:
    """The losses of so many steps on synthetic images whose label can be learned."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    losses = []
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        labels = torch.randint(LABELS, (8,), generator=generator)
        x = torch.randn(8, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) + labels.view(-1, 1, 1, 1) / LABELS
        loss = nn.functional.cross_entropy(model(x.to(dtype)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
