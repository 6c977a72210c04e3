"""What a call costs beside its kernel: fresh memory, and the way through Python.

Counts page faults of a training step with a large input. Then takes a step with a small input apart: torch's layer,
ours, an autograd function that does nothing but allocate what a normalization gives back, and our kernels called
without a layer, a check or autograd. Times are of this machine, now, in CPU time of the thread, so that other
processes count little.
"""

import resource
import time
from statistics import median

import torch

import batchnorm as bn
from batchnorm.kernels import choose
from batchnorm.kernels.contract import Needs


class Nothing(torch.autograd.Function):
    """Three inputs, three gradients, no arithmetic."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def faults_of(layer, x, dy):
    """Page faults of a forward and backward, once everything has been called before."""
    for _ in range(3):
        x.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer(x).backward(dy)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def microseconds_of(functions, x, dy, rounds=2000):
    """Of a forward and backward of each, in turn; the medians."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (function, parameters) in functions.items():
            begun = time.thread_time()
            function(x, dy)
            times[name].append(1e6 * (time.thread_time() - begun))
            for t in (x, *parameters):
                t.grad = None
    return {name: median(of_one) for name, of_one in times.items()}


layers = {"torch.nn": torch.nn.BatchNorm2d(64), "batchnorm": bn.BatchNorm2d(64)}
x = torch.randn(16, 64, 112, 112, requires_grad=True)
dy = torch.randn_like(x)
for name, layer in layers.items():
    print(f"{name}: {faults_of(layer, x, dy)} page faults a step on {tuple(x.shape)}")

x = torch.randn(60, 100, requires_grad=True)
dy = torch.randn_like(x)
weight, bias = torch.ones(100, requires_grad=True), torch.zeros(100, requires_grad=True)
layers = {"torch.nn": torch.nn.BatchNorm1d(100), "batchnorm": bn.BatchNorm1d(100)}


def step(layer):
    return lambda x, dy: layer(x).backward(dy)


def kernels_alone(x, dy):
    """Forward and backward of the kernel that ``explain`` names."""
    with torch.no_grad():
        kernel = choose(x)
        _, stats = kernel.forward(x, weight, bias, 1e-5)
        kernel.backward(dy, x, stats, 1e-5, weight, bias, training=True, needs=Needs(True, True, True, False))


functions = {name: (step(layer), list(layer.parameters())) for name, layer in layers.items()}
functions["a function that only allocates"] = (step(lambda x: Nothing.apply(x, weight, bias)), [weight, bias])
functions["batchnorm's kernels, called directly"] = (kernels_alone, [])
for name, microseconds in microseconds_of(functions, x, dy).items():
    print(f"{name}: {microseconds:.0f} µs a step on (60, 100)")
