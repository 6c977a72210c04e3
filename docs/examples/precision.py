"""How far the output of a training step is from the float64 result, when the mean is far from zero.

Run it: python docs/examples/precision.py
"""

import torch

import batchnorm as bn


def error(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Largest distance of the layer's output from that of the same input normalized in float64."""
    wide = x.double()
    mean = wide.mean((0, 2, 3), keepdim=True)
    var = (wide - mean).square().mean((0, 2, 3), keepdim=True)
    exact = (wide - mean) / (var + layer.eps).sqrt()
    return float((layer(x).detach() - exact).abs().max())


torch.manual_seed(0)
print(f"{'mean':>8}  {'layout':<14} {'torch.nn':>9}  {'batchnorm':>9}")
for mean in (0.0, 1e4, 1e6):
    x = torch.randn(32, 64, 28, 28) + mean
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = x.to(memory_format=layout)
        theirs, ours = error(torch.nn.BatchNorm2d(64), laid), error(bn.BatchNorm2d(64), laid)
        name = str(layout).removeprefix("torch.")
        print(f"{mean:>8.0e}  {name.removesuffix('_format'):<14} {theirs:>9.1e}  {ours:>9.1e}")
        assert ours < 5e-6
