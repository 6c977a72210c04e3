"""A network of another package: its norms swapped for ours and joined with what follows, and back again."""

from __future__ import annotations

import copy

import torch
from torch import nn

import batchnorm as bn


def network() -> nn.Module:
    """A small ResNet as a user of transformers builds it, or one by hand where transformers is missing."""
    try:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
        )
        return ResNetForImageClassification(config)
    except ImportError:
        print("transformers is not installed: a network by hand instead")
        return nn.Sequential(Block(3, 16), Block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Block(nn.Module):
    """Convolution, norm and ReLU twice, the second after an addition."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return torch.relu(y)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(images)
    return result if isinstance(result, torch.Tensor) else result.logits


def main() -> None:
    images = torch.randn(8, 3, 32, 32)
    model = network()
    with torch.no_grad():
        for _ in range(3):
            model.train()(images)  # statistics that are not those of a new layer
    model.eval()
    before, parameters = logits(model, images), list(model.parameters())

    # The three lines: to ours, use it, and back.
    model = bn.convert(model)
    ours = logits(model, images)
    model = bn.revert(model)

    print(f"largest difference of a logit: {(ours - before).abs().max().item():.0e}")
    assert torch.allclose(ours, before, atol=1e-5)
    assert torch.equal(logits(model, images), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    print("converted and reverted: the same logits to the last bit, the same parameter objects")

    # Activations, and additions where they can be reached, into the norms' own passes. The report says which.
    model = bn.convert(model, fuse=True, example_inputs=images, report=print)
    assert torch.allclose(logits(model, images), before, atol=1e-5)
    assert torch.equal(logits(bn.revert(copy.deepcopy(model)), images), before)

    # A block whose forward calls norm, addition and ReLU itself gives up all three.
    block = Block(16, 16)
    bn.convert(block, fuse=True, example_inputs=torch.randn(8, 16, 8, 8), report=print)
    print(f"activations: {block.bn1.activation}, {block.bn2.activation} after the shortcut was added")


if __name__ == "__main__":
    main()
