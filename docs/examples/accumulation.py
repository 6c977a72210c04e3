"""Gradient accumulation with batch normalization: three ways beside the large batch, what each gives and costs.

The large batch does not fit into memory, so it comes in micro-batches. Plain accumulation normalizes and counts each
micro-batch by itself. `accumulate_statistics` counts them as one batch. `exact_accumulation` normalizes by the whole
as well, so that its gradients are those of the large batch; it pays with time. Memory is the most that PyTorch has
allocated at any moment beyond what was there before, times are of this machine, now, in CPU time of the thread.
"""

import copy
import time
from statistics import median

import torch
from torch import nn

import batchnorm as bn
from batchnorm.bench.memory import peak

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # so that rounding does not hide what is exact


def block(channels):
    """A block that begins with its norm: nothing has to be run to measure it."""
    return nn.Sequential(bn.BatchNorm2d(channels, activation="relu"), nn.Conv2d(channels, channels, 3, padding=1))


model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    *(block(16) for _ in range(6)),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 10)),
)
x, target = torch.randn(32, 3, 24, 24), torch.randint(10, (32,))
micro_batches = list(zip(x.split(4), target.split(4), strict=True))  # of any sizes; these are 8 of 4
loss_fn = nn.functional.cross_entropy


def large_batch(model):
    loss_fn(model(x), target).backward()


def plain(model):
    for x, target in micro_batches:
        (loss_fn(model(x), target) / len(micro_batches)).backward()


def statistics_once(model):
    with bn.accumulate_statistics(model):
        plain(model)


def exactly(model):
    bn.exact_accumulation(model, micro_batches, loss_fn)


def measured(step):
    """The gradients of a step, its peak of memory in MiB and its seconds."""
    twin = copy.deepcopy(model)
    step(twin)
    grads, layer = torch.cat([p.grad.flatten() for p in twin.parameters()]), twin[1][0]
    twin.zero_grad()
    seconds = []
    for _ in range(5):
        begun = time.thread_time()
        step(twin)
        seconds.append(time.thread_time() - begun)
        twin.zero_grad()
    return grads, layer, peak(lambda: step(twin)) / 2**20, median(seconds)


results = {step.__name__: measured(step) for step in (large_batch, plain, statistics_once, exactly)}
grads, layer, mebibytes, seconds = results["large_batch"]
print("                     gradients off by   first layer's variance   updates   memory     time")
for name, (found, norm, most, took) in results.items():
    off = float((found - grads).norm() / grads.norm())
    print(
        f"{name:18} {off:16.1e} {float(norm.running_var.mean()):22.4f} {1 if name != 'plain' else 8:10}"
        f" {most:7.1f} MiB {took / seconds:6.2f}x"
    )
assert float((results["exactly"][0] - grads).norm() / grads.norm()) < 1e-10
assert torch.allclose(results["exactly"][1].running_var, layer.running_var)
assert torch.allclose(results["statistics_once"][1].running_var, layer.running_var)
assert not torch.allclose(results["plain"][1].running_var, layer.running_var, rtol=1e-3)
assert results["exactly"][2] < mebibytes
torch.set_default_dtype(torch.float32)
