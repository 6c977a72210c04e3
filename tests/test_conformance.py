"""Every kernel against the float64 reference, through the public function and through each of its own functions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise as pairwise_of
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm import functional, reference
from batchnorm.kernels import use_backend
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Needs, Running
from batchnorm.moments import Moments
from conformance import (
    ACTIVATIONS,
    DTYPES,
    EPS,
    FACTORS,
    LAYOUTS,
    MOMENTUM,
    NAMES,
    SHAPES,
    Case,
    Expected,
    Inputs,
    allowed,
    arrange,
    expected_of,
    forward_of,
    inputs_of,
    load,
    placed,
    skip_unless,
    skip_unless_served,
)
from pairwise import pairwise, some
from tolerances import to_float64

CASES = [Case(**row) for row in pairwise(FACTORS, allowed)]
MORE = [Case(**row) for row in some(FACTORS, allowed, 600, seed=1)]
# More values than a kernel handles in one go, whatever its pieces are.
LARGE = [
    Case(shape=shape, layout=layout, dtype=dtype, activation="relu", residual=residual)
    for shape, layout, residual, dtype in [
        ((2, 3, 301, 157), "contiguous", "none", torch.float32),
        ((2, 3, 301, 157), "channels_last", "full", torch.bfloat16),
        ((70001, 2), "contiguous", "none", torch.float32),
        ((70001, 2), "contiguous", "none", torch.bfloat16),
        ((3, 1, 50003), "contiguous", "full", torch.float32),
        ((43, 130, 7, 7), "contiguous", "none", torch.bfloat16),
        ((43, 130, 7, 7), "channels_last", "none", torch.float32),
        ((5, 1030, 31), "transposed", "none", torch.float32),
        ((5, 1030, 31), "contiguous", "full", torch.float16),
    ]
]
ALL = Needs(True, True, True, True)

pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_function_is_the_reference(name: str, case: Case) -> None:
    check_public(name, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_phase_is_the_reference(name: str, case: Case) -> None:
    check_phases(name, case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_inputs(name: str, case: Case) -> None:
    torch.set_num_threads(2)
    check_public(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_cases_drawn_at_random(name: str, case: Case) -> None:
    check_public(name, case)
    check_phases(name, case)


def check_public(name: str, case: Case) -> None:
    """y, every gradient, and the running statistics, of ``functional.batch_norm``."""
    inputs = inputs_of(case, name)
    skip_unless_served(load(name), inputs)
    expected = expected_of(inputs)
    tensors = {key: getattr(inputs, key) for key in ("x", "weight", "bias", "residual")}
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items() if t is not None}
    running = inputs.running_mean.clone(), inputs.running_var.clone()
    with use_backend(name):
        y = functional.batch_norm(
            leaves["x"],
            *running,
            leaves.get("weight"),
            leaves.get("bias"),
            inputs.training,
            MOMENTUM,
            EPS,
            mask=inputs.mask,
            sample_weight=inputs.sample_weight,
            residual=leaves.get("residual"),
            activation=None if inputs.activation.name == "identity" else inputs.activation.name,
            negative_slope=inputs.activation.negative_slope,
        )
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    expected.check("y", y, name)
    for key, grad in zip(leaves, grads, strict=True):
        expected.check(f"d{key}", grad, name)
    if inputs.training:
        expected.check("running_mean", running[0], name)
        expected.check("running_var", running[1], name)
    else:
        assert torch.equal(running[0], inputs.running_mean)
        assert torch.equal(running[1], inputs.running_var)
    if inputs.mask is not None:
        absent = ~inputs.mask.expand(inputs.x.shape)
        for result in (y, grads[0], grads[-1]) if inputs.residual is not None else (y, grads[0]):
            assert (result[absent] == 0).all(), "what is absent must be exactly 0"


def check_phases(name: str, case: Case) -> None:
    """The kernel's own functions, fused and one at a time, on the batch whole and cut in two."""
    inputs = inputs_of(case, name)
    kernel = load(name)
    skip_unless_served(kernel, inputs)
    expected = expected_of(inputs)
    statistics = expected.forward.statistics
    mean, var = (placed(torch.from_numpy(s), name) for s in (statistics.mean, statistics.var))
    if inputs.training:
        check_fused(kernel, expected)
        for pieces in (1, 2):
            found = Moments.empty(inputs.x.shape[1], inputs.x.device).merge(
                *(
                    kernel.moments(part.x, mask=part.mask, sample_weight=part.sample_weight)
                    for part in cut_in(inputs, pieces)
                )
            )
            assert torch.equal(found.count.cpu(), torch.from_numpy(expected.count))
            assert {t.dtype for t in (found.count, found.mean, found.m2)} == {torch.float64}
            expected.check("mean", found.mean, f"{name}, moments of {pieces}")
            # The parts' means are rounded at their own size, which at 1e6 std float64 sees in what is between them.
            row = torch.float32 if pieces == 2 else None
            expected.check("var", found.variance(), f"{name}, moments of {pieces}", row)
            mean, var = found.mean, found.variance()
    check_two_phases(kernel, expected, mean, var)


