"""The operators as PyTorch's own checks see them: schema, fake tensors, and the tracing that compilers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from batchnorm.autograd import operators
from conformance import DTYPES, LAYOUTS, arrange

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "residual and relu": {"residual": True, "activation": "relu"},
    "residual and gelu": {"residual": True, "activation": "gelu"},  # no compiled kernel: by the plain one
    "mask": {"mask": True},
    "mask, residual and relu": {"mask": True, "residual": True, "activation": "relu"},
    "without parameters": {"affine": False},
}


def operands(
    shape: tuple[int, ...] = (4, 3, 5, 6),
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "identity",
    residual: bool = False,
    mask: bool = False,
    affine: bool = True,
) -> dict[str, Any]:
    """By the names that the operators give their arguments."""

    def like_x() -> Tensor:
        return arrange(torch.randn(shape).to(dtype), layout).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1]
    kept = like_x() if residual else None
    by_sign = activation == "relu" and residual
    return {
        "x": like_x(), "dy": like_x(), "residual": kept, "y": like_x().detach() if by_sign else None,
        "mean": torch.randn(channels, dtype=wide), "var": torch.rand(channels, dtype=wide) + 0.5,
        "weight": torch.randn(channels, dtype=wide).requires_grad_() if affine else None,
        "bias": torch.randn(channels, dtype=wide).requires_grad_() if affine else None,
        "mask": torch.rand(shape[0], 1, *shape[2:]) > 0.3 if mask else None,
        "sample_weight": None, "eps": 1e-5, "activation": activation, "negative_slope": 0.01,
    }  # fmt: skip


def of_train(given: dict[str, Any]) -> list[Any]:
    names = ("x", "weight", "bias", "residual", "mask", "sample_weight", "eps", "activation", "negative_slope")
    return [given[name] for name in names]


def of_infer(given: dict[str, Any]) -> list[Any]:
    names = ("x", "mean", "var", "weight", "bias", "residual", "mask", "eps", "activation", "negative_slope")
    return [given[name] for name in names]


def of_backward(given: dict[str, Any], training: bool) -> list[Any]:
    names = ("dy", "x", "weight", "bias", "residual", "y", "mask")
    dy, x, weight, bias, residual, y, mask = (None if given[n] is None else given[n].detach() for n in names)
    if y is not None or given["activation"] == "identity":
        residual = None
    stats = torch.stack((given["mean"], given["var"])).double()
    options = [given[name] for name in ("sample_weight", "eps", "activation", "negative_slope")]
    needs = [True, weight is not None, bias is not None, given["residual"] is not None]
    return [dy, x, stats, weight, bias, residual, y, mask, *options, training, needs]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("call", CALLS)
def test_pytorchs_check_of_operators_passes(call: str, layout: str) -> None:
    given = operands(layout=layout, **CALLS[call])
    opcheck(operators.train, of_train(given))
    opcheck(operators.infer, of_infer(given))
    for training in (True, False):
        opcheck(operators.backward, of_backward(given, training))


def test_pytorchs_check_of_operators_passes_with_sample_weights() -> None:
    given = operands(mask=True, residual=True)
    given["sample_weight"] = torch.rand(4, 1, 1, 1)
    opcheck(operators.train, of_train(given))
    opcheck(operators.backward, of_backward(given, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 7), (4, 3, 5, 6), (1, 3, 2, 1), (2, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_tell_shape_strides_and_dtype(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for call in ("relu", "residual", "residual and gelu", "mask"):
        given = operands(shape, layout, dtype, **CALLS[call])
        given = {name: t.detach() if isinstance(t, Tensor) else t for name, t in given.items()}
        given["dy"] = given["dy"].contiguous()
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in given.items()}
            told = looks_of_results(fake)
        assert told == looks_of_results(given), call


def looks_of_results(given: dict[str, Any]) -> list[Any]:
    results = [*operators.train(*of_train(given)), operators.infer(*of_infer(given))]
    for training in (True, False):
        results += operators.backward(*of_backward(given, training))
    # A dimension of size 1 is never stepped through: its stride is anything.
    return [(t.shape, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1], t.dtype) for t in results]
