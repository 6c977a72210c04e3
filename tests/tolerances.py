"""The one table of tolerances: dtype x quantity, a reason in each row.

Every comparison with the float64 reference goes through `assert_close`. An element passes when

    |actual - reference| <= rtol * |reference| + atol * scale + tiny

`rtol` is what the rounding of the result itself may cost, so it is half a unit in the last place of the
result's dtype; `atol * scale` is the noise of the arithmetic before that rounding, which is relative to the
size of the numbers that were added up and not to what is left of them. `tiny` is half the smallest subnormal.

`scale` is a number, or an array that broadcasts to the reference:

    y, dx, dresidual,
    folded, difference   max|reference| if not given. Give it where cancellation makes the result small:
                         max(|weight * x_hat| + |bias| + |residual|) for y and
                         max|weight * dz / sqrt(var + eps)| for dx (a batch of two values has dx near 0).
    dweight, dbias       must be given: the sum of |terms| for each channel.
    mean, running_mean   must be given: the standard deviation for each channel.
    var, running_var     none: these are relative.

For a float64 input with |mean| > std, multiply every scale but those of the means by |mean|/std: float64 has no
wider type in which its mean could be held.

A place where z is within rounding of the kink of relu or leaky_relu may take either slope. `silence_kinks`
sets dy to 0 there, so that such a place cannot decide a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

# Unit roundoff: the largest relative error of rounding to nearest.
UNIT: Final = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the spacing of the subnormal numbers, where relative error means nothing.
TINY: Final = {"float64": 2.0**-1075, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}


@dataclass(frozen=True)
class Tolerance:
    """One row: what rounding the result may cost, what the arithmetic before it may, and why."""

    rtol: float
    atol: float
    reason: str


_Y32 = "x-hi, -lo, 1/std, product and +bias round once each: 5 * 6e-8 = 3e-7; 5e-6 is promised at max|y| = 5"
_DX32 = "as y, and two more products and sums, each of the size of dz/std: 1e-6; three times that"
_DZ32 = "dy * act'(z): the noise of z (3e-7 of its size) times |act''| <= 1.1, then one product"
_SUM32 = "3e-7 for a term; a chain of 4096 float32 additions walks 64 * 6e-8 / 1.7 = 2e-6 of sum|terms|"
_MEAN32 = "float32 sums about a shift near the mean, chunks merged in float64: relative to std, not to the mean"
_VAR32 = "promised: 1e-6 of the variance at any mean up to 1e6 std; no absolute part, so a constant has variance 0"
_HALF = "; then rounded once, half a unit in the last place"
_RUN = "; the buffer rounds the batch's value and the sum: 2 * 2**-24 of the value"

TABLE: Final[dict[tuple[str, str], Tolerance]] = {
    ("float64", "y"): Tolerance(0, 1e-12, "some 10 roundings and the order of two sums over up to 1e4 values"),
    ("float64", "dx"): Tolerance(0, 1e-12, "as y"),
    ("float64", "dresidual"): Tolerance(0, 1e-12, "as y"),
    ("float64", "dweight"): Tolerance(0, 1e-12, "as y, relative to sum|terms|"),
    ("float64", "dbias"): Tolerance(0, 1e-12, "as y, relative to sum|terms|"),
    ("float64", "mean"): Tolerance(1e-14, 1e-12, "a sum about a shift; the mean itself is rounded at its own size"),
    ("float64", "var"): Tolerance(1e-12, 0, "a two-pass sum of squares"),
    ("float64", "running_mean"): Tolerance(1e-14, 1e-12, "as mean, and one update"),
    ("float64", "running_var"): Tolerance(1e-12, 0, "as var, and one update"),
    ("float64", "difference"): Tolerance(
        0, 1e-8, "central differences, step 1e-5: truncated at 1e-10, rounded at 1e-10"
    ),
    ("float64", "folded"): Tolerance(0, 1e-12, "promised; weights rounded once more, 1e-16 a layer, summed over it"),
    ("float32", "folded"): Tolerance(
        0, 1e-5, "promised; weights rounded once more, 6e-8 a layer, over some 100 layers"
    ),
    ("float32", "y"): Tolerance(0, 1e-6, _Y32),
    ("float32", "dx"): Tolerance(0, 3e-6, _DX32),
    ("float32", "dresidual"): Tolerance(0, 1e-6, _DZ32),
    ("float32", "dweight"): Tolerance(2.0**-24, 2e-6, _SUM32),
    ("float32", "dbias"): Tolerance(2.0**-24, 2e-6, _SUM32),
    ("float32", "mean"): Tolerance(1e-14, 1e-6, _MEAN32),
    ("float32", "var"): Tolerance(1e-6, 0, _VAR32),
    ("float32", "running_mean"): Tolerance(2.0**-23, 1e-6, _MEAN32 + _RUN),
    ("float32", "running_var"): Tolerance(1e-6 + 2.0**-23, 0, _VAR32 + _RUN),
    ("float16", "y"): Tolerance(2.0**-11, 1e-6, _Y32 + _HALF),
    ("float16", "dx"): Tolerance(2.0**-11, 3e-6, _DX32 + _HALF),
    ("float16", "dresidual"): Tolerance(2.0**-11, 1e-6, _DZ32 + _HALF),
    ("float16", "dweight"): Tolerance(2.0**-11, 2e-6, _SUM32 + _HALF),
    ("float16", "dbias"): Tolerance(2.0**-11, 2e-6, _SUM32 + _HALF),
    ("float16", "mean"): Tolerance(1e-14, 1e-6, _MEAN32),
    ("float16", "var"): Tolerance(1e-6, 0, _VAR32),
    # Running statistics are float32 whatever the input's dtype, so these rows are those of float32.
    ("float16", "running_mean"): Tolerance(2.0**-23, 1e-6, _MEAN32 + _RUN),
    ("float16", "running_var"): Tolerance(1e-6 + 2.0**-23, 0, _VAR32 + _RUN),
    ("bfloat16", "y"): Tolerance(2.0**-8, 1e-6, _Y32 + _HALF),
    ("bfloat16", "dx"): Tolerance(2.0**-8, 3e-6, _DX32 + _HALF),
    ("bfloat16", "dresidual"): Tolerance(2.0**-8, 1e-6, _DZ32 + _HALF),
    ("bfloat16", "dweight"): Tolerance(2.0**-8, 2e-6, _SUM32 + _HALF),
    ("bfloat16", "dbias"): Tolerance(2.0**-8, 2e-6, _SUM32 + _HALF),
    ("bfloat16", "mean"): Tolerance(1e-14, 1e-6, _MEAN32),
    ("bfloat16", "var"): Tolerance(1e-6, 0, _VAR32),
    ("bfloat16", "running_mean"): Tolerance(2.0**-23, 1e-6, _MEAN32 + _RUN),
    ("bfloat16", "running_var"): Tolerance(1e-6 + 2.0**-23, 0, _VAR32 + _RUN),
}

_SCALED_BY_REFERENCE = ("y", "dx", "dresidual", "folded", "difference")
_RELATIVE = ("var", "running_var")


def dtype_name(dtype: torch.dtype | str) -> str:
    """`torch.float32` and "float32" are both "float32"."""
    return str(dtype).removeprefix("torch.")


def to_float64(value: Any) -> Array:
    """A tensor of any dtype and device, an array or a number, as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)