def check_fused(kernel: Any, expected: Expected) -> None:
    inputs, name = expected.inputs, f"{kernel.NAME}, fused"
    running = Running(inputs.running_mean.clone(), inputs.running_var.clone(), MOMENTUM)
    y, stats = kernel.forward(
        inputs.x,
        inputs.weight,
        inputs.bias,
        EPS,
        residual=inputs.residual,
        activation=inputs.activation,
        mask=inputs.mask,
        sample_weight=inputs.sample_weight,
        running=running,
    )
    assert stats.shape == (2, inputs.x.shape[1])
    assert stats.dtype == torch.float64
    for quantity, result in [
        ("y", y),
        ("mean", stats[0]),
        ("var", stats[1]),
        ("running_mean", running.mean),
        ("running_var", running.var),
    ]:
        expected.check(quantity, result, name)
    dx, dweight, dbias, dresidual = kernel.backward(
        inputs.dy,
        inputs.x,
        stats,
        EPS,
        inputs.weight,
        inputs.bias,
        training=True,
        sample_weight=inputs.sample_weight,
        needs=ALL._replace(
            weight=inputs.weight is not None, bias=inputs.bias is not None, residual=inputs.residual is not None
        ),
        **kept(inputs, y),
    )
    results = {"dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual}
    wanted = {"dx": inputs.x, "dweight": inputs.weight, "dbias": inputs.bias, "dresidual": inputs.residual}
    for quantity, result in results.items():
        if wanted[quantity] is None:
            assert result is None, f"{name}: {quantity} was not asked for"
        else:
            expected.check(quantity, result, name)


def check_two_phases(kernel: Any, expected: Expected, mean: Tensor, var: Tensor) -> None:
    """normalize, backward_sums and backward_input, part by part: what ranks and micro-batches do."""
    inputs, name = expected.inputs, f"{kernel.NAME}, two phases"
    parts = cut_in(inputs, 2)
    outputs = [
        kernel.normalize(
            part.x,
            mean,
            var,
            EPS,
            inputs.weight,
            inputs.bias,
            residual=part.residual,
            activation=inputs.activation,
            mask=part.mask,
        )
        for part in parts
    ]
    expected.check("y", torch.cat(outputs), name)
    same = (mean, var, EPS, inputs.weight, inputs.bias)
    found = [kernel.backward_sums(p.dy, p.x, *same, **kept(p, y)) for p, y in zip(parts, outputs, strict=True)]
    sums = tuple(torch.stack(column).sum(0) for column in zip(*found, strict=True))
    assert sums[0].dtype == sums[1].dtype == torch.float64
    precision = inputs.statistics_dtype
    expected.check("dbias", sums[0].to(precision), name)
    expected.check("dweight", sums[1].to(precision), name)
    count = torch.from_numpy(expected.count).to(inputs.x.device) if inputs.training else 1.0
    needs = Needs(True, False, False, inputs.residual is not None)
    back = [
        kernel.backward_input(
            p.dy,
            p.x,
            *same,
            sums if inputs.training else None,
            count,
            sample_weight=p.sample_weight,
            needs=needs,
            **kept(p, y),
        )
        for p, y in zip(parts, outputs, strict=True)
    ]
    expected.check("dx", torch.cat([dx for dx, _ in back]), name)
    if inputs.residual is None:
        assert [dresidual for _, dresidual in back] == [None] * len(back)
    else:
        expected.check("dresidual", torch.cat([dresidual for _, dresidual in back]), name)


def kept(inputs: Inputs, y: Tensor) -> dict[str, Any]:
    """What autograd keeps for backward: y's sign stands for the residual where it can."""
    by_sign = inputs.residual is not None and inputs.activation.sign_survives
    return {
        "activation": inputs.activation,
        "mask": inputs.mask,
        "y": y if by_sign else None,
        "residual": None if by_sign or inputs.activation.name == "identity" else inputs.residual,
    }


def cut_in(inputs: Inputs, pieces: int) -> list[Inputs]:
    """The batch in uneven parts along N, each a view; the whole where there is but one sample."""
    n = inputs.x.shape[0]
    ends = [0, n] if pieces == 1 or n == 1 else [0, max(1, n // 3), n]

    def part(t: Tensor | None, first: int, last: int) -> Tensor | None:
        return t if t is None or t.shape[0] != n else t[first:last]

    return [
        replace(
            inputs,
            **{key: part(getattr(inputs, key), a, b) for key in ("x", "dy", "residual", "mask", "sample_weight")},
        )
        for a, b in pairwise_of(ends)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2], ids=str)
def test_the_result_has_the_strides_that_pytorchs_has(name: str, shape: tuple[int, ...], layout: str) -> None:
    """channels_last where the input suggests it, else contiguous; dx as the result where dy has its strides."""
    if not allowed({"shape": shape, "layout": layout}):
        pytest.skip("every value of a channel would be the same")
    x = placed(arrange(torch.randn(shape), layout), name)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    x.requires_grad_()
    with use_backend(name):
        y = functional.batch_norm(x, None, None, training=True)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.stride() == expected.stride()
    assert dx.stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("value", "shape"), [(3.7, (33, 3, 7, 5)), (-1234.567, (5, 3, 71, 43)), (1e-3, (1155, 3, 1, 1))]
)
def test_a_constant_channel_gives_its_bias_exactly(
    name: str, value: float, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = placed(arrange(torch.full(shape, value).to(dtype), layout), name).requires_grad_()
    skip_unless(load(name), x)
    weight, bias = (placed(torch.randn(3).to(dtype), name).requires_grad_() for _ in range(2))
    running = [placed(torch.zeros(3, dtype=torch.promote_types(dtype, torch.float32)), name) for _ in range(2)]
    with use_backend(name):
        y = functional.batch_norm(x, *running, weight, bias, training=True, momentum=1.0)
        dx, dweight = torch.autograd.grad(y, (x, weight), placed(torch.randn(y.shape).to(dtype), name))
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))
    assert torch.equal(running[0], x.detach()[0, :, 0, 0].to(running[0].dtype))
    assert torch.equal(running[1], torch.zeros_like(running[1]))
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [3, 65])
def test_what_is_not_finite_stays_in_its_channel(
    name: str, channels: int, training: bool, layout: str, poison: float
) -> None:
    """The others are the reference's; the channel itself is what torch makes of it."""
    inputs = inputs_of(Case(shape=(4, channels, 7, 3), layout=layout, training=training), name)
    expected = expected_of(inputs)
    skip_unless_served(load(name), inputs)
    x = inputs.x.clone()
    x[2, 1, 3, 1] = poison
    results, torchs = [], []
    for function, into in [(functional.batch_norm, results), (torch.nn.functional.batch_norm, torchs)]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, inputs.weight, inputs.bias) if t is not None]
        running = inputs.running_mean.clone(), inputs.running_var.clone()
        with use_backend(name):
            y = function(leaves[0], *running, leaves[1], leaves[2], training, MOMENTUM, EPS)
            grads = torch.autograd.grad(y, leaves, inputs.dy)
        into += [y.detach(), *grads, *running]
    for quantity, result, torchs_own in zip(
        ("y", "dx", "dweight", "dbias", "running_mean", "running_var"), results, torchs, strict=True
    ):
        dim = 1 if result.dim() > 1 else 0
        bad, torchs_bad = result.select(dim, 1), torchs_own.select(dim, 1)
        assert torch.equal(bad.isnan(), torchs_bad.isnan()), quantity
        assert torch.equal(bad[bad.isinf()], torchs_bad[torchs_bad.isinf()]), quantity
        if quantity.startswith("running") and not training:
            continue
        # The poisoned channel is compared with torch's above; here it takes the reference's place.
        healed = result.clone()
        healed.select(dim, 1).copy_(torch.from_numpy(expected._value(quantity)).select(dim, 1))
        expected.check(quantity, healed, name)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid"])
