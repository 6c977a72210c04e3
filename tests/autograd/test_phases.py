"""The two-phase path: a seam that changes nothing gives the plain path's results, and each seam gives its formula."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from batchnorm.checks import EVERYWHERE, check_places
from batchnorm.functional import Batch, run
from batchnorm.kernels import use_backend
from batchnorm.kernels.activations import IDENTITY
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Running
from batchnorm.kernels.seams import Seams
from batchnorm.moments import Moments
from tolerances import assert_close

BACKENDS = ("cpu", "eager", "composite")
EPS = 1e-5


class Alone:
    """The reducer of a group of one."""

    def moments(self, local: Moments) -> Moments:
        return local

    def sums(self, local: Tensor) -> Tensor:
        return local


class Twice:
    """The reducer of two ranks that hold the same values."""

    def moments(self, local: Moments) -> Moments:
        return Moments(2 * local.count, local.mean, 2 * local.m2)

    def sums(self, local: Tensor) -> Tensor:
        return 2 * local


def constants(batch: Moments) -> tuple[Tensor, Tensor]:
    r = torch.linspace(0.5, 2, batch.channels, dtype=torch.float64)
    return r, torch.linspace(-1, 1, batch.channels, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Problem:
    """One batch with its dy, and what comes of it."""

    affine = True

    def __init__(self, dtype: torch.dtype, channels_last: bool, activation: str | None, extras: bool) -> None:
        x, residual = normal(6, 5, 3, 4, dtype=dtype), normal(6, 5, 3, 4, seed=1, dtype=dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        wide = torch.promote_types(dtype, torch.float32)
        self.tensors = [x, normal(5, seed=2, dtype=wide) + 1.5, normal(5, seed=3, dtype=wide)]
        self.mask = self.weights = None
        if extras:
            self.tensors.append(residual)
            self.mask = normal(6, 3, 4, seed=4) > -1
            self.weights = normal(6, 3, 4, seed=5).abs()
        self.activation = activation_by_name(activation, 0.1)
        self.dy = normal(6, 5, 3, 4, seed=6, dtype=dtype)

    def as_float64(self) -> Problem:
        wide = copy(self)
        wide.tensors = [t.double() for t in self.tensors]
        wide.dy = self.dy.double()
        return wide

    def call(self, seams: Seams, times: int = 1, correction: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
        """y, gradients and running statistics, with the batch repeated ``times``; y of its first copy.

        ``correction`` is r and d, applied here by ordinary operations.
        """
        leaves = [t.detach().clone().requires_grad_() for t in self.tensors]
        x, weight, bias, *rest = leaves
        if not self.affine:
            weight = bias = None
            leaves = [x, *rest]
        residual = rest[0].repeat(times, 1, 1, 1) if rest else None
        repeated = x.repeat(times, 1, 1, 1) if times > 1 else x
        places = EVERYWHERE
        if self.mask is not None and self.weights is not None:
            masks, weights = self.mask.repeat(times, 1, 1), self.weights.repeat(times, 1, 1)
            places = check_places("test", repeated, masks, weights, by_batch=True)
        if correction is not None:
            r, d = correction
            ones, zeros = torch.ones(5).double(), torch.zeros(5).double()
            weight, bias = ones if weight is None else weight, zeros if bias is None else bias
            weight, bias = weight * r, weight * d + bias
        running = Running(torch.zeros(5).double(), torch.ones(5).double(), 0.3, torch.zeros((), dtype=torch.int64))
        y = run(repeated, weight, bias, EPS, Batch(running, seams), self.activation, residual, places)
        grads = torch.autograd.grad(y, leaves, self.dy.repeat(times, 1, 1, 1))
        names = ("dx", *(("dweight", "dbias") if self.affine else ()), "dresidual")
        found = {"y": y[:6], **dict(zip(names, grads, strict=False))}
        return {**found, "running_mean": running.mean, "running_var": running.var, "batches": running.batches}


def agree(found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    scales = {"dweight": 72.0, "dbias": 72.0, "running_mean": 1.0}  # 72 values a channel, each of the size of 1
    for name, value in expected.items():
        if name == "batches":
            assert torch.equal(found[name], value)
        else:
            assert_close(found[name], value.detach(), dtype=dtype, quantity=name, scale=scales.get(name))


CASES = pytest.mark.parametrize(
    ("activation", "extras"), [(None, False), ("relu", False), ("relu", True), ("leaky_relu", True), ("silu", True)]
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@CASES
def test_a_reducer_that_changes_nothing(
    backend: str, channels_last: bool, dtype: torch.dtype, activation: str | None, extras: bool
) -> None:
    skip_unless_fused(backend, activation)
    problem = Problem(dtype, channels_last, activation, extras)
    with use_backend("composite"):
        expected = problem.as_float64().call(Seams())
    with use_backend(backend):
        agree(problem.call(Seams(reducer=Alone())), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@CASES
def test_two_ranks_with_the_same_values(
    backend: str, channels_last: bool, activation: str | None, extras: bool
) -> None:
    skip_unless_fused(backend, activation)
    problem = Problem(torch.float64, channels_last, activation, extras)
    with use_backend("composite"):
        expected = problem.call(Seams(), times=2)
    for name in ("dx", "dweight", "dbias", "dresidual"):
        if name in expected:
            expected[name] = expected[name] / 2  # of one rank
    with use_backend(backend):
        agree(problem.call(Seams(reducer=Twice())), expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [True, False])
@CASES
def test_a_correction_is_a_constant_factor_and_offset(
    backend: str, affine: bool, activation: str | None, extras: bool
) -> None:
    skip_unless_fused(backend, activation)
    problem = Problem(torch.float64, False, activation, extras)
    problem.affine = affine
    with use_backend("composite"):
        expected = problem.call(Seams(), correction=constants(Moments.empty(5)))
    with use_backend(backend):
        agree(problem.call(Seams(correct=constants)), expected, torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("seams", [Seams(Alone()), Seams(None, constants), Seams(Alone(), constants)])
def test_derivatives_of_first_and_second_order(backend: str, seams: Seams) -> None:
    x, weight, bias = normal(4, 2, 3), normal(2, seed=1) + 1.5, normal(2, seed=2)
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return run(x, weight, bias, EPS, Batch(None, seams), IDENTITY)

    with use_backend(backend):
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


def test_a_reducer_that_fails_changes_nothing() -> None:
    class Failing(Alone):
        def moments(self, local: Moments) -> Moments:
            raise RuntimeError("the group is gone")

    running = Running(torch.zeros(2), torch.ones(2), 0.1, torch.zeros((), dtype=torch.int64))
    with pytest.raises(RuntimeError, match="the group is gone"):
        run(normal(4, 2), None, None, EPS, Batch(running, Seams(Failing())), IDENTITY)
    assert torch.equal(running.mean, torch.zeros(2))
    assert torch.equal(running.var, torch.ones(2))
    assert running.batches == 0


def skip_unless_fused(backend: str, activation: str | None) -> None:
    if backend == "cpu" and activation == "silu":
        pytest.skip("the compiled kernels do not fuse silu")
