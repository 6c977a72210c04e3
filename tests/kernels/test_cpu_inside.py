"""The kernels for channels inside (channels_last, (N, C)), each against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.kernels.cpu import block as slots
from batchnorm.kernels.cpu import inside, inside_few
from batchnorm.kernels.cpu.inside_rows import cut, fold_of
from kernels.cpu_call import call
from tolerances import assert_close, silence_kinks, to_float64

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = {"identity": slots.IDENTITY, "relu": slots.RELU, "leaky_relu": slots.LEAKY_RELU}
# Rows and channels: whole and broken vectors, folded rows with and without a rest, several chunks, few rows.
SHAPES = [
    (2, 3), (7, 65), (49, 2048), (60, 100), (128, 256), (1568, 64), (1569, 65), (9999, 1), (10007, 3), (5000, 6),
    (4321, 33), (300, 1000), (2, 1), (3000, 16),
]  # fmt: skip


class Case:
    """Tensors of one call, and what the reference makes of them."""

    family: Any = inside

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        mean: float = 0.0,
        activation: str = "identity",
        residual: bool = False,
        training: bool = True,
        affine: bool = True,
        gap: int = 0,
        mask: bool = False,
        sample_weight: bool = False,
        x: torch.Tensor | None = None,
    ) -> None:
        rows, channels = shape
        self.dtype, self.parameter = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        if x is None:
            spread = 0.5 + torch.rand(channels, dtype=torch.float64)
            x = torch.randn(shape, dtype=torch.float64) * spread + mean + torch.randn(channels, dtype=torch.float64)
        self.gap = gap
        self.x = self.place(x.to(dtype))
        self.weight = (torch.randn(channels) + 0.3).to(self.parameter) if affine else None
        self.bias = torch.randn(channels).to(self.parameter) if affine else None
        self.residual = self.place(torch.randn(shape).to(dtype)) if residual else None
        self.mask = torch.rand(rows) > 0.3 if mask else None
        self.sample_weight = torch.randint(0, 4, (rows,)).double() / 2 if sample_weight else None
        if self.sample_weight is not None:
            self.sample_weight[0] = 2.0
        if self.mask is not None:
            self.mask[:2] = True
        weights = self.sample_weight
        if weights is not None and self.mask is not None:
            weights = weights * self.mask
        self.given: dict[str, torch.Tensor] = {}
        population = None
        if not training:
            self.given = {"mean": torch.randn(channels) + mean, "var": torch.rand(channels) + 0.5}
            self.given = {name: value.to(self.parameter) for name, value in self.given.items()}
            population = reference.Population(*(to_float64(v) for v in self.given.values()))
        self.training = training
        self.operands: dict[str, Any] = {
            "weight": self.weight, "bias": self.bias,
            "mask": None if self.mask is None else self.mask.to(torch.uint8), "sample_weight": weights,
        }  # fmt: skip
        self.codes: dict[str, Any] = {"activation": ACTIVATIONS[activation], "slope": 0.2}
        known: dict[str, Any] = {
            "weight": None if self.weight is None else to_float64(self.weight),
            "bias": None if self.bias is None else to_float64(self.bias),
            "residual": None if self.residual is None else to_float64(self.residual),
            "activation": activation, "negative_slope": 0.2, "population": population,
            "mask": None if self.mask is None else self.mask.numpy(),
            "sample_weight": None if self.sample_weight is None else self.sample_weight.numpy(),
        }  # fmt: skip
        self.forward = reference.batch_norm_forward(to_float64(self.x), **known)
        self.dy = self.place(silence_kinks(torch.randn(shape).to(dtype), self.forward.z))
        self.backward = reference.batch_norm_backward(to_float64(self.dy), to_float64(self.x), **known)
        self.count = float(rows if self.mask is None else self.mask.sum())
        if weights is not None:
            self.count = float(weights.sum())

    def place(self, t: torch.Tensor) -> torch.Tensor:
        """The tensor, with so many unused elements after each row."""
        room = torch.full((t.shape[0], t.shape[1] + self.gap), math.nan, dtype=t.dtype)[:, : t.shape[1]]
        return room.copy_(t)

    def empty(self) -> torch.Tensor:
        return self.place(torch.full_like(self.x, math.nan))

    def run(self, kernel: str, *, threads: int = 1, split: bool = False, **more: Any) -> None:
        tensors = {
            name: None if t is None else t.unsqueeze(2) if name in TENSORS else t
            for name, t in {"x": self.x, **self.operands, **more}.items()
            if name not in self.codes and name != "count"
        }
        codes = {**self.codes, **{k: v for k, v in more.items() if k == "count"}}
        rows, channels = self.x.shape
        size = inside.scratch(rows, 1, channels, 8 if self.dtype == torch.float64 else 4, threads)
        scratch = torch.full((size,), math.nan, dtype=torch.float64)
        for phase in (1, 2) if split else (0,):
            call(self.family, kernel, threads=threads, phase=phase, scratch=scratch, **tensors, **codes)

    def run_forward(self, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, stats = self.empty(), torch.empty(2, self.x.shape[1], dtype=torch.float64)
        self.run("FORWARD", y=y, stats=stats, residual=self.residual, **how)
        return y, stats

    def run_backward(self, **how: Any) -> dict[str, torch.Tensor]:
        out = {"dx": self.empty(), **self.parameters()}
        y = None
        if self.residual is not None:
            out["dresidual"] = self.empty()
            y = self.place(torch.from_numpy(self.forward.y).to(self.dtype))
        kernel = "BACKWARD" if self.training else "BACKWARD_EVAL"
        self.run(kernel, dy=self.dy, y=y, **self.statistics(), **out, **how)
        return out

    def parameters(self) -> dict[str, torch.Tensor]:
        channels = self.x.shape[1]
        return {name: torch.empty(channels, dtype=self.parameter) for name in ("dweight", "dbias")}

    def statistics(self) -> dict[str, torch.Tensor]:
        if not self.training:
            return self.given
        measured = self.forward.statistics
        return {"mean": torch.from_numpy(measured.mean), "var": torch.from_numpy(measured.var)}

    def check_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        measured = self.forward.statistics
        exact = measured.mean + measured.rest
        assert_close(mean, exact, dtype=self.dtype, quantity="mean", scale=np.sqrt(measured.var))
        assert_close(var, measured.var, dtype=self.dtype, quantity="var")

    def check_y(self, y: torch.Tensor) -> None:
        w = 1.0 if self.weight is None else np.abs(to_float64(self.weight))
        b = 0.0 if self.bias is None else np.abs(to_float64(self.bias))
        r = 0.0 if self.residual is None else np.abs(to_float64(self.residual))
        scale = np.nanmax(np.abs(self.forward.x_hat) * w + b + r)
        assert_close(y, self.forward.y, dtype=self.dtype, quantity="y", scale=scale)

    def check_dx(self, dx: torch.Tensor) -> None:
        w = 1.0 if self.weight is None else np.abs(to_float64(self.weight))
        scale = np.max(np.abs(self.backward.dresidual) * w / np.sqrt(self.forward.statistics.var + 1e-5), initial=0)
        if self.sample_weight is not None:
            scale = scale * max(1.0, float(self.sample_weight.max()))
        assert_close(dx, self.backward.dx, dtype=self.dtype, quantity="dx", scale=scale)

    def check_backward(self, got: dict[str, torch.Tensor]) -> None:
        terms = np.abs(self.backward.dresidual)
        self.check_dx(got["dx"])
        close = {"dtype": self.parameter}
        assert_close(got["dbias"], self.backward.dbias, quantity="dbias", scale=terms.sum(0), **close)
        terms = terms * np.abs(self.forward.x_hat)
        assert_close(got["dweight"], self.backward.dweight, quantity="dweight", scale=terms.sum(0), **close)
        if "dresidual" in got:
            assert_close(got["dresidual"], self.backward.dresidual, dtype=self.dtype, quantity="dresidual")


TENSORS = ("x", "dy", "y", "residual", "dx", "dresidual")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    case = Case(shape, dtype)
    y, stats = case.run_forward()
    case.check_statistics(*stats)
    case.check_y(y)
    case.check_backward(case.run_backward())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 4096), (3, 5003), (32, 4100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_many_channels(dtype: torch.dtype, shape: tuple[int, int], residual: bool, activation: str) -> None:
    """Blocks of columns, the last one of them short; the same bits on any number of threads."""
    case = Case(shape, dtype, activation=activation, residual=residual)
    case.family = inside_few
    assert inside_few.serves(*shape)
    y, stats = case.run_forward()
    if shape[0] > 2:  # of two values the variance may be near 0
        case.check_statistics(*stats)
        case.check_y(y)
        case.check_backward(case.run_backward())
    again = case.run_forward(threads=2)
    assert torch.equal(y, again[0])
    assert torch.equal(stats, again[1])
    one, two = case.run_backward(), case.run_backward(threads=2)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(200, 70), (500, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_and_residual(
    dtype: torch.dtype, shape: tuple[int, int], activation: str, residual: bool, training: bool
) -> None:
    case = Case(shape, dtype, activation=activation, residual=residual, training=training)
    if training:
        y, stats = case.run_forward()
        case.check_statistics(*stats)
    else:
        y = case.empty()
        case.run("NORMALIZE", y=y, residual=case.residual, **case.given)
    case.check_y(y)
    case.check_backward(case.run_backward())


@pytest.mark.parametrize("shape", [(200, 70), (500, 6), (1000, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_two_phase_functions(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    case = Case(shape, dtype, activation="relu")
    stats = torch.empty(3, shape[1], dtype=torch.float64)
    case.run("MOMENTS", stats=stats)
    assert (stats[0] == shape[0]).all()
    case.check_statistics(stats[1], stats[2] / stats[0])
    sums, dx = torch.empty(2, shape[1], dtype=torch.float64), case.empty()
    case.run("BACKWARD_SUMS", dy=case.dy, sums=sums, **case.statistics())
    terms = np.abs(case.backward.dresidual)
    assert_close(sums[0].float(), case.backward.dbias, dtype="float32", quantity="dbias", scale=terms.sum(0))
    terms = terms * np.abs(case.forward.x_hat)
    assert_close(sums[1].float(), case.backward.dweight, dtype="float32", quantity="dweight", scale=terms.sum(0))
    case.run("BACKWARD_INPUT", dy=case.dy, dx=dx, sums=sums, count=case.count, **case.statistics())
    case.check_dx(dx)


@pytest.mark.parametrize(("mask", "sample_weight"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(300, 70), (2000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_weights(
    dtype: torch.dtype, shape: tuple[int, int], training: bool, mask: bool, sample_weight: bool
) -> None:
    case = Case(
        shape, dtype, mask=mask, sample_weight=sample_weight, training=training, activation="relu", residual=True
    )
    for t in (case.x, case.residual, case.dy):
        if case.mask is not None:
            t[~case.mask] = math.nan
    y = case.empty()
    if training:
        y, stats = case.run_forward(threads=2)
        case.check_statistics(*stats)
    else:
        case.run("NORMALIZE", y=y, residual=case.residual, **case.given)
    case.check_y(y)
    got = case.run_backward(threads=2)
    case.check_backward(got)
    if case.mask is not None:
        assert (y[~case.mask] == 0).all() and (got["dx"][~case.mask] == 0).all()
    if training:
        sums, dx = torch.empty(2, shape[1], dtype=torch.float64), case.empty()
        kept = case.place(torch.from_numpy(case.forward.y).to(dtype))
        case.run("BACKWARD_SUMS", dy=case.dy, y=kept, sums=sums, **case.statistics())
        case.run("BACKWARD_INPUT", dy=case.dy, y=kept, dx=dx, sums=sums, count=case.count, **case.statistics())
        assert torch.equal(dx, got["dx"])


@pytest.mark.parametrize("channels", [3, 70])
def test_rows_of_different_weights_are_added_up_in_short_chains(channels: int) -> None:
    """Equal terms are rounded alike, all in one direction: as one chain, the 1000 rows of a chunk would be far off."""
    rows = 20000
    weights = 1.0 + torch.arange(rows).double() % 2
    signs = torch.arange(rows) // 2 % 2 * 2.0 - 1.0
    x = (torch.full((rows, channels), 1.1) * signs[:, None]).contiguous()
    case = Case((rows, channels), torch.float32, x=x, training=False)
    case.operands["sample_weight"] = weights
    stats = torch.empty(3, channels, dtype=torch.float64)
    case.run("MOMENTS", stats=stats)
    expected = reference.mini_batch_statistics(to_float64(x), sample_weight=weights.numpy())
    assert_close(stats[2] / stats[0], expected.var, dtype="float32", quantity="var")

    dy, sums = torch.full_like(x, 0.1), torch.empty(2, channels, dtype=torch.float64)
    case.run("BACKWARD_SUMS", dy=dy, sums=sums, **case.given)
    total = to_float64(dy).sum(0)
    assert_close(sums[0].float(), total, dtype="float32", quantity="dbias", scale=total)


def test_the_moments_of_nothing() -> None:
    case = Case((300, 70), torch.float32)
    case.operands["mask"] = torch.zeros(300, dtype=torch.uint8)
    stats = torch.empty(3, 70, dtype=torch.float64)
    case.run("MOMENTS", stats=stats)
    assert (stats == 0).all()


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(600, 3), (1568, 64), (10007, 65)])
def test_a_mean_far_from_zero_costs_no_digits(shape: tuple[int, int], mean: float) -> None:
    case = Case(shape, torch.float32, mean=mean)
    y, stats = case.run_forward()
    case.check_statistics(*stats)
    case.check_y(y)
    case.check_backward(case.run_backward())


@pytest.mark.parametrize("shape", [(1000, 70), (2000, 3)])
def test_a_shift_that_is_far_from_the_mean_is_noticed(shape: tuple[int, int]) -> None:
    """The shift is the mean of the rows 0, M/8, 2M/8 ...; here these are far from all others."""
    x = torch.randn(shape, dtype=torch.float64)
    x[0] = 1e8
    x[:, 1] = torch.randn(shape[0]).double() * 1e25
    x[0, 2], x[5, 2] = 0.0, 3e30
    case = Case(shape, torch.float32, x=x)
    _, stats = case.run_forward()
    case.check_statistics(*stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (700, 64), (3000, 6)])
def test_a_constant_channel_gives_exactly_the_bias(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape[1]).double() * 1000).to(dtype).double().expand(shape)
    case = Case(shape, dtype, x=x)
    y, stats = case.run_forward()
    assert case.bias is not None
    assert torch.equal(y, case.bias.to(dtype).expand(shape))
    assert (stats[1] == 0).all()
    assert case.run_backward()["dx"].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_channel(dtype: torch.dtype, activation: str) -> None:
    x = torch.randn(300, 70).double()
    x[3, 1], x[4, 2], x[0, 3], x[5, 4], x[6, 4] = math.nan, math.inf, -math.inf, math.inf, -math.inf
    good = [c for c in range(70) if c not in (1, 2, 3, 4)]
    case = Case((300, 70), dtype, x=torch.nan_to_num(x, 0.0, 0.0, 0.0), activation=activation)
    expected, expected_stats = case.run_forward()
    case.x = x.to(dtype)
    y, stats = case.run_forward()
    # The rows 0 and 3 to 6 have other values in the channels that are left out.
    assert torch.equal(y[:, good], expected[:, good])
    assert torch.equal(stats[:, good], expected_stats[:, good])
    assert y[:, 1:5].isnan().all()
    assert stats[1, 1:5].isnan().all()
    assert stats[0, 1].isnan() and stats[0, 4].isnan()
    assert stats[0, 2] == math.inf and stats[0, 3] == -math.inf


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_in_evaluation_are_those_of_torch(activation: str) -> None:
    case = Case((40, 5), torch.float32, training=False, activation=activation)
    case.x[1, 1], case.x[2, 2], case.x[3, 3] = math.nan, math.inf, -math.inf
    torchs = {
        "identity": lambda z: z,
        "relu": torch.relu,
        "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.2),
    }
    x, weight, bias = (t.clone().requires_grad_() for t in (case.x, case.weight, case.bias))
    normalized = torch.nn.functional.batch_norm(x, case.given["mean"], case.given["var"], weight, bias)
    expected = torchs[activation](normalized)
    expected.backward(case.dy)
    y = case.empty()
    case.run("NORMALIZE", y=y, **case.given)
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    got = case.run_backward()
    torch.testing.assert_close(got["dx"], x.grad, equal_nan=True)
    torch.testing.assert_close(got["dweight"], weight.grad, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["dbias"], bias.grad, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5000, 70), (20000, 6)])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, shape: tuple[int, int], masked: bool) -> None:
    case = Case(shape, dtype, activation="relu", residual=True, mask=masked, sample_weight=masked)
    ways = [{}, {"threads": 2}, {"threads": 3}, {"threads": 2, "split": True}, {"split": True}]
    results = [(*case.run_forward(**way), *case.run_backward(**way).values()) for way in ways]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("gap", [0, 3, 64])
@pytest.mark.parametrize("shape", [(1000, 64), (1000, 70), (1000, 3)])
def test_rows_with_gaps_and_streamed_stores(shape: tuple[int, int], gap: int, stream: bool) -> None:
    case = Case(shape, torch.float32, gap=gap, activation="relu", residual=True)
    case.codes["stream"] = stream
    y, stats = case.run_forward(threads=2)
    case.check_statistics(*stats)
    case.check_y(y)
    case.check_backward(case.run_backward(threads=2))


def test_runs_of_rows_that_are_not_equally_spaced() -> None:
    """(N, C, L) whose channels lie side by side, with a gap after each sample."""
    wide = torch.randn(4, 60, 100)
    x = wide[:, :50, :70].permute(0, 2, 1)
    y, stats = torch.empty_like(x), torch.empty(2, 70, dtype=torch.float64)
    scratch = torch.empty(inside.scratch(4, 50, 70, 4, 2), dtype=torch.float64)
    how = [-1, 2, 0, 4, 70, 50]
    strides = {"x": x, "y": y}
    steps = [
        n
        for name in TENSORS
        for n in ((strides[name].stride(0), strides[name].stride(2)) if name in strides else (0, 0))
    ]
    addresses = [x.data_ptr(), 0, y.data_ptr()] + [0] * 7 + [stats.data_ptr()] + [0] * 7 + [scratch.data_ptr(), 0]
    block = (
        slots.pack_how(*how, *steps, 0, 1, 0, 0, 0)
        + slots.pack_what(*addresses, 1e-5, 0.1, 0.0, 0.0)
        + slots.pack_far(0)
    )
    from batchnorm.kernels.cpu.threads import launch

    launch(inside.FORWARD["float32"], block, 2)
    expected = reference.batch_norm_forward(to_float64(x))
    assert_close(y, expected.y, dtype="float32", quantity="y")
    assert_close(stats[1], expected.statistics.var, dtype="float32", quantity="var")


@pytest.mark.parametrize("running", [torch.float32, torch.float64])
def test_running_statistics_follow(running: torch.dtype) -> None:
    case = Case((300, 70), torch.float32)
    mean, var = torch.randn(70, dtype=running), torch.rand(70, dtype=running) + 0.5
    old = reference.Population(to_float64(mean), to_float64(var))
    expected = reference.running_update(old, case.forward.statistics, 0.1)
    case.run_forward(running_mean=mean, running_var=var)
    std = np.sqrt(case.forward.statistics.var)
    assert_close(mean, expected.mean, dtype="float32", quantity="running_mean", scale=std)
    assert_close(var, expected.var, dtype="float32", quantity="running_var")


@pytest.mark.parametrize("missing", ["dx", "dweight", "dbias"])
def test_gradients_that_are_not_wanted(missing: str) -> None:
    for training in (True, False):
        case = Case((300, 70), torch.float32, training=training)
        all_of_them, out = case.run_backward(), {"dx": case.empty(), **case.parameters()}
        del out[missing]
        kernel = "BACKWARD" if training else "BACKWARD_EVAL"
        case.run(kernel, dy=case.dy, **case.statistics(), **out)
        for name, value in out.items():
            assert torch.equal(value, all_of_them[name])


def test_parameters_of_half_precision_and_none_at_all() -> None:
    case = Case((300, 70), torch.bfloat16, affine=False)
    y, _ = case.run_forward()
    case.check_y(y)
    case.check_backward(case.run_backward())
    case.operands |= {"weight": torch.ones(70).bfloat16() * 2, "bias": torch.ones(70).bfloat16()}
    other, _ = case.run_forward()
    torch.testing.assert_close(other, torch.from_numpy(2 * case.forward.y + 1).bfloat16())


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 7, 16, 33, 38, 63, 64, 65, 100, 129, 1000, 2048])
def test_a_cut_covers_every_row_once(channels: int) -> None:
    for rows in (1, 2, 63, 64, 1000, 1568, 100352):
        for lanes in (16, 32, 64):
            c = cut(True, True, rows, 1, channels, lanes, 4)
            assert c.inner * c.columns + c.rest == rows * channels
            assert c.rows * (c.chunks - 1) < c.inner <= c.rows * c.chunks
            assert c.padded % lanes == 0 and c.columns <= c.padded < c.columns + lanes
            assert fold_of(channels, lanes) >= c.fold >= 1