def tolerance(dtype: torch.dtype | str, quantity: str) -> Tolerance:
    """The row of the table. An unknown dtype or quantity is a KeyError, never a default."""
    return TABLE[dtype_name(dtype), quantity]


def assert_close(
    actual: Any, reference: Any, *, dtype: torch.dtype | str, quantity: str, scale: Any = None, what: str = ""
) -> None:
    """Fail unless every element of `actual` is within its row of `reference`, a finite float64 array.

    `dtype` is the dtype of the input for mean and var, which are float64 themselves, and for the running
    statistics; it is the dtype of the result for all others. `what` is put in front of the message.
    """
    name = dtype_name(dtype)
    row = tolerance(name, quantity)
    expected = _reference(reference)
    label = f"{what}: {quantity}" if what else quantity
    got_dtype = actual.dtype if isinstance(actual, torch.Tensor) else np.asarray(actual).dtype
    if quantity in _SCALED_BY_REFERENCE or quantity in ("dweight", "dbias"):
        assert dtype_name(got_dtype) == name, f"{label} has dtype {got_dtype}, expected {name}"
    if quantity in _RELATIVE:
        if scale is not None:
            raise ValueError(f"assert_close: {quantity} is relative and takes no scale")
        scale = 0.0
    elif scale is None:
        if quantity not in _SCALED_BY_REFERENCE:
            raise ValueError(f"assert_close: {quantity} needs a scale (see the head of tolerances.py)")
        scale = np.abs(expected).max(initial=0.0)
    size = to_float64(scale)
    if not np.isfinite(size).all():
        raise ValueError("assert_close: scale must be finite")

    got = to_float64(actual)
    assert got.shape == expected.shape, f"{label} has shape {got.shape}, expected {expected.shape}"
    if got.size == 0:
        return
    # TINY underflows to 0 for float64: there it has no say.
    allowed = np.broadcast_to(row.rtol * np.abs(expected) + row.atol * size + TINY[name], expected.shape)
    error = np.abs(got - expected)
    bad = ~(error <= allowed)  # written so that NaN is bad
    if not bad.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.isnan(error), np.inf, np.where(bad, error / allowed, 0.0))
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{label} ({name}) is off at {int(bad.sum())} of {bad.size} places; the worst is {index}:\n"
        f"  got {got[index]:.9g}, expected {expected[index]:.9g}, error {error[index]:.3g},"
        f" allowed {allowed[index]:.3g} ({ratio[index]:.3g} times as much)\n"
        f"  row: rtol {row.rtol:.3g}, atol {row.atol:.3g} x scale {size.max():.3g}: {row.reason}"
    )


