"""Values near the largest numbers: what torch's layer has finite is finite and right, and nothing becomes NaN."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.kernels import cpu, eager
from batchnorm.kernels.activations import activation
from batchnorm.kernels.contract import Needs, Running
from tolerances import to_float64

KERNELS = [pytest.param(cpu, id="cpu"), pytest.param(eager, id="eager")]
ALL = Needs(True, True, True, False)
# Short and long rows, rows in segments, few channels for two threads, channels inside; the last two: channels_last.
SHAPES = [(9, 5, 49), (6, 4, 300), (3, 2, 9001), (67, 5), (301, 37), (3, 3000), (6, 40, 5, 7), (4, 3, 9, 9)]


def values(shape: tuple[int, ...], largest: float, dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
    """Uniform up to the largest in the first channel, about one in the second, in between in the others."""
    x = torch.rand(shape, dtype=torch.float64) * 2 - 1
    per_channel = [1.0, 0.0, 0.5, 0.25]
    power = torch.tensor([per_channel[c % 4] for c in range(shape[1])], dtype=torch.float64)
    size = (largest**power).view(1, -1, *(1,) * (len(shape) - 2))
    x = ((x * (1 - offset) + offset) * size).to(dtype)
    assert x.isfinite().all()
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def exact(x: torch.Tensor, dy: torch.Tensor, w: Any, b: Any, eps: float) -> dict[str, np.ndarray[Any, Any]]:
    """Forward and backward in long double, whose range squares do not leave."""
    dims = (0, *range(2, x.dim()))
    v = x.double().numpy().astype(np.longdouble)
    g = dy.double().numpy().astype(np.longdouble)
    along = (1, -1, *(1,) * (x.dim() - 2))
    w, b = (to_float64(t).reshape(along) for t in (w, b))
    mean = v.mean(dims, keepdims=True)
    d = v - mean
    var = (d * d).mean(dims, keepdims=True)
    invstd = 1 / np.sqrt(var + eps)
    xhat = d * invstd
    count = v.size // v.shape[1]
    dbias, dweight = g.sum(dims, keepdims=True), (g * xhat).sum(dims, keepdims=True)
    dx = w * invstd * (g - (dbias + xhat * dweight) / count)
    flat = {"mean": mean, "var": var, "dbias": dbias, "dweight": dweight, "invstd": invstd}
    return {"y": xhat * w + b, "dx": dx, **{name: t.reshape(-1) for name, t in flat.items()}}


def close(got: torch.Tensor, expected: Any, tolerance: float, scale: Any = None) -> None:
    found = to_float64(got).astype(np.longdouble)
    assert np.isfinite(found).all()
    size = np.abs(expected) if scale is None else scale
    assert (np.abs(found - expected) <= tolerance * size).all(), np.abs((found - expected) / size).max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_large_values_of_short_dtypes(
    kernel: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], offset: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    x, dy = values(shape, 3e38, dtype, offset), torch.randn(shape).to(dtype)
    channels = shape[1]
    weight, bias = torch.randn(channels), torch.randn(channels)
    running = Running(torch.ones(channels), torch.ones(channels), 0.1)
    expected = exact(x, dy, weight, bias, 1e-5)
    y, stats = kernel.forward(x, weight, bias, 1e-5, running=running)
    dx, dweight, dbias, _ = kernel.backward(dy, x, stats, 1e-5, weight, bias, training=True, needs=ALL)

    close(stats[0], expected["mean"], 1e-6, np.sqrt(expected["var"]))
    close(stats[1], expected["var"], 1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    close(y, expected["y"], 2 * rounding, np.abs(expected["y"]).max())
    # 1 / 3e38 is subnormal in float32 and bfloat16: there dx has fewer digits, or is 0.
    along = (1, -1, *(1,) * (x.dim() - 2))
    size = np.abs(to_float64(weight) * expected["invstd"]).reshape(along) * 5
    tiny = np.longdouble(2.0) ** (-150 if dtype == torch.float32 else -134)
    close(dx, expected["dx"], 4 * rounding, size + tiny / (4 * rounding))
    close(dbias, expected["dbias"], 1e-5, np.abs(to_float64(dy)).sum(tuple(d for d in range(x.dim()) if d != 1)))
    close(
        dweight, expected["dweight"], 1e-5, 2 * np.abs(to_float64(dy)).sum(tuple(d for d in range(x.dim()) if d != 1))
    )

    layer = torch.nn.BatchNorm1d(channels) if x.dim() < 4 else torch.nn.BatchNorm2d(channels)
    layer.running_mean.fill_(1.0)  # type: ignore[union-attr,operator]
    layer(x.float())
    # In some layouts torch itself overflows where the result does not.
    close(running.mean, 0.9 + 0.1 * expected["mean"], 1e-6, 1 + np.abs(expected["mean"]) + np.sqrt(expected["var"]))
    assert not (running.var.isinf() & layer.running_var.isfinite()).any()  # type: ignore[union-attr,operator]
    count = x.numel() // channels
    kept = 0.9 + 0.1 * expected["var"] * count / (count - 1)
    fits = kept < 3.4e38
    assert np.array_equal(running.var.isfinite().numpy(), fits)
    close(running.var[torch.from_numpy(fits)], kept[fits], 1e-6)
    assert not running.var.isnan().any()
    # Once more: an infinite running variance stays infinite, as torch's does.
    kernel.forward(x, weight, bias, 1e-5, running=running)
    assert not running.var.isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_large_values_of_float64(kernel: ModuleType, shape: tuple[int, ...]) -> None:
    """Up to 1e150 all is right. At 1e200 the variance is inf, as torch's is; then y is the bias, and dx is 0."""
    x, dy = values(shape, 1e150, torch.float64), torch.randn(shape, dtype=torch.float64)
    channels = shape[1]
    weight, bias = torch.randn(channels).double(), torch.randn(channels).double()
    expected = exact(x, dy, weight, bias, 1e-5)
    y, stats = kernel.forward(x, weight, bias, 1e-5)
    dx, dweight, dbias, _ = kernel.backward(dy, x, stats, 1e-5, weight, bias, training=True, needs=ALL)
    close(stats[1], expected["var"], 1e-12)
    close(y, expected["y"], 1e-12, np.abs(expected["y"]).max())
    along = (1, -1, *(1,) * (x.dim() - 2))
    close(dx, expected["dx"], 1e-12, np.abs(to_float64(weight) * expected["invstd"]).reshape(along) * 5)
    sizes = np.abs(to_float64(dy)).sum(tuple(d for d in range(x.dim()) if d != 1))
    close(dweight, expected["dweight"], 1e-12, 2 * sizes)

    x = values(shape, 1e200, torch.float64)
    running = Running(torch.ones(channels).double(), torch.ones(channels).double(), 0.1)
    y, stats = kernel.forward(x, weight, bias, 1e-5, running=running)
    dx, dweight, dbias, _ = kernel.backward(dy, x, stats, 1e-5, weight, bias, training=True, needs=ALL)
    layer = (torch.nn.BatchNorm1d(channels) if x.dim() < 4 else torch.nn.BatchNorm2d(channels)).double()
    layer.running_mean.fill_(1.0)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        torchs = layer(x)
    torch.testing.assert_close(running.mean, layer.running_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(running.var, layer.running_var, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, torchs, rtol=1e-9, atol=1e-9)
    for found in (dx, dweight, dbias):
        assert found is not None
        assert found.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_second_step_with_infinite_running_variance(kernel: ModuleType, shape: tuple[int, ...]) -> None:
    running = Running(torch.zeros(shape[1]), torch.full((shape[1],), math.inf), 0.1)
    kernel.forward(torch.randn(shape), None, None, 1e-5, running=running)
    assert running.var.isinf().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_with_large_statistics(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """x - mean overflows float32 where the result is about one; in place too."""
    x = values(shape, 3e38, dtype)
    mean = torch.full((shape[1],), -2e38)
    var = torch.full((shape[1],), 3e38)
    weight = torch.full((shape[1],), 1e-19)
    along = (1, -1, *(1,) * (x.dim() - 2))
    expected = (x.double() - mean.double().view(along)) * (weight.double() / (var.double() + 1e-5).sqrt()).view(along)
    for out in (None, x):
        y = cpu.normalize(x, mean, var, 1e-5, weight, None, activation=activation(None), out=out)
        torch.testing.assert_close(y.double(), expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_large_gradients_overflow_no_sum(shape: tuple[int, ...]) -> None:
    """Sums over dy that leave float32 on the way, and come back."""
    x, dy = torch.randn(shape), torch.full(shape, 3e38)
    dy[1::2] *= -1
    _, stats = cpu.forward(x, None, None, 1e-5)
    weight, bias = torch.full((shape[1],), 1e-10), torch.zeros(shape[1])
    dx, _, dbias, _ = cpu.backward(dy, x, stats, 1e-5, weight, bias, training=True, needs=ALL)
    expected = exact(x, dy, weight, bias, 1e-5)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    assert dx is not None
    assert dbias is not None
    close(dx, expected["dx"], 1e-5, np.abs(expected["dx"]).max())
    fits = np.abs(expected["dbias"]) < 3.4e38
    assert np.array_equal(dbias.isfinite().numpy(), fits)
    sizes = np.abs(to_float64(dy)).sum(dims)
    close(dbias[torch.from_numpy(fits)], expected["dbias"][fits], 1e-6, sizes[fits])
