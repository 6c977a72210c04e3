"""Weights that were averaged have no running statistics of their own: measure them again (Algorithm 2)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm as bn


def data(batches: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Points in the plane; the class says whether they lie inside a ring."""
    points = [torch.randn(size, 2) for _ in range(batches)]
    return [(x, (x.norm(dim=1) < 1.18).long()) for x in points]


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 32, bias=False), bn.BatchNorm1d(32, activation="relu"),
        nn.Linear(32, 32, bias=False), bn.BatchNorm1d(32, activation="relu"),
        nn.Linear(32, 2),
    )  # fmt: skip
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(5):
        train(model, data(40), lr=0.2)
        average.update_parameters(model)
    test = data(50)

    # Averaged weights produce other values than the weights they were averaged from, so the statistics that
    # came with the copy are another network's.
    averaged = copy.deepcopy(average.module)
    before = accuracy(averaged, test)
    report = bn.recalibrate(averaged, (x for x, _ in data(50)), gap_batches=10)
    after = accuracy(averaged, test)
    print(report)
    print(f"accuracy of the averaged weights: {before:.3f} before, {after:.3f} after recalibration")
    assert after > before

    # Pooled statistics are exact: the same data in batches of other sizes gives the same result.
    points = torch.cat([x for x, _ in data(10)])
    even, uneven = copy.deepcopy(averaged), copy.deepcopy(averaged)
    bn.recalibrate(even[:2], points.split(64))
    bn.recalibrate(uneven[:2], points.split([10, 30, 600]))
    assert torch.allclose(even[1].running_var, uneven[1].running_var, rtol=1e-6)
    print("batches of 64 and batches of 10, 30 and 600 give the same statistics to the first layer")

    # Deeper layers see what the layers before them give, and those normalize by the batch, as in training. In
    # sequential order they normalize by the statistics that they were just given, as in eval mode: then the cut does
    # not matter to any layer. A last batch of one counts like any other.
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points), batch_size=9)
    assert len(points) % 9 == 1
    one_by_one, whole = copy.deepcopy(averaged), copy.deepcopy(averaged)
    report = bn.recalibrate(one_by_one, loader, order="sequential")
    bn.recalibrate(whole, [points], order="sequential")
    for name, statistics in one_by_one.state_dict().items():
        assert "running" not in name or torch.allclose(statistics, whole.state_dict()[name], rtol=1e-4, atol=1e-6)
    print(report)
    print(
        f"{report.passes} passes: batches of 9 and one batch of {len(points)} give the same statistics to both layers"
    )


if __name__ == "__main__":
    main()
