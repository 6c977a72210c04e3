"""A small ResNet with torch's layers and with ours: the same training, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from tolerances import assert_close, assert_not_worse_than_torch, to_float64

STEPS = 20


class Block(nn.Module):
    """conv, norm, relu, conv, norm, + input, relu."""

    def __init__(self, norm: Any, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class FusedBlock(Block):
    """The same with ReLU and residual given to the normalization."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn1.activation = self.bn2.activation = "relu"
        result: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=self.down(x))
        return result


class ResNet(nn.Module):
    def __init__(self, norm: Any, block: type[Block] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), norm(8), nn.ReLU())
        self.blocks = nn.Sequential(block(norm, 8, 8, 1), block(norm, 8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def train(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> list[float]:
    """Losses of STEPS steps of SGD with momentum and weight decay, on random images of five kinds."""
    g = torch.Generator().manual_seed(1)
    kinds = torch.randn(5, 3, 8, 8, generator=g, dtype=torch.float64)
    model.to(dtype).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(STEPS):
        target = torch.randint(0, 5, (16,), generator=g)
        x = kinds[target] + torch.randn(16, 3, 8, 8, generator=g, dtype=torch.float64)
        loss = F.cross_entropy(model(x.to(dtype).contiguous(memory_format=layout)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(norm: Any, block: type[Block], dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    start = ResNet(nn.BatchNorm2d)
    for module in start.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    model = ResNet(norm, block)
    model.load_state_dict(start.state_dict(), strict=True)
    return train(model, dtype, layout), model


@pytest.mark.parametrize("block", [Block, FusedBlock])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_twenty_steps_in_float64_are_the_same(layout: torch.memory_format, block: type[Block]) -> None:
    ours, our_model = trained(bn.BatchNorm2d, block, torch.float64, layout)
    theirs, their_model = trained(nn.BatchNorm2d, Block, torch.float64, layout)
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= 1e-10
    assert theirs[-1] < 0.5 * theirs[0], "nothing was learned, so nothing was compared"
    a, b = our_model.state_dict(), their_model.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= 1e-10, name
    # And in eval mode, each with the other's checkpoint.
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    other = ResNet(bn.BatchNorm2d).double()
    other.load_state_dict(b)
    assert_close(other.eval()(x), to_float64(their_model.eval()(x)), dtype="float64", quantity="y")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_twenty_steps_in_float32_are_as_near_to_float64_as_torchs(layout: torch.memory_format) -> None:
    exact, _ = trained(nn.BatchNorm2d, Block, torch.float64, torch.contiguous_format)
    ours, _ = trained(bn.BatchNorm2d, Block, torch.float32, layout)
    theirs, _ = trained(nn.BatchNorm2d, Block, torch.float32, layout)
    assert_not_worse_than_torch(np.array(ours), np.array(theirs), np.array(exact), dtype="float32", what="losses")
