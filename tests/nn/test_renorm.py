"""Batch renormalization through the layers."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm.errors import ArgumentError
from conformance import ON_THE_CPU
from tolerances import assert_close, to_float64

NOW = (0, 0, 0)
EPS = 1e-3
WAYS = [*ON_THE_CPU, "composite", "torch.compile"]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(renorm: bn.Renorm | None, dtype: torch.dtype = torch.float64, **options: Any) -> bn.BatchNorm2d:
    """A layer whose running statistics are not those of the data."""
    layer = bn.BatchNorm2d(3, EPS, renorm=renorm, **options)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if t is not None:
                t.copy_(torch.rand(3, generator=draw) + 0.5)
    return layer.double() if dtype == torch.float64 else layer


def data(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(6, 3, 4, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    return (2 * x + 1).to(dtype), dy.to(dtype)


def run(way: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    if way == "torch.compile":
        y: Tensor = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args, **kwargs)
        return y
    with bn.use_backend(way):
        y = layer(*args, **kwargs)
        return y


def formula(layer: bn.BatchNorm2d, x: Tensor, r_max: float, d_max: float) -> Tensor:
    """Ioffe 2017, Algorithm 1, in ordinary operations on the layer's state before the forward."""
    shape = (1, -1, 1, 1)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    std, running_std = (var + EPS).sqrt(), (layer.running_var.clone() + EPS).sqrt()
    r = (std / running_std).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean.clone()) / running_std).clamp(-d_max, d_max).detach()
    z = (x - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)
    return z * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.2, 0.1), (1.0, 5.0), (3.0, 0.0)])
@pytest.mark.parametrize("way", WAYS)
def test_forward_and_gradients_are_the_papers(way: str, r_max: float, d_max: float) -> None:
    x, dy = data()
    layer = layer_of(bn.Renorm(r_max, d_max, NOW))
    twin = copy.deepcopy(layer)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = run(way, layer, leaf), formula(twin, other, r_max, d_max)
    assert_close(y, to_float64(expected), dtype="float64", quantity="y")
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    right = torch.autograd.grad(expected, [other, *twin.parameters()], dy)
    for quantity, a, b in zip(("dx", "dweight", "dbias"), grads, right, strict=True):
        assert_close(a, to_float64(b), dtype="float64", quantity=quantity, scale=None if quantity == "dx" else 50.0)


@pytest.mark.parametrize("way", WAYS)
def test_the_statistics_move_as_without(way: str) -> None:
    x, _ = data()
    layer, plain = layer_of(bn.Renorm(warmup=NOW)), layer_of(None)
    run(way, layer, x)
    plain(x)
    for name, t in plain.state_dict().items():
        assert_close(layer.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)
    assert int(layer.renorm_steps) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": "gelu"}, {"affine": False}], ids=str)
