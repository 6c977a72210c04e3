"""Take a network of torch.nn layers and swap its batch normalization, checkpoint and all."""

from __future__ import annotations

import torch
from torch import nn

import batchnorm as bn


def network(batch_norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # the mean would take a bias away again
        batch_norm(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def train(model: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    theirs, ours = network(nn.BatchNorm2d), network(bn.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())  # strict: the keys are the same

    difference = max(abs(a - b) for a, b in zip(train(theirs, 20), train(ours, 20), strict=True))
    print(f"largest difference of the loss over 20 steps of training: {difference:.0e}")
    assert difference < 1e-4

    theirs.load_state_dict(ours.state_dict())  # and back again
    images = torch.randn(4, 3, 8, 8)
    difference = (theirs.eval()(images) - ours.eval()(images)).abs().max().item()
    print(f"largest difference of the output in eval mode: {difference:.0e}")
    assert difference < 1e-5

    # ReLU in the same pass: one tensor is kept for backward where two layers keep two.
    fused = bn.BatchNorm2d(8, activation="relu")
    fused.load_state_dict(ours[1].state_dict())
    features = ours[0](images)
    assert torch.allclose(fused.eval()(features), ours[2](ours[1](features)), atol=1e-6)
    print("BatchNorm2d(8, activation='relu') gives what BatchNorm2d(8) and ReLU give")


if __name__ == "__main__":
    main()