def assert_not_worse_than_torch(
    ours: Any,
    torchs: Any,
    reference: Any,
    *,
    dtype: torch.dtype | str,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """The rule of flash-attention: our error is at most twice PyTorch's, plus one rounding of the result.

    All three see the same input; the errors are the largest absolute differences from the float64 reference.
    The one rounding, `UNIT[dtype] * max|reference|`, is for the case in which PyTorch happens to be exact.
    """
    name = dtype_name(dtype)
    expected = _reference(reference)
    ours64, torchs64 = to_float64(ours), to_float64(torchs)
    assert ours64.shape == expected.shape, f"{what} has shape {ours64.shape}, expected {expected.shape}"
    assert torchs64.shape == expected.shape, f"{what}: PyTorch's has shape {torchs64.shape}, not {expected.shape}"
    our_error = np.abs(ours64 - expected).max(initial=0.0)
    torch_error = np.abs(torchs64 - expected).max(initial=0.0)
    assert np.isfinite(torch_error), f"{what} ({name}): PyTorch's result is not finite and can be no yardstick"
    rounding = UNIT[name] * np.abs(expected).max(initial=0.0)
    assert our_error <= factor * torch_error + rounding, (
        f"{what} ({name}): our largest error is {our_error:.3g}, PyTorch's {torch_error:.3g};"
        f" allowed {factor:g} times that and one rounding of {rounding:.3g}"
    )


def silence_kinks(dy: torch.Tensor, z: Any, *, margin: float = 1e-4) -> torch.Tensor:
    """A copy of dy that is 0 where |z| <= margin * max|z|: there relu's slope hangs on the last bit of z."""
    values = to_float64(z)
    near = np.abs(values) <= margin * np.abs(values).max(initial=0.0)
    return dy.masked_fill(torch.from_numpy(near).to(dy.device), 0.0)


def _reference(value: Any) -> Array:
    dtype = value.dtype if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else "not an array"
    if dtype_name(dtype) != "float64":
        raise TypeError(f"the reference must be a float64 array, got {dtype}")
    array = to_float64(value)
    if not np.isfinite(array).all():
        raise ValueError("the reference must be finite: compare NaN and Inf in a test of their own")
    return array
