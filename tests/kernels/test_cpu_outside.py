"""The kernels for channels outside (NCHW), each against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu import outside
from kernels.cpu_call import call, outside_backward, outside_forward
from tolerances import assert_close, silence_kinks, to_float64

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = {"identity": slots.IDENTITY, "relu": slots.RELU, "leaky_relu": slots.LEAKY_RELU}
# Short rows, long rows, rows cut into segments, rows and batches that end within a vector, one value of each.
SHAPES = [
    (32, 3, 1), (5, 65, 1), (2, 3, 7), (32, 64, 7), (16, 65, 49), (7, 65, 49), (32, 33, 49), (300, 5, 49),
    (9, 5, 197), (21, 5, 197), (1, 3, 49), (16, 3, 256), (17, 3, 1024), (16, 2, 1025), (4, 3, 257),
    (32, 1, 400), (3, 2, 3000), (2, 3, 50176), (1, 1, 20011), (2100, 2, 1), (1, 2, 2),
]  # fmt: skip


class Case:
    """Tensors of one call and what the reference makes of them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        mean: float = 0.0,
        activation: str = "identity",
        residual: bool = False,
        training: bool = True,
        affine: bool = True,
    ) -> None:
        channels = shape[1]
        half = dtype in (torch.bfloat16, torch.float16)
        parameter = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype, self.activation = dtype, activation
        self.x = (torch.randn(shape) * (0.5 + torch.rand(channels, 1)) + mean + torch.randn(channels, 1)).to(dtype)
        self.weight = (torch.randn(channels) + 0.3).to(parameter) if affine else None
        self.bias = torch.randn(channels).to(parameter) if affine else None
        self.residual = torch.randn(shape).to(dtype) if residual else None
        self.population = None
        self.given: dict[str, Any] = {}
        if not training:
            running = torch.randn(channels).double() + mean, torch.rand(channels).double() + 0.5
            self.given = {"mean": running[0].float() if half else running[0].to(parameter)}
            self.given["var"] = running[1].to(self.given["mean"].dtype)
            self.population = reference.Population(*(to_float64(v) for v in self.given.values()))
        self.options: dict[str, Any] = {
            "weight": self.weight, "bias": self.bias, "activation": ACTIVATIONS[activation], "slope": 0.2,
        }  # fmt: skip
        self.known: dict[str, Any] = {
            "weight": None if self.weight is None else to_float64(self.weight),
            "bias": None if self.bias is None else to_float64(self.bias),
            "residual": None if self.residual is None else to_float64(self.residual),
            "activation": activation, "negative_slope": 0.2, "population": self.population,
        }  # fmt: skip
        self.forward = reference.batch_norm_forward(to_float64(self.x), **self.known)
        self.dy = silence_kinks(torch.randn(shape).to(dtype), self.forward.z)
        self.backward = reference.batch_norm_backward(to_float64(self.dy), to_float64(self.x), **self.known)

    @property
    def y_scale(self) -> Any:
        w = 1.0 if self.weight is None else np.abs(to_float64(self.weight))[:, None]
        b = 0.0 if self.bias is None else np.abs(to_float64(self.bias))[:, None]
        r = 0.0 if self.residual is None else np.abs(to_float64(self.residual))
        return np.nanmax(np.abs(self.forward.x_hat) * w + b + r)  # absent places hold NaN

    def check_forward(self, y: torch.Tensor, stats: torch.Tensor) -> None:
        measured = self.forward.statistics
        std = np.sqrt(measured.var)
        assert_close(stats[0], measured.mean + measured.rest, dtype=self.dtype, quantity="mean", scale=std)
        assert_close(stats[1], measured.var, dtype=self.dtype, quantity="var")
        assert_close(y, self.forward.y, dtype=self.dtype, quantity="y", scale=self.y_scale)

    def check_backward(self, dx: torch.Tensor, dweight: Any, dbias: Any, dresidual: Any) -> None:
        expected = self.backward
        w = 1.0 if self.weight is None else np.abs(to_float64(self.weight))[:, None]
        scale = np.max(np.abs(expected.dresidual) * w / np.sqrt(self.forward.statistics.var[:, None] + 1e-5), initial=0)
        assert_close(dx, expected.dx, dtype=self.dtype, quantity="dx", scale=scale)
        parameter = dbias.dtype
        terms = np.abs(expected.dresidual)
        assert_close(dbias, expected.dbias, dtype=parameter, quantity="dbias", scale=terms.sum((0, 2)))
        terms = terms * np.abs(self.forward.x_hat)
        assert_close(dweight, expected.dweight, dtype=parameter, quantity="dweight", scale=terms.sum((0, 2)))
        if dresidual is not None:
            assert_close(dresidual, expected.dresidual, dtype=self.dtype, quantity="dresidual")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_training(dtype: torch.dtype, shape: tuple[int, int, int], split: bool) -> None:
    case = Case(shape, dtype)
    y, stats = outside_forward(case.x, split=split, **case.options)
    case.check_forward(y, stats)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_training(dtype: torch.dtype, shape: tuple[int, int, int], split: bool) -> None:
    case = Case(shape, dtype)
    check_backward(case, split=split)