def test_an_activation_lets_nan_through(name: str, activation: str) -> None:
    x = placed(torch.randn(8, 3), name)
    x[2, 1] = float("nan")
    skip_unless(load(name), x, activation=activation_by_name(activation))
    with use_backend(name):
        y = functional.batch_norm(x, None, None, training=True, activation=activation)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4, 4), (2, 0), (2, 0, 4), (0, 0)], ids=str)
def test_no_values_give_no_values_and_change_nothing(name: str, shape: tuple[int, ...], training: bool) -> None:
    channels = shape[1]
    x, *rest = (placed(torch.randn(size), name) for size in (shape, channels, channels, channels))
    weight, bias, mean = rest
    var = placed(torch.rand(channels), name)
    for t in (x, weight, bias):
        t.requires_grad_()
    before = mean.clone(), var.clone()
    skip_unless(load(name), x)
    with use_backend(name):
        y = functional.batch_norm(x, mean, var, weight, bias, training)
        grads = torch.autograd.grad(y, (x, weight, bias), placed(torch.randn(shape), name))
    assert y.shape == shape
    assert [tuple(g.shape) for g in grads] == [shape, (channels,), (channels,)]
    assert torch.equal(grads[1], torch.zeros_like(weight))
    assert torch.equal(grads[2], torch.zeros_like(bias))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_far_mean_costs_no_digits(name: str, mean: float, layout: str) -> None:
    """float32, std 1: y within 5e-6, dx within 1e-5 of its size, the variance within 1e-6 of itself."""
    for shape in ((32, 3, 28, 28), (8, 64, 7, 7), (200, 65)):
        values = arrange((torch.randn(shape, dtype=torch.float64) + mean).float(), layout)
        x = placed(values, name).requires_grad_()
        weight, bias = placed(torch.rand(shape[1]) + 0.5, name), placed(torch.randn(shape[1]), name)
        dy = placed(torch.randn(shape), name)
        running = tuple(placed(torch.zeros(shape[1]), name) for _ in range(2))
        with use_backend(name):
            y = functional.batch_norm(x, *running, weight, bias, training=True, momentum=1.0)
            (dx,) = torch.autograd.grad(y, x, dy)
        arguments = (to_float64(x), to_float64(weight), to_float64(bias))
        forward = reference.batch_norm_forward(*arguments)
        gradients = reference.batch_norm_backward(to_float64(dy), *arguments)
        assert abs(to_float64(y) - forward.y).max() <= 5e-6
        assert abs(to_float64(dx) - gradients.dx).max() <= 1e-5 * abs(gradients.dx).max()
        unbiased = reference.unbiased_variance(forward.statistics)
        assert (abs(to_float64(running[1]) - unbiased) <= (1e-6 + 2**-24) * unbiased).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"activation": "relu", "residual": "full"},
    "masked": {"activation": "relu", "places": "mask and weights"},
    "eval": {"activation": "relu", "training": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 3, 57, 31), (64, 70, 7, 7), (60, 100), (9000, 65), (3, 1, 40001)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bits_for_any_number_of_threads(
    name: str, options: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    inputs = inputs_of(Case(shape=shape, layout=layout, dtype=dtype, **OPTIONS[options]), name)
    skip_unless_served(load(name), inputs)

    def once(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        tensors = {key: getattr(inputs, key) for key in ("x", "weight", "bias", "residual")}
        leaves = {key: t.detach().requires_grad_() for key, t in tensors.items() if t is not None}
        running = [inputs.running_mean.clone(), inputs.running_var.clone()]
        with use_backend(name):
            y = functional.batch_norm(
                leaves["x"],
                *running,
                leaves["weight"],
                leaves["bias"],
                inputs.training,
                residual=leaves.get("residual"),
                activation=None if inputs.activation.name == "identity" else inputs.activation.name,
                mask=inputs.mask,
                sample_weight=inputs.sample_weight,
            )
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), inputs.dy), *running]

    alone = once(1)
    for threads in (1, 2, 3):
        for a, b in zip(alone, once(threads), strict=True):
            assert torch.equal(a, b), f"{threads} threads"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_in_place_and_into_out(name: str, dtype: torch.dtype, layout: str, activation: str | None) -> None:
    inputs = inputs_of(
        Case(shape=(3, 5, 4, 3), layout=layout, dtype=dtype, activation=activation, residual="full", training=False),
        name,
    )
    kernel = load(name)
    skip_unless_served(kernel, inputs)
    expected = expected_of(inputs)

    def normalize(x: Tensor, out: Tensor) -> Tensor:
        result: Tensor = kernel.normalize(
            x,
            inputs.running_mean,
            inputs.running_var,
            EPS,
            inputs.weight,
            inputs.bias,
            residual=inputs.residual,
            activation=inputs.activation,
            out=out,
        )
        assert result is out
        return result

    for other in ("contiguous", "channels_last", "sliced", "permuted"):
        out = placed(arrange(torch.zeros(3, 5, 4, 3, dtype=dtype), other), name)
        expected.check("y", normalize(inputs.x, out), f"into {other}")
    x = placed(arrange(inputs.x.cpu(), layout), name)
    expected.check("y", normalize(x, x), "in place")


