"""Where the activation was given NaN the kernels' gradient is torch's, in every layout, vector and tail."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import cpu
from batchnorm.kernels.activations import activation
from batchnorm.kernels.contract import Needs

SLOPE = 0.2
SHAPES = [(9, 5, 49), (6, 35, 2), (3, 5, 300), (2, 3, 9001), (67, 5), (301, 37), (40, 131)]


def torchs_gradient(name: str, dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    z = z.to(dy.dtype).requires_grad_()
    y = torch.relu(z) if name == "relu" else torch.nn.functional.leaky_relu(z, SLOPE)
    return torch.autograd.grad(y, z, dy)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_has_torchs_gradient(
    dtype: torch.dtype, shape: tuple[int, ...], name: str, residual: bool, masked: bool
) -> None:
    """Some values are NaN; the statistics are constants, so that NaN stays where it is."""
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x[torch.rand(shape) < 0.3] = torch.nan
    z = x.double()
    y = None
    if residual:
        more = torch.randn(shape).to(dtype)
        more[torch.rand(shape) < 0.3] = torch.nan
        z = z + more.double()
        y = (torch.relu(z) if name == "relu" else torch.nn.functional.leaky_relu(z, SLOPE)).to(dtype)
    stats = torch.stack((torch.zeros(shape[1]), torch.ones(shape[1]))).double()
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.2 if masked else None
    _, _, _, dresidual = cpu.backward(
        dy, x, stats, 0.0, None, None, training=False, y=y, mask=mask,
        activation=activation(name, SLOPE), needs=Needs(True, False, False, True),
    )  # fmt: skip
    expected = torchs_gradient(name, dy, z)
    if mask is not None:
        expected = expected.masked_fill(~mask, 0)
    assert dresidual is not None
    assert torch.isnan(z).any()
    assert torch.equal(dresidual, expected)