def check_backward(case: Case, *, training: bool = True, split: bool = False, threads: int = 1) -> None:
    if training:
        measured = case.forward.statistics
        given = {"mean": torch.from_numpy(measured.mean), "var": torch.from_numpy(measured.var)}
    else:
        given = case.given
    channels = case.x.shape[1]
    parameter = torch.float64 if case.dtype == torch.float64 else torch.float32
    dweight, dbias = torch.empty(channels, dtype=parameter), torch.empty(channels, dtype=parameter)
    extra: dict[str, Any] = {}
    if case.residual is not None:
        extra["dresidual"] = torch.empty_like(case.x)
        extra["y"] = torch.from_numpy(case.forward.y).to(case.dtype)
    dx = outside_backward(
        case.dy, case.x, split=split, threads=threads, training=training, dweight=dweight, dbias=dbias, **given,
        **case.options, **extra,
    )  # fmt: skip
    case.check_backward(dx, dweight, dbias, extra.get("dresidual"))


FEW = [(19, 5, 49), (3, 4, 500)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_and_residual(
    dtype: torch.dtype, shape: tuple[int, int, int], activation: str, residual: bool, training: bool
) -> None:
    case = Case(shape, dtype, activation=activation, residual=residual, training=training)
    if training:
        y, stats = outside_forward(case.x, residual=case.residual, **case.options)
        case.check_forward(y, stats)
    else:
        y = torch.empty_like(case.x)
        family = outside.family(shape[0], shape[2])
        call(family, "NORMALIZE", case.x, y=y, residual=case.residual, **case.given, **case.options)
        assert_close(y, case.forward.y, dtype=dtype, quantity="y", scale=case.y_scale)
    for split in (False, True):
        check_backward(case, training=training, split=split)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(32, 3, 49), (32, 3, 784), (2, 3, 50176), (600, 3, 1)])
def test_a_mean_far_from_zero_costs_no_digits(shape: tuple[int, int, int], mean: float) -> None:
    case = Case(shape, torch.float32, mean=mean)
    y, stats = outside_forward(case.x, **case.options)
    case.check_forward(y, stats)
    check_backward(case)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e4), (torch.float32, 0.0), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("shape", [(32, 64, 784), (600, 256, 2), (1000, 64, 3)])
def test_sums_of_many_values_cost_no_digits(shape: tuple[int, int, int], dtype: torch.dtype, mean: float) -> None:
    """Squares of values on a coarse grid are rounded down more often than up: long chains of them lose digits."""
    case = Case(shape, dtype, mean=mean)
    case.check_forward(*outside_forward(case.x, **case.options))