@pytest.mark.parametrize("renorm", [bn.Renorm(1, 0, NOW), bn.Renorm(3, 5)], ids=["no limits", "in the warm-up"])
def test_without_correction_it_is_plain_batch_normalization_bit_for_bit(
    renorm: bn.Renorm, options: dict[str, Any], dtype: torch.dtype
) -> None:
    x, dy = data(dtype)
    layer, plain = layer_of(renorm, dtype, **options), layer_of(None, dtype, **options)
    results = []
    for each in (layer, plain):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *each.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for name, t in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_low_precision_is_the_float64_result_rounded(way: str, dtype: torch.dtype) -> None:
    x, dy = data(dtype)
    layer = layer_of(bn.Renorm(1.3, 0.2, NOW), dtype)
    wide = copy.deepcopy(layer).double()
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = run(way, layer, leaf), wide(other)
    assert_close(y, to_float64(expected), dtype=dtype, quantity="y")
    (dx,), (right,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(expected, other, dy.double())
    assert_close(dx, to_float64(right), dtype=dtype, quantity="dx")


@pytest.mark.parametrize("way", WAYS)
def test_with_residual_mask_weights_and_activation(way: str) -> None:
    x, dy = data()
    mask = torch.arange(4 * 2).view(4, 2).expand(6, 4, 2) % 3 > 0
    x = x.masked_fill(~mask[:, None], torch.nan)
    residual, weights = data(seed=3)[0], torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    layer = layer_of(bn.Renorm(1.5, 0.4, NOW), activation="relu")
    running = [t.clone() for t in (layer.running_mean, layer.running_var) if t is not None]
    leaf = x.clone().requires_grad_()
    y = run(way, layer, leaf, residual, mask, weights)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    # The same with r and d put into weight and bias by hand, in float64.
    found = bn.Moments.from_tensor(x, mask=mask, sample_weight=weights)
    std = (running[1] + EPS).sqrt()
    r = ((found.variance() + EPS).sqrt() / std).clamp(1 / 1.5, 1.5)
    d = ((found.mean - running[0]) / std).clamp(-0.4, 0.4)
    other = x.clone().requires_grad_()
    expected = bn.functional.batch_norm(
        other, None, None, layer.weight.detach() * r, layer.weight.detach() * d + layer.bias.detach(), True, eps=EPS,
        mask=mask, sample_weight=weights, residual=residual, activation="relu",
    )  # fmt: skip
    assert_close(y, to_float64(expected), dtype="float64", quantity="y")
    assert_close(dx, to_float64(torch.autograd.grad(expected, other, dy)[0]), dtype="float64", quantity="dx")


@pytest.mark.parametrize("way", ["cpu", "eager", "composite"])
def test_derivatives_of_first_and_second_order(way: str) -> None:
    layer = layer_of(bn.Renorm(1.3, 0.2, NOW), momentum=0.0).requires_grad_(False)
    x = data()[0][:3, :, :2].clone().requires_grad_()
    # gradcheck's differences move r and d, the gradient takes them for constants: hold them at their limits.
    with bn.use_backend(way):
        layer.running_var.fill_(30.0)  # type: ignore[union-attr]
        layer.running_mean.fill_(-9.0)  # type: ignore[union-attr]
        assert gradcheck(layer, x)
        assert gradgradcheck(layer, x)


def test_unlimited_training_is_what_eval_mode_gives() -> None:
    x, _ = data()
    layer = layer_of(bn.Renorm(1e6, 1e6, NOW))
    expected = copy.deepcopy(layer).eval()(x)
    assert_close(layer(x), to_float64(expected), dtype="float64", quantity="y")


def test_eval_mode_is_plain() -> None:
    x, _ = data()
    layer, plain = layer_of(bn.Renorm(warmup=NOW)).eval(), layer_of(None).eval()
    assert torch.equal(layer(x), plain(x))
    assert int(layer.renorm_steps) == 0


# The schedule


def test_the_limits_are_the_papers_schedule() -> None:
    renorm = bn.Renorm()
    assert renorm.limits(0) == renorm.limits(5_000) == (1, 0)
    assert renorm.limits(25_000) == (1 + 2 * 20 / 35, 5)
    assert renorm.limits(40_000) == renorm.limits(10**9) == (3, 5)
    assert bn.Renorm(2, 1, NOW).limits(0) == (2, 1)
    assert bn.Renorm(2, 1, (3, 3, 3)).limits(2) == (1, 0)
    assert bn.Renorm(2, 1, (3, 3, 3)).limits(3) == (2, 1)


@pytest.mark.parametrize("warmup", [(5_000, 40_000, 25_000), NOW, (3, 3, 7), (0, 10, 5)])
def test_limits_without_a_look_at_the_steps_are_the_same(warmup: tuple[int, int, int]) -> None:
    renorm = bn.Renorm(3, 5, warmup)
    for steps in (0, 1, 3, 5, 7, 10, 5_001, 25_000, 33_333, 40_000, 100_000):
        found = renorm._limit_tensors(torch.tensor(steps), torch.float64)
        assert [float(limit) for limit in found] == pytest.approx(renorm.limits(steps), rel=1e-15)


def test_the_schedule_is_walked_by_training_and_survives_every_copy() -> None:
    x, _ = data()
    layer = layer_of(bn.Renorm(3, 5, (1, 4, 4)))
    layer(x)
    layer.eval()(x)
    layer.train()(x)
    layer(x.new_empty(0, 3, 4, 2))
    assert int(layer.renorm_steps) == 2
    held = io.BytesIO()
    torch.save(layer.state_dict(), held)
    held.seek(0)
    other = layer_of(bn.Renorm(3, 5, (1, 4, 4)))
    other.load_state_dict(torch.load(held, weights_only=True))
    copies = [other, copy.deepcopy(layer)]
    expected = layer(x)
    for each in copies:
        assert torch.equal(each(x), expected)
        assert int(each.renorm_steps) == 3
    layer.reset_running_stats()
    assert int(layer.renorm_steps) == 0


def test_checkpoints_of_plain_batch_normalization_load_strictly_and_leave_the_count() -> None:
    layer = layer_of(bn.Renorm())
    layer.renorm_steps.fill_(7)
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert int(layer.renorm_steps) == 7
    assert "renorm_steps" not in bn.BatchNorm2d(3).state_dict()


def test_a_compiled_layer_walks_the_schedule_without_compiling_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = layer_of(bn.Renorm(3, 5, (1, 3, 3)))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(5):
        x, _ = data(seed=seed)
        assert_close(compiled(x), to_float64(twin(x)), dtype="float64", quantity="y")
    assert counter.frame_count == 1
    assert int(layer.renorm_steps) == int(twin.renorm_steps) == 5


def test_a_failed_forward_counts_no_step() -> None:
    layer = layer_of(bn.Renorm(warmup=NOW), nonfinite="raise")
    with pytest.raises(bn.BatchNormError):
        layer(torch.full((2, 3, 4, 4), torch.nan, dtype=torch.float64))
    assert int(layer.renorm_steps) == 0


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"r_max": 0.9},
            "Renorm: expected a finite r_max of 1 or more, got 0.9. 1 switches the correction of the scale off.",
        ),
        (
            {"r_max": float("inf")},
            "Renorm: expected a finite r_max of 1 or more, got inf. 1 switches the correction of the scale off.",
        ),
        (
            {"d_max": -1},
            "Renorm: expected a finite d_max of 0 or more, got -1. 0 switches the correction of the shift off.",
        ),
        (
            {"warmup": 500},
            "Renorm: expected a warmup of three numbers of steps, got 500. "
            "Give (plain, steps until r_max, steps until d_max); (0, 0, 0) is no warm-up.",
        ),
        (
            {"warmup": (5, 4, 9)},
            "Renorm: expected a warmup whose plain steps come first, got (5, 4, 9). "
            "All three count from the start of training.",
        ),
    ],
)
def test_limits_and_schedules_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        bn.Renorm(**arguments)
    assert str(caught.value) == message


def test_renorm_is_shown_and_not_lost() -> None:
    layer = bn.BatchNorm2d(3, renorm=bn.Renorm(2, 1, NOW))
    assert "renorm=Renorm(r_max=2, d_max=1, warmup=(0, 0, 0))" in repr(layer)
    reports: list[Any] = []
    model = bn.revert(nn.Sequential(layer), report=reports.append)
    assert model[0] is layer
    assert "has nothing for renorm=Renorm(r_max=2" in str(reports[0])
    scripted = torch.jit.script(layer.eval())
    assert torch.equal(scripted(data(torch.float32)[0]), layer(data(torch.float32)[0]))
    with pytest.raises(Exception, match="TorchScript trains without process_group, renorm and virtual_batch_size"):
        scripted.train()(data(torch.float32)[0])
