"""The comparison that all other tests lean on: it must be able to fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tolerances import (
    TABLE,
    UNIT,
    assert_close,
    assert_not_worse_than_torch,
    silence_kinks,
    to_float64,
    tolerance,
)

QUANTITIES = ("y", "dx", "dresidual", "dweight", "dbias", "mean", "var", "running_mean", "running_var")
REFERENCE = np.array([[1.0, -2.0], [0.5, 4.0]])


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_dtype_and_quantity_has_a_row_with_a_reason(dtype: str, quantity: str) -> None:
    row = tolerance(getattr(torch, dtype), quantity)
    assert row is TABLE[dtype, quantity]
    assert 0 < row.rtol + row.atol <= 2.0**-8 + 1e-5
    assert row.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantity", ["y", "dx", "dresidual"])
def test_one_rounding_passes_and_ten_times_the_row_does_not(dtype: torch.dtype, quantity: str) -> None:
    assert_close(torch.tensor(REFERENCE, dtype=dtype), REFERENCE, dtype=dtype, quantity=quantity)
    row = tolerance(dtype, quantity)
    off = REFERENCE + np.array([[0.0, 0.0], [10 * (row.rtol + row.atol) * 4.0, 0.0]])
    with pytest.raises(AssertionError) as caught:
        assert_close(torch.tensor(off, dtype=dtype), REFERENCE, dtype=dtype, quantity=quantity, what="case")
    assert "is off at 1 of 4 places; the worst is (1, 0):" in str(caught.value)
    assert str(caught.value).startswith(f"case: {quantity} (")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_fails(wrong: float) -> None:
    actual = torch.tensor(REFERENCE)
    actual[0, 1] = wrong
    with pytest.raises(AssertionError, match=r"the worst is \(0, 1\)"):
        assert_close(actual, REFERENCE, dtype="float64", quantity="y")


def test_shape_and_dtype_of_the_result_count() -> None:
    with pytest.raises(AssertionError, match="has shape"):
        assert_close(torch.tensor(REFERENCE[:1]), REFERENCE, dtype="float64", quantity="y")
    with pytest.raises(AssertionError, match=r"dx has dtype torch.float64, expected float32"):
        assert_close(torch.tensor(REFERENCE), REFERENCE, dtype="float32", quantity="dx")


def test_a_reference_is_float64_and_finite() -> None:
    with pytest.raises(TypeError, match="float64 array, got float32"):
        assert_close(REFERENCE, REFERENCE.astype(np.float32), dtype="float64", quantity="y")
    with pytest.raises(ValueError, match="must be finite"):
        assert_close(REFERENCE, np.array([np.nan]), dtype="float64", quantity="y")


def test_sums_need_a_scale_and_variances_take_none() -> None:
    with pytest.raises(ValueError, match="dweight needs a scale"):
        assert_close(REFERENCE, REFERENCE, dtype="float64", quantity="dweight")
    with pytest.raises(ValueError, match="var is relative"):
        assert_close(REFERENCE, REFERENCE, dtype="float64", quantity="var", scale=1.0)
    with pytest.raises(KeyError):
        assert_close(REFERENCE, REFERENCE, dtype="float64", quantity="dgamma")


def test_the_scale_of_a_channel_is_its_own() -> None:
    reference = np.array([0.0, 0.0])
    scale = np.array([1e6, 1.0])
    assert_close(np.array([1e-7, 0.0]), reference, dtype="float64", quantity="dweight", scale=scale)
    with pytest.raises(AssertionError, match=r"the worst is \(1,\)"):
        assert_close(np.array([0.0, 1e-7]), reference, dtype="float64", quantity="dweight", scale=scale)


def test_a_variance_of_zero_must_be_zero() -> None:
    assert_close(np.zeros(2), np.zeros(2), dtype="float32", quantity="var")
    with pytest.raises(AssertionError, match="var"):
        assert_close(np.array([0.0, 1e-12]), np.zeros(2), dtype="float32", quantity="var")


def test_the_rule_of_flash_attention() -> None:
    torchs = torch.tensor(REFERENCE + 1e-3)
    assert_not_worse_than_torch(REFERENCE - 1.9e-3, torchs, REFERENCE, dtype="float64")
    with pytest.raises(AssertionError, match=r"our largest error is 0\.0022, PyTorch's 0\.001;"):
        assert_not_worse_than_torch(REFERENCE + 2.2e-3, torchs, REFERENCE, dtype="float64")
    with pytest.raises(AssertionError, match="our largest error is nan"):
        assert_not_worse_than_torch(REFERENCE * np.nan, torchs, REFERENCE, dtype="float64")
    half = torch.tensor(REFERENCE * (1 + 2.0**-8))  # one rounding, where PyTorch happens to be exact
    assert_not_worse_than_torch(half, REFERENCE, REFERENCE, dtype=torch.bfloat16)


def test_silence_kinks_quiets_what_is_near_zero_only() -> None:
    dy = torch.ones(4)
    z = np.array([10.0, -1e-4, 0.0, -0.1])
    assert to_float64(silence_kinks(dy, z)).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert dy.tolist() == [1.0] * 4
