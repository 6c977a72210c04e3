"""Data-parallel training that equals one process: torchrun --nproc-per-node 2 docs/examples/data_parallel.py"""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.experiments import digits

STEPS, BATCH = 60, 60


def network() -> nn.Sequential:
    """Three hidden layers of sigmoids, each after a batch normalization: the paper's, section 4.1, for 8×8 images."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for features in (64, 40, 40):
        layers += [nn.Linear(features, 40, bias=False), bn.BatchNorm1d(40, activation="sigmoid", process_group="world")]
    return nn.Sequential(*layers, nn.Linear(40, digits.CLASSES)).double()


def shares(ranks: int) -> list[int]:
    """How many images of a batch each rank takes: different numbers, to show that it does not matter."""
    even = BATCH // ranks
    sizes = [even - 7 if rank % 2 == 0 else even + 7 for rank in range(ranks)]
    sizes[-1] += BATCH - sum(sizes)
    return sizes


def train(model: nn.Module, data: digits.Digits, rank: int, sizes: list[int]) -> None:
    """SGD on this rank's share of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    order = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randperm(len(data.train_images), generator=order)[:BATCH]
        mine = batch.split(sizes)[rank]
        loss = nn.functional.cross_entropy(
            model(data.train_images[mine].double()), data.train_labels[mine], reduction="sum"
        )
        # DistributedDataParallel averages the gradients of the ranks. The mean over the whole batch is their sum.
        optimizer.zero_grad()
        (loss * len(sizes) / BATCH).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: digits.Digits) -> float:
    model.eval()
    return float((model(data.test_images.double()).argmax(1) == data.test_labels).double().mean())


def main() -> None:
    launched = "RANK" in os.environ  # torchrun sets it
    if launched:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    data = digits.load("digits")
    model = network()
    twin = bn.convert(copy.deepcopy(model), process_group=None)  # the same without an exchange

    sizes = shares(ranks)
    train(DistributedDataParallel(model) if launched else model, data, rank, sizes)
    if rank == 0:
        print(f"{ranks} ranks, batches of {' and '.join(map(str, sizes))} images")
        print(f"accuracy on the test images: {accuracy(model, data):.3f}")
        train(twin, data, 0, [BATCH])
        differences: list[Tensor] = [
            (ours - theirs).abs().max().double()
            for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
        ]
        largest = float(max(differences))
        print(f"weights and running statistics, largest difference from one process: {largest:.1e}")
        assert largest < 1e-9
    if launched:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