@pytest.mark.parametrize("shape", [(32, 4, 49), (32, 4, 784), (8, 4, 1500)])
def test_batches_at_different_levels_cost_no_digits(shape: tuple[int, int, int]) -> None:
    """The shift comes from the first elements of a chunk; here they are far from all the others."""
    case = Case(shape, torch.float32)
    case.x[0] = -300.0
    case.x[1] = 1000.0
    case.forward = reference.batch_norm_forward(to_float64(case.x), **case.known)
    case.check_forward(*outside_forward(case.x, **case.options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19, 5, 49), (19, 5, 1), (3, 5, 300), (2, 3, 20000)])
def test_a_constant_channel_gives_exactly_the_bias(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    value = torch.randn(shape[1], 1)
    x = (value.to(dtype) if dtype == torch.float64 else value).expand(shape).to(dtype).contiguous()
    bias = torch.randn(shape[1]).to(dtype)
    bias[0] = 0.0
    y, stats = outside_forward(x, bias=bias)
    assert torch.equal(y, bias[:, None].expand(shape))
    assert torch.equal(stats[1], torch.zeros(shape[1], dtype=torch.float64))
    dx = outside_backward(torch.randn(shape).to(dtype), x, mean=stats[0], var=stats[1])
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("shape", [(19, 5, 49), (3, 5, 500)])
def test_running_statistics_follow(shape: tuple[int, int, int]) -> None:
    case = Case(shape, torch.float32)
    measured, n = case.forward.statistics, shape[0] * shape[2]
    for dtype in (torch.float32, torch.float64):
        mean, var = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
        want_mean = 0.7 * to_float64(mean) + 0.3 * measured.mean
        want_var = 0.7 * to_float64(var) + 0.3 * measured.var * n / (n - 1)
        outside_forward(case.x, running_mean=mean, running_var=var, factor=0.3, **case.options)
        scale = np.sqrt(measured.var)
        assert_close(mean, want_mean, dtype=torch.float32, quantity="running_mean", scale=scale)
        assert_close(var, want_var, dtype=torch.float32, quantity="running_var")


@pytest.mark.parametrize("shape", [(19, 5, 49), (3, 5, 500), (2, 2, 9000)])
def test_moments(shape: tuple[int, int, int]) -> None:
    case = Case(shape, torch.float32, mean=100.0)
    family = outside.family(shape[0], shape[2])
    scratch = torch.empty(outside.scratch(*shape), dtype=torch.float64)
    whole, merged = torch.empty(3, shape[1], dtype=torch.float64), torch.empty(3, shape[1], dtype=torch.float64)
    call(family, "MOMENTS", case.x, stats=whole)
    for phase in (1, 2):
        call(family, "MOMENTS", case.x, stats=merged, scratch=scratch, phase=phase)
    assert torch.equal(whole, merged)
    measured = case.forward.statistics
    assert (whole[0] == shape[0] * shape[2]).all()
    assert_close(whole[1], measured.mean, dtype=torch.float32, quantity="mean", scale=np.sqrt(measured.var))
    assert_close(whole[2] / whole[0], measured.var, dtype=torch.float32, quantity="var")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 37, 49), (5, 7, 3000), (2, 3, 50176), (40, 3, 196), (2, 64, 1), (3000, 5, 4)])
def test_the_bits_do_not_depend_on_threads_or_phases(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype, activation="relu")
    results = []
    for threads in (1, 2, 3):
        for split in (False, True):
            y, stats = outside_forward(case.x, threads=threads, split=split, **case.options)
            dweight, dbias = torch.empty(shape[1]), torch.empty(shape[1])
            dx = outside_backward(
                case.dy, case.x, threads=threads, split=split, mean=stats[0], var=stats[1], dweight=dweight,
                dbias=dbias, **case.options,
            )  # fmt: skip
            results.append((y, stats, dx, dweight, dbias))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [49, 1100])
