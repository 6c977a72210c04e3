"""A trained network for inference, its batch norms folded into the layers around them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm as bn


class Block(nn.Module):
    """A residual block: the second norm adds the shortcut and applies the activation itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = bn.BatchNorm2d(channels, activation="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = bn.BatchNorm2d(channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)
        return y


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 10),
    )  # fmt: skip


def resnet() -> nn.Module | None:
    """A ResNet with random weights as the package transformers builds it, where that can be imported."""
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError:
        return None
    return ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def train(model: nn.Module, steps: int = 5) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(2, (8,))
        nn.functional.cross_entropy(logits(model, images), labels).backward()
        optimizer.step()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for model in (small(), resnet()):
        if model is None:
            print("transformers cannot be imported: its ResNet is left out")
            continue
        with torch.enable_grad():
            train(model)

        folded = bn.fold(model, images)  # a copy, in eval mode; the model goes on training if it wants to
        print(type(model).__name__)
        print(folded.fold_report)
        print()

        expected = logits(copy.deepcopy(model).eval(), images)
        assert torch.allclose(logits(folded, images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

        # In float64 the two agree to rounding: what is left above is the rounding of float32.
        precise = bn.fold(model.double(), images.double(), measure=False)
        expected = logits(copy.deepcopy(model).eval(), images.double())
        error = (logits(precise, images.double()) - expected).abs().max() / expected.abs().max()
        assert error < 1e-12

    # Folded models are ordinary modules.
    exported = torch.export.export(bn.fold(small(), images, measure=False), (images,))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    print("the exported graph has no batch norm in it")


if __name__ == "__main__":
    main()