@pytest.mark.parametrize("needs", [Needs(*(bool(i >> k & 1) for k in range(4))) for i in range(16)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_the_gradients_that_are_needed(name: str, activation: str | None, training: bool, needs: Needs) -> None:
    inputs = inputs_of(Case(activation=activation, training=training, residual="full"), name)
    kernel = load(name)
    skip_unless_served(kernel, inputs)
    expected = expected_of(inputs)
    statistics = placed(torch.stack([torch.from_numpy(s) for s in expected.forward.statistics[1:3]]), name)
    y = kernel.normalize(
        inputs.x, *statistics, EPS, inputs.weight, inputs.bias, residual=inputs.residual, activation=inputs.activation
    )
    found = kernel.backward(
        inputs.dy, inputs.x, statistics, EPS, inputs.weight, inputs.bias,
        training=training, needs=needs, **kept(inputs, y),
    )  # fmt: skip
    for quantity, result, needed in zip(("dx", "dweight", "dbias", "dresidual"), found, needs, strict=True):
        if needed:
            expected.check(quantity, result, name)
        else:
            assert result is None, quantity


@pytest.mark.parametrize("factor", [1.0, 0.0, 0.25, 1 / 3])
def test_running_statistics_move_by_the_factor(name: str, factor: float) -> None:
    inputs = inputs_of(Case(shape=(6, 5, 3, 3)), name)
    kernel = load(name)
    running = Running(inputs.running_mean.clone(), inputs.running_var.clone(), factor)
    kernel.forward(inputs.x, inputs.weight, inputs.bias, EPS, running=running)
    statistics = forward_of(inputs).statistics
    unbiased = reference.unbiased_variance(statistics)
    for r, before, batch in [
        (running.mean, inputs.running_mean, statistics.mean),
        (running.var, inputs.running_var, unbiased),
    ]:
        after = to_float64(before) * (1 - factor) + factor * batch
        assert abs(to_float64(r) - after).max() <= 1e-6 * abs(after).max()
    if factor == 0.0:
        assert torch.equal(running.mean, inputs.running_mean)


@pytest.mark.parametrize("factor", [1.0, 1])
def test_a_nan_in_running_statistics_does_not_survive_a_factor_of_one(name: str, factor: float) -> None:
    """momentum=1 means: forget the past, whatever it was."""
    inputs = inputs_of(Case(), name)
    forgotten = (placed(torch.full((3,), value), name) for value in (float("nan"), float("inf")))
    running = Running(*forgotten, factor)
    load(name).forward(inputs.x, inputs.weight, inputs.bias, EPS, running=running)
    assert running.mean.isfinite().all()
    assert running.var.isfinite().all()