def test_strided_tensors(inner: int, dtype: torch.dtype) -> None:
    """A slice of the channels, of the batch and of a longer row; outputs with strides of their own."""
    case = Case((18, 10, inner), dtype, activation="relu")
    wide = torch.full((36, 20, inner + 3), math.nan, dtype=dtype)
    x = wide[::2, ::2, :inner]
    x.copy_(case.x)
    y = torch.full((18, 10, inner + 5), math.nan, dtype=dtype)
    got, stats = outside_forward(x, y=y[:, :, :inner], **case.options)
    case.check_forward(got, stats)
    assert torch.isnan(y[:, :, inner:]).all()
    dy = torch.full((10, 18, inner + 1), math.nan, dtype=dtype).transpose(0, 1)[:, :, :inner]
    dy.copy_(case.dy)
    dx = outside_backward(dy, x, mean=stats[0], var=stats[1], **case.options)
    same = outside_backward(case.dy, case.x, mean=stats[0], var=stats[1], **case.options)
    assert torch.equal(dx, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [64, 49, 1088])
def test_stores_around_the_cache_give_the_same(inner: int, dtype: torch.dtype) -> None:
    case = Case((18, 16, inner), dtype)
    plain, stats = outside_forward(case.x, **case.options)
    streamed, _ = outside_forward(case.x, stream=True, **case.options)
    assert torch.equal(plain, streamed)
    given = {"mean": stats[0], "var": stats[1], **case.options}
    assert torch.equal(
        outside_backward(case.dy, case.x, **given), outside_backward(case.dy, case.x, stream=True, **given)
    )


@pytest.mark.parametrize("inner", [49, 1100])
def test_inference_in_place(inner: int) -> None:
    case = Case((18, 5, inner), torch.float32, training=False, activation="relu")
    family = outside.family(18, inner)
    x, y = case.x.clone(), torch.empty_like(case.x)
    call(family, "NORMALIZE", x, y=y, **case.given, **case.options)
    call(family, "NORMALIZE", x, y=x, **case.given, **case.options)
    assert torch.equal(x, y)


