"""The oracle is right, and a result that is off is found, quantity by quantity."""

from __future__ import annotations

import pytest
import torch

from batchnorm import reference
from batchnorm.bench.cases import DTYPES, EXTRAS, LAYOUTS, Case
from batchnorm.bench.peers import PEERS
from batchnorm.bench.problem import EPS, MOMENTUM, Problem
from tolerances import assert_close, to_float64

QUANTITIES = ("y", "dx", "dweight", "dbias", "dresidual")


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracle_is_the_papers(layout: str, extra: str) -> None:
    problem = Problem(Case((3, 5, 4, 6), "float64", layout, "forward+backward", extra))
    given = {
        "weight": to_float64(problem.weight),
        "bias": to_float64(problem.bias),
        "eps": EPS,
        "residual": None if problem.residual is None else to_float64(problem.residual),
        "activation": "identity" if extra == "plain" else "relu",
    }
    x = to_float64(problem.x)
    forward = reference.batch_norm_forward(x, **given)
    assert problem.dy is not None
    gradients = reference.batch_norm_backward(to_float64(problem.dy), x, **given)
    right = {"y": forward.y, "dx": gradients.dx, "dresidual": gradients.dresidual}
    for quantity in ("y", "dx", *(["dresidual"] if extra == "residual+relu" else [])):
        assert_close(problem.expected[quantity], right[quantity], dtype="float64", quantity=quantity)
    for quantity, sums in (("dweight", gradients.dweight), ("dbias", gradients.dbias)):
        scale = problem.expected[f"{quantity}_scale"]
        assert_close(problem.expected[quantity], sums, dtype="float64", quantity=quantity, scale=scale)
    start = reference.Population(to_float64(problem.running_mean), to_float64(problem.running_var))
    running = reference.running_update(start, forward.statistics, MOMENTUM)
    assert_close(problem.expected["running_mean"], running.mean, dtype="float64", quantity="running_mean", scale=1.0)
    assert_close(problem.expected["running_var"], running.var, dtype="float64", quantity="running_var")


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_oracle_of_inference_is_the_papers(extra: str) -> None:
    problem = Problem(Case((3, 5, 7), "float64", mode="inference", extra=extra))
    fixed = reference.Population(to_float64(problem.running_mean), to_float64(problem.running_var))
    right = reference.batch_norm_forward(
        to_float64(problem.x),
        to_float64(problem.weight),
        to_float64(problem.bias),
        EPS,
        population=fixed,
        residual=None if problem.residual is None else to_float64(problem.residual),
        activation="identity" if extra == "plain" else "relu",
    )
    assert_close(problem.expected["y"], right.y, dtype="float64", quantity="y")


def test_the_oracle_is_the_same_in_one_piece_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((3, 7, 5, 5), extra="residual+relu")
    whole = Problem(case)
    monkeypatch.setattr("batchnorm.bench.problem._CHUNK", 100)
    parts = Problem(case)
    result = PEERS["torch"](parts).run()
    assert whole.check(result, None) is None
    assert parts.check(result, None) is None
    for name in ("y", "dx", "dweight", "running_var"):
        torch.testing.assert_close(parts.expected[name], whole.expected[name], rtol=1e-12, atol=1e-12)


# Ours in every dtype is the conformance suite's business.
@pytest.mark.parametrize(("peer", "dtype"), [("ours", "float32"), *(("torch", dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_honest_results_pass(layout: str, extra: str, peer: str, dtype: str) -> None:
    problem = Problem(Case((5, 6, 7, 9), dtype, layout, "forward+backward", extra))
    program = PEERS[peer](problem)
    assert problem.check(program.read(program.run()), program.running()) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("broken", [lambda t: t * 0.9, lambda t: t + 0.1 * t.abs().max(), lambda t: t * float("nan")])
def test_a_result_that_is_off_is_named(broken: object, quantity: str, dtype: str) -> None:
    problem = Problem(Case((5, 6, 7, 9), dtype, extra="residual+relu"))
    result = list(PEERS["torch"](problem).run())
    place = QUANTITIES.index(quantity)
    assert callable(broken)
    result[place] = broken(result[place].detach())
    error = problem.check(result, None)
    assert error is not None and error.startswith(f"{quantity} is off by ")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", ["the mean of dz", "the part along x̂"])
def test_a_dx_without_one_of_its_terms_is_off(missing: str, dtype: str) -> None:
    problem = Problem(Case((5, 6, 7, 9), dtype))
    assert problem.dy is not None
    y, _, *others = PEERS["torch"](problem).run()
    x = problem.x.double()
    rest = (0, 2, 3)
    mean, var = x.mean(rest, keepdim=True), x.var(rest, keepdim=True, correction=0)
    x_hat = (x - mean) * (var + EPS).rsqrt()
    dy = problem.dy.double()
    dz = dy if missing == "the mean of dz" else dy - dy.mean(rest, keepdim=True)
    if missing != "the part along x̂":
        dz = dz - x_hat * (dy * x_hat).mean(rest, keepdim=True)
    wrong = dz * (var + EPS).rsqrt() * problem.weight.double().view(1, -1, 1, 1)
    error = problem.check([y, wrong.to(problem.x.dtype), *others], None)
    assert error is not None and error.startswith("dx is off by ")


@pytest.mark.parametrize("which", [0, 1])
def test_running_statistics_that_did_not_follow_are_off(which: int) -> None:
    problem = Problem(Case((5, 6, 7, 9)))
    program = PEERS["torch"](problem)
    result = program.run()
    running = program.running()
    assert running is not None
    running[which].copy_((problem.running_mean, problem.running_var)[which])
    error = problem.check(result, running)
    assert error is not None and error.startswith(("running_mean is off by ", "running_var is off by ")[which])


def test_a_result_of_another_shape_is_off() -> None:
    problem = Problem(Case((4, 3), mode="inference"))
    assert problem.check([torch.zeros(3, 4)], None) == "y has shape (3, 4), not (4, 3)"


def test_data_is_shared_among_modes_of_training_only() -> None:
    problem = Problem(Case((4, 3), mode="forward"))
    assert problem.serves(Case((4, 3), mode="forward+backward"))
    assert not problem.serves(Case((4, 3), mode="inference"))
    assert not problem.serves(Case((4, 3), extra="relu"))
    other = problem.of(Case((4, 3), mode="forward+backward"))
    assert other.x is problem.x and other.case.mode == "forward+backward" and problem.case.mode == "forward"
