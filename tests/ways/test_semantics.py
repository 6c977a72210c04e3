"""Small things that torch's function and layers do: odd arguments, extreme values, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.functional import batch_norm
from tolerances import assert_close, to_float64
from ways.common import OURS, TORCHS, both_modes, data, same

way = pytest.mark.way
WHERE = "arguments and values"


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    try:
        return "gives", function(*args, **kwargs)
    except Exception as error:
        return "raises", error


@way(WHERE, "`eps` of 0 or below, in training and eval", "torch's error, word for word, or torch's result")
@both_modes
@pytest.mark.parametrize("eps", [0.0, -0.5, -1e-5])
def test_eps_that_is_not_positive(eps: float, training: bool) -> None:
    found = []
    for kinds in (OURS, TORCHS):
        layer = kinds[2](3, eps=eps, dtype=torch.float64).train(training)
        found.append(outcome(layer, data()))
    if found[1][0] == "raises":
        assert found[0][0] == "raises"
        assert str(found[0][1]) == str(found[1][1])
        assert isinstance(found[0][1], type(found[1][1]))
    else:
        same(found[0][1], found[1][1])


@way(WHERE, "an input of shape (0,) to the function, as in PyTorch's own samples", "an empty result, as torch")
@both_modes
@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 4), (2, 0), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_inputs(shape: tuple[int, ...], training: bool) -> None:
    channels = shape[1] if len(shape) > 1 else 0
    found = []
    for function in (batch_norm, nn.functional.batch_norm):
        mean, var = torch.ones(channels), torch.full((channels,), 2.0)
        x = torch.zeros(shape, requires_grad=True)
        kind, given = outcome(function, x, mean, var, training=training)
        if kind == "gives":
            (dx,) = torch.autograd.grad(given, x, torch.zeros_like(given))
            given = given.detach(), dx
        found.append((kind, given, mean, var))
    if found[1][0] == "raises":
        assert found[0][0] == "raises" or found[0][1][0].shape == shape
    else:
        assert found[0][0] == "gives", found[0][1]
        same(found[0][1], found[1][1])
    # A batch without values changes nothing.
    same(found[0][2:], (torch.ones(channels), torch.full((channels,), 2.0)))


LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def in_layout(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


@way(WHERE, "values whose squares overflow, whose result does not", "right")
@LAYOUTS
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e19), ("float64", 1e153)])
def test_large_values(dtype: str, size: float, layout: str) -> None:
    values = data(8, 3, 4, 4).clamp(-1, 1)
    layer = OURS[2](3, dtype=getattr(torch, dtype))
    y = layer(in_layout((values * size).to(layer.weight.dtype), layout))
    # The same in a size that overflows nowhere.
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    expected = (values - mean[:, None, None]) / var.sqrt()[:, None, None]
    assert_close(y.detach(), to_float64(expected), dtype=dtype, quantity="y", scale=10.0)
    scale = to_float64(var.sqrt() * size)
    assert_close(layer.running_mean, to_float64(0.1 * mean * size), dtype=dtype, quantity="running_mean", scale=scale)
    unbiased = to_float64(var * size * (128 / 127) * size * 0.1)
    assert_close(layer.running_var, unbiased, dtype=dtype, quantity="running_var")


@way(WHERE, "values up to 3e38 in float32, 1e200 in float64", "finite; the running variance infinite, not NaN")
@LAYOUTS
@pytest.mark.parametrize(("dtype", "size"), [("float32", 3e38), ("float64", 1e200)])
def test_values_near_the_end_of_the_range(dtype: str, size: float, layout: str) -> None:
    values = data(8, 3, 4, 4).clamp(-1, 1)
    layer = OURS[2](3, dtype=getattr(torch, dtype))
    y = layer(in_layout((values * size).to(layer.weight.dtype), layout))
    assert bool(torch.isfinite(y).all())
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
    expected, scale = to_float64(0.1 * mean * size), to_float64(std * size)
    assert_close(layer.running_mean, expected, dtype=dtype, quantity="running_mean", scale=scale)
    assert layer.running_var is not None
    assert bool(torch.isinf(layer.running_var).all())


@way(WHERE, "values whose squares overflow, whose variance does not", "finite, where torch's statistics are finite")
@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_mean_and_a_moderate_variance(dtype: torch.dtype, training: bool) -> None:
    size = 1e19 if dtype == torch.float32 else 1e154
    x = torch.stack([torch.full((6,), v, dtype=dtype) for v in (size, 0.5, -3 * size)], 1)
    x[:, 1] = torch.linspace(-1, 1, 6)
    found = []
    for kinds in (OURS, TORCHS):
        layer = kinds[1](3, dtype=dtype).train(training)
        y = layer(x)
        found.append((y.detach(), layer.running_mean, layer.running_var))
    for ours, torchs in zip(*found, strict=True):
        assert bool((torch.isfinite(ours) | ~torch.isfinite(torchs)).all())


@way(WHERE, "NaN and Inf in the input", "reach what they reach with torch's layer")
@both_modes
@LAYOUTS
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_nan_reaches_what_it_reaches_with_torch(activation: str | None, layout: str, training: bool) -> None:
    x = data(4, 3, 5, 2)
    x[1, 1, 2, 0], x[2, 2, 0, 0] = float("nan"), float("inf")
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    after = {None: nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.25)}[activation]
    options: dict[str, Any] = {} if activation is None else {"activation": activation, "negative_slope": 0.25}
    found = []
    for layer in (OURS[2](3, dtype=x.dtype, **options), nn.Sequential(TORCHS[2](3, dtype=x.dtype), after)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer.train(training)(leaf)
        (dx,) = torch.autograd.grad(y, leaf, data(seed=3))
        found.append((y.detach(), dx))
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), torchs.isnan())
        clean = ~(torchs.isnan() | torchs.isinf())
        same(ours[clean], torchs[clean], "dx")


@way(WHERE, "leaky ReLU's gradient at NaN", "slope·dy, in every layout, as torch's")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leaky_relu_at_nan(dtype: torch.dtype, layout: str) -> None:
    x = data(4, 3, 5, 2, dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    x[0, 1, 2, 1] = float("nan")
    bias, mean, var = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    found = []
    for act in ("ours", "torch"):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        if act == "ours":
            y = batch_norm(leaf, mean, var, None, bias, eps=0.0, activation="leaky_relu", negative_slope=0.25)
        else:
            y = nn.functional.leaky_relu(nn.functional.batch_norm(leaf, mean, var, None, bias, eps=0.0), 0.25)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        found.append(dx)
    same(found[0], found[1], "dx")
    assert float(found[0][0, 1, 2, 1]) == 0.25


@way(WHERE, "a batch of one value a channel, channels that do not fit, a wrong rank", "torch's errors, word for word")
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (3,), (2, 3, 4, 4)], ids=str)
@both_modes
def test_errors_of_shape(shape: tuple[int, ...], training: bool) -> None:
    found = [outcome(kinds[1](3).train(training), torch.zeros(shape)) for kinds in (OURS, TORCHS)]
    assert found[0][0] == found[1][0]
    if found[1][0] == "raises":
        assert str(found[0][1]) == str(found[1][1])


@way(WHERE, "wide matrices, (2, 10⁶)", "right (its speed is in the benchmark)")
@both_modes
def test_a_wide_matrix(training: bool) -> None:
    x = torch.randn(2, 100_003, dtype=torch.float32)
    mean, var = torch.zeros(100_003), torch.ones(100_003)
    y = batch_norm(x, mean, var, training=training)
    statistics: Tensor | None = None if training else torch.zeros(100_003, dtype=torch.float64)
    wide = x.double()
    center = wide.mean(0) if statistics is None else statistics
    spread = wide.var(0, correction=0) if training else torch.ones(100_003, dtype=torch.float64)
    expected = (wide - center) / torch.sqrt(spread + 1e-5)
    assert_close(y, to_float64(expected), dtype="float32", quantity="y", scale=10.0)