@pytest.mark.parametrize("inner", [49, 1100])
def test_evaluation_does_not_read_the_input_where_it_is_not_needed(inner: int) -> None:
    case = Case((18, 5, inner), torch.float32, training=False)
    x = torch.full_like(case.x, math.nan)
    dx = outside_backward(case.dy, x, training=False, **case.given, **case.options)
    scale = np.abs(case.backward.dx).max()
    assert_close(dx, case.backward.dx, dtype=torch.float32, quantity="dx", scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("inner", [49, 1100])
def test_nan_and_inf_travel_as_in_torch(inner: int, activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(18, 4, inner).to(dtype)
    x[2, 1, 5], x[3, 2, 7], x[0, 3, 0] = math.nan, math.inf, -math.inf
    weight, bias = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    y, stats = outside_forward(x, weight=weight, bias=bias, activation=ACTIVATIONS[activation])
    mean = x.double().mean((0, 2))
    assert torch.equal(torch.isfinite(stats), torch.tensor([[True, False, False, False]] * 2))
    assert torch.equal(stats[0].isnan(), mean.isnan())
    assert torch.equal(stats[0].isinf(), mean.isinf())
    assert torch.isfinite(y[:, 0]).all()
    assert torch.isnan(y[:, 1:]).all()
    family, fixed = outside.family(18, inner), {"mean": torch.zeros(4), "var": torch.ones(4)}
    call(family, "NORMALIZE", x, y=y, weight=weight, bias=bias, activation=ACTIVATIONS[activation], **fixed)
    expected = x.relu() if activation == "relu" else x
    odd = ~torch.isfinite(x)
    assert torch.equal(y[odd].isnan(), expected[odd].isnan())
    assert torch.equal(y[odd].nan_to_num(), expected[odd].nan_to_num())


@pytest.mark.parametrize("shape", [(0, 3, 49), (20, 3, 0), (20, 0, 49)])
def test_an_empty_tensor_is_left_alone(shape: tuple[int, int, int]) -> None:
    x = torch.empty(shape)
    moments = torch.empty(3, shape[1], dtype=torch.float64)
    call(outside.family(shape[0], shape[2]), "MOMENTS", x, stats=moments)
    assert torch.equal(moments, torch.zeros(3, shape[1], dtype=torch.float64))
    outside_forward(x)
    outside_backward(x, x, mean=torch.zeros(shape[1]), var=torch.ones(shape[1]))


def test_what_is_not_wanted_is_not_written() -> None:
    """No dx and no parameters' gradients: only the residual's gradient."""
    case = Case((18, 5, 49), torch.float32, residual=True, activation="relu")
    y, dresidual = torch.from_numpy(case.forward.y).float(), torch.empty_like(case.x)
    measured = case.forward.statistics
    given = {"mean": torch.from_numpy(measured.mean), "var": torch.from_numpy(measured.var)}
    call(outside.family(18, 49), "BACKWARD", case.x, dy=case.dy, y=y, dresidual=dresidual, **given, **case.options)
    assert torch.equal(dresidual, case.dy * (y > 0))


def masked_case(
    shape: tuple[int, int, int], dtype: torch.dtype, mask: bool, sample_weight: bool, **options: Any
) -> tuple[Case, dict[str, torch.Tensor]]:
    """A case with NaN wherever nothing is present, and the operands that say so."""
    case, places = Case(shape, dtype, **options), (shape[0], shape[2])
    operands: dict[str, torch.Tensor] = {}
    if mask:
        operands["mask"] = (torch.rand(places) < 0.7).to(torch.uint8)
        case.known["mask"] = operands["mask"].numpy() != 0
    if sample_weight:
        operands["sample_weight"] = torch.randint(0, 4, places).double() * 0.5
        case.known["sample_weight"] = operands["sample_weight"].numpy()
    case.forward = reference.batch_norm_forward(to_float64(case.x), **case.known)
    case.dy = silence_kinks(case.dy, case.forward.z)
    case.backward = reference.batch_norm_backward(to_float64(case.dy), to_float64(case.x), **case.known)
    if mask:
        absent = (operands["mask"] == 0)[:, None].expand(shape)
        for tensor in (case.x, case.dy, case.residual):
            if tensor is not None:
                tensor[absent] = math.nan
    return case, operands


@pytest.mark.parametrize(("mask", "sample_weight"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("activation", "residual"), [("identity", False), ("relu", False), ("leaky_relu", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_sample_weights(
    dtype: torch.dtype, activation: str, residual: bool, mask: bool, sample_weight: bool
) -> None:
    case, operands = masked_case((6, 5, 11), dtype, mask, sample_weight, activation=activation, residual=residual)
    case.options.update(operands)
    y, stats = outside_forward(case.x, residual=case.residual, threads=2, **case.options)
    case.check_forward(y, stats)
    moments = torch.empty(3, 5, dtype=torch.float64)
    call(outside.family(6, 11, True), "MOMENTS", case.x, stats=moments, **operands)
    assert torch.equal(moments[0], torch.from_numpy(case.forward.statistics.m).expand(5))
    assert torch.equal(torch.stack((moments[1], moments[2] / moments[0])), stats)
    fixed = torch.empty_like(y)
    call(
        outside.family(6, 11, True), "NORMALIZE", case.x, y=fixed, residual=case.residual, mean=stats[0], var=stats[1],
        **case.options,
    )  # fmt: skip
    assert torch.equal(fixed, y)
    check_backward(case)
    case.options["count"] = float(moments[0, 0])
    check_backward(case, split=True)


def test_a_running_update_counts_weights() -> None:
    case, operands = masked_case((6, 5, 11), torch.float32, True, True)
    mean, var = torch.zeros(5), torch.ones(5)
    outside_forward(case.x, running_mean=mean, running_var=var, factor=0.25, **operands)
    measured = case.forward.statistics
    scale = np.sqrt(measured.var)
    assert_close(mean, 0.25 * measured.mean, dtype=torch.float32, quantity="running_mean", scale=scale)
    unbiased = measured.var * measured.m / (measured.m - 1)
    assert_close(var, 0.75 + 0.25 * unbiased, dtype=torch.float32, quantity="running_var")
