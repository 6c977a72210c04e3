"""One suite for every kernel: what a case is, its inputs, and what the float64 reference says about it.

``test_conformance.py`` runs it over each backend that ``batchnorm.kernels.BACKENDS`` names. A new kernel is added
there and nowhere here.
"""

from __future__ import annotations

import importlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import BACKENDS
from batchnorm.kernels.activations import Activation
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.reference import Population
from tolerances import assert_close, dtype_name, silence_kinks, to_float64

Array = reference.Array
DEVICES = {"gpu": "cuda" if torch.cuda.is_available() else "cpu"}
"""Where a backend's tensors are, if not on the CPU. Without a GPU Triton's interpreter runs the GPU's kernels there."""
NAMES = [
    name for name in BACKENDS if name != "gpu" or torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
]
"""The backends that can run here; tests/kernels/test_gpu_interpreted.py runs the GPU's in a process of its own."""
ON_THE_CPU = [name for name in BACKENDS if name not in DEVICES]
"""Those that take CPU tensors at the speed that tests need, for tests that make their tensors there."""
MARGIN = 64
"""Values in front of and behind a tensor that no kernel may read or write."""

EPS = 1e-3
MOMENTUM = 0.3
SLOPE = 0.2

SHAPES: tuple[tuple[int, ...], ...] = (
    (2, 1),
    (7, 3),
    (60, 100),
    (33, 65),
    (64, 3, 1),
    (5, 65, 7),
    (2, 1, 49),
    (1, 3, 2, 1),
    (4, 64, 7, 7),
    (3, 5, 13, 1),
    (2, 65, 1, 49),
    (3, 3, 33, 31),
    (2, 3, 2, 3, 7),
    (4, 16, 3, 2, 2),
)
LAYOUTS = ("contiguous", "channels_last", "transposed", "permuted", "sliced", "offset", "expanded", "repeated")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "leaky_relu", "rising_leaky_relu", "silu", "gelu", "sigmoid", "tanh")

FACTORS: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "values": ("normal", "constant channel", "mean 1e4", "mean 1e6", "subnormal"),
    "affine": ("weight and bias", "weight", "bias", "none"),
    "parameters": ("own dtype", "float32"),
    "activation": ACTIVATIONS,
    "residual": ("none", "full", "channels_last", "broadcast", "repeated"),
    "places": (
        "all",
        "mask of samples",
        "mask of positions",
        "mask of places",
        "weights of samples",
        "weights of positions",
        "mask and weights",
    ),
    "training": (True, False),
    "dy": ("contiguous", "channels_last", "permuted", "sliced", "broadcast"),
}


@dataclass(frozen=True)
class Case:
    """One point of FACTORS. ``activation="rising_leaky_relu"`` is leaky_relu with a slope below 0."""

    shape: tuple[int, ...] = (4, 3, 5, 5)
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    affine: str = "weight and bias"
    parameters: str = "own dtype"
    activation: str | None = None
    residual: str = "none"
    places: str = "all"
    training: bool = True
    dy: str = "contiguous"

    def __str__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "shape":
                shown.append("x".join(str(n) for n in value))
            elif f.name == "dtype":
                shown.append(dtype_name(value))
            elif value != f.default:
                shown.append("eval" if f.name == "training" else f"{f.name}={value}")
        return ",".join(shown).replace(" ", "-")


def allowed(row: Mapping[str, Any]) -> bool:
    """Whether a case, given in part or whole, means something and can be told right from wrong."""
    shape, dtype, values = row.get("shape"), row.get("dtype"), row.get("values")
    if row.get("parameters") == "float32" and dtype in (torch.float32, torch.float64):
        return False
    if row.get("parameters") == "float32" and row.get("affine") == "none":
        return False
    if values in ("mean 1e4", "mean 1e6") and dtype in (torch.bfloat16, torch.float16):
        return False  # the values themselves would be rounded to a handful
    if shape is None:
        return True
    values_a_channel = int(np.prod(shape)) // shape[1]
    if row.get("places", "all") != "all" and (values_a_channel < 12 or shape[0] < 3):
        return False  # too few would be left
    if row.get("layout") == "repeated" and (len(shape) < 3 or values_a_channel == shape[0]):
        return False  # every value of a channel would be the same
    if row.get("layout") == "expanded" and (values_a_channel == shape[-1] or len(shape) == 2):
        return len(shape) == 2
    return True


def load(name: str) -> ModuleType:
    """The backend's module; a visible skip where it cannot be imported."""
    try:
        return importlib.import_module(BACKENDS[name])
    except (ImportError, OSError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def skip_unless_served(kernel: ModuleType, inputs: Inputs) -> None:
    skip_unless(kernel, inputs.x, activation=inputs.activation, mask=inputs.mask, sample_weight=inputs.sample_weight)


def skip_unless(kernel: ModuleType, x: Tensor, **call: Any) -> None:
    """A visible skip, with the kernel's own reason, where it does not serve such a call."""
    why = kernel.supports(x, **call)
    if why is not None:
        pytest.skip(f"{kernel.NAME}: {why}")


# Layouts


def arrange(values: Tensor, layout: str) -> Tensor:
    """A tensor of values' shape in the given layout; "expanded" and "repeated" repeat some of the values."""
    d = values.dim()
    inner = tuple(range(2, d))
    match layout:
        case "contiguous":
            return _in_order(values, tuple(range(d)))
        case "channels_last":
            return _in_order(values, (0, *inner, 1))
        case "transposed":  # a sequence (L, N, C) seen as (N, C, L)
            return _in_order(values, (*inner, 0, 1))
        case "permuted":  # channels outermost, the others in an odd order
            return _in_order(values, (1, *inner[1:], 0, *inner[:1]))
        case "sliced":  # gaps on every side
            room = values.new_zeros([2 * n + 1 if i == 0 else n + 3 for i, n in enumerate(values.shape)])
            view = room[tuple(slice(1, None, 2) if i == 0 else slice(1, n + 1) for i, n in enumerate(values.shape))]
            return view.copy_(values)
        case "offset":  # an address that no vector instruction likes
            return values.new_zeros(values.numel() + 1)[1:].view(values.shape).copy_(values)
        case "expanded":
            return values[..., :1].clone().expand(values.shape)
        case "repeated":
            return values[:1].clone().expand(values.shape)
        case "broadcast":  # one value a sample and channel, as the gradient of a mean over positions is
            return values[(..., *(slice(0, 1),) * (d - 2))].clone().expand(values.shape)
    raise ValueError(layout)


def placed(t: Tensor, name: str) -> Tensor:
    """``t`` with its strides on the backend's device, NaN (integers: their largest value) in front and behind."""
    if name not in DEVICES:
        return t
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    largest = True if t.dtype == torch.bool else float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    room = torch.full((flat.numel() + 2 * MARGIN,), largest, dtype=t.dtype, device=DEVICES[name])
    room[MARGIN:-MARGIN].copy_(flat)
    return room.as_strided(t.size(), t.stride(), MARGIN + t.storage_offset())


def _in_order(values: Tensor, order: tuple[int, ...]) -> Tensor:
    packed = torch.zeros([values.shape[i] for i in order], dtype=values.dtype)
    return packed.permute([order.index(i) for i in range(len(order))]).copy_(values)


# Inputs


@dataclass
class Inputs:
    """The tensors of a case. ``mask`` and ``sample_weight`` have x's rank, as kernels get them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None
    dy: Tensor
    running_mean: Tensor
    running_var: Tensor
    activation: Activation
    training: bool

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def inputs_of(case: Case, name: str = "eager") -> Inputs:
    """The case's tensors: random, from the case's own seed, where the backend wants them. What is absent holds NaN."""
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    shape, channels, dtype = case.shape, case.shape[1], case.dtype

    def normal(size: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64) * std + mean

    mask, sample_weight = _places(case, g)
    x, residual, dy = _values(case, normal), normal(shape), normal(shape)
    repeats = case.layout in ("expanded", "repeated")
    if mask is not None and not repeats:
        x = torch.where(mask, x, float("nan"))
    if mask is not None and case.residual == "full":
        residual = torch.where(mask, residual, float("nan"))
    if mask is not None and case.dy != "broadcast":
        dy = torch.where(mask, dy, float("nan"))

    parameters = torch.float32 if case.parameters == "float32" else dtype
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    has = {"weight": case.affine in ("weight", "weight and bias"), "bias": case.affine in ("bias", "weight and bias")}
    weight = normal((channels,), 1.0, 0.5).to(parameters)
    bias = normal((channels,), 0.0, 0.5).to(parameters)
    slope = {"leaky_relu": SLOPE, "rising_leaky_relu": -SLOPE}.get(case.activation or "", 0.01)
    name = "leaky_relu" if case.activation == "rising_leaky_relu" else case.activation
    x = arrange(x.to(dtype), case.layout)
    running_mean, running_var = _running(case, normal)
    result = Inputs(
        x=x,
        weight=weight if has["weight"] else None,
        bias=bias if has["bias"] else None,
        residual=None if case.residual == "none" else _residual(residual.to(dtype), case.residual),
        mask=mask,
        sample_weight=sample_weight,
        dy=arrange(dy.to(dtype), case.dy),
        running_mean=running_mean.to(statistics),
        running_var=running_var.to(statistics),
        activation=activation_by_name(name, slope),
        training=case.training,
    )
    if name in ("relu", "leaky_relu"):
        result.dy = _silenced(result.dy, forward_of(result).z, case.dy)
    moved = {f.name: placed(t, name) for f in fields(result) if isinstance(t := getattr(result, f.name), Tensor)}
    return replace(result, **moved)


def _silenced(dy: Tensor, z: Array, layout: str) -> Tensor:
    """dy, 0 near the kinks, in its own layout: a value that several places share is 0 if one of them is near."""
    if layout != "broadcast":
        return arrange(silence_kinks(dy, z), layout)
    near = silence_kinks(torch.ones(dy.shape), z) == 0
    near = near.flatten(2).any(2).view(*dy.shape[:2], *(1,) * (dy.dim() - 2)) if dy.dim() > 2 else near
    return arrange(dy.masked_fill(near, 0.0), layout)


def _values(case: Case, normal: Any) -> Tensor:
    shape = case.shape
    by_channel = (1, -1, *(1,) * (len(shape) - 2))
    spread = normal((shape[1],)).abs().clamp(0.3, 2.0).view(by_channel)
    centre = normal((shape[1],)).abs().view(by_channel) + 0.5
    match case.values:
        case "normal":
            return normal(shape) * spread + centre
        case "constant channel":
            x = normal(shape) * spread + centre
            x[:, ::2] = 3.7
            return x
        case "mean 1e4":
            return normal(shape) + 1e4
        case "mean 1e6":
            return normal(shape) + 1e6
        case "subnormal":
            smallest = torch.finfo(case.dtype).smallest_normal
            return normal(shape) * smallest
    raise ValueError(case.values)


def _running(case: Case, normal: Any) -> tuple[Tensor, Tensor]:
    """Positive, so that an update adds and does not cancel; in inference near what x has."""
    centre = {"mean 1e4": 1e4, "mean 1e6": 1e6}.get(case.values, 1.0)
    mean = normal((case.shape[1],)).abs() + (0.0 if case.training else centre)
    return mean, normal((case.shape[1],)).abs() + 0.5


def _residual(residual: Tensor, how: str) -> Tensor:
    """With x's shape; "broadcast" is one value a channel, expanded as the public function does it."""
    if how == "broadcast":
        first = residual[(slice(0, 1), slice(None), *(slice(0, 1),) * (residual.dim() - 2))]
        return torch.nan_to_num(first, nan=0.5).expand(residual.shape)
    return arrange(residual, "contiguous" if how == "full" else how)


def _places(case: Case, g: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Mask and weights of x's rank; the first two samples are whole and weigh 2, so that enough is left."""
    n, channels, *spatial = case.shape
    rank = len(case.shape)
    kind = case.places
    positions = {"samples": (n, *(1,) * (rank - 1)), "positions": (n, 1, *spatial), "places": (n, channels, *spatial)}
    mask = sample_weight = None
    if kind.startswith("mask"):
        size = positions["positions" if kind == "mask and weights" else kind.removeprefix("mask of ")]
        mask = torch.rand(size, generator=g) > 0.3
        mask[:2] = True
        mask[2] = False
    if kind.startswith("weights") or kind == "mask and weights":
        size = positions["positions" if kind == "weights of positions" else "samples"]
        choices = torch.tensor([0.0, 0.5, 1.0, 2.5, 3.0])
        sample_weight = choices[torch.randint(0, 5, size, generator=g)]
        sample_weight[:2] = 2.0
    return mask, sample_weight


# What the reference says


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {
        "weight": None if inputs.weight is None else to_float64(inputs.weight),
        "bias": None if inputs.bias is None else to_float64(inputs.bias),
        "eps": EPS,
        "population": None if inputs.training else population_of(inputs),
        "residual": None if inputs.residual is None else to_float64(inputs.residual),
        "activation": inputs.activation.name,
        "negative_slope": inputs.activation.negative_slope,
        "mask": None if inputs.mask is None else inputs.mask.cpu().numpy(),
        "sample_weight": None if inputs.sample_weight is None else to_float64(inputs.sample_weight),
    }


def population_of(inputs: Inputs) -> Population:
    return Population(to_float64(inputs.running_mean), to_float64(inputs.running_var))


def forward_of(inputs: Inputs) -> reference.Forward:
    return reference.batch_norm_forward(to_float64(inputs.x), **_arguments(inputs))


def gradients_of(inputs: Inputs) -> reference.Gradients:
    return reference.batch_norm_backward(to_float64(inputs.dy), to_float64(inputs.x), **_arguments(inputs))


@dataclass
class Expected:
    """The reference's results for some inputs, and how large the numbers were from which each was added up."""

    inputs: Inputs
    forward: reference.Forward
    gradients: reference.Gradients
    scales: dict[str, Array]

    @property
    def count(self) -> Array:
        return self.forward.statistics.m

    def check(self, quantity: str, actual: Tensor | None, what: str, dtype: torch.dtype | None = None) -> None:
        """Hold a result against the reference, with the row (``dtype``'s, else the right one) and scale it has."""
        assert actual is not None, f"{what}: no {quantity} was given"
        if dtype is None:
            # A parameter's gradient has the parameter's dtype.
            dtype = actual.dtype if quantity in ("dweight", "dbias") else self.inputs.x.dtype
        assert_close(
            actual, self._value(quantity), dtype=dtype, quantity=quantity, scale=self.scales.get(quantity), what=what
        )

    def _value(self, quantity: str) -> Array:
        if quantity == "y":
            return self.forward.y
        if quantity in ("dx", "dweight", "dbias", "dresidual"):
            value: Array = getattr(self.gradients, quantity)
            return value
        if quantity in ("mean", "var"):
            statistic: Array = getattr(self.forward.statistics, quantity)
            return statistic
        after = reference.running_update(population_of(self.inputs), self.forward.statistics, MOMENTUM)
        return after.mean if quantity == "running_mean" else after.var


def expected_of(inputs: Inputs) -> Expected:
    forward, gradients = forward_of(inputs), gradients_of(inputs)
    x = forward.x_hat
    invstd = 1 / np.sqrt(forward.statistics.var + EPS)
    weight = np.ones_like(invstd) if inputs.weight is None else np.abs(to_float64(inputs.weight))
    bias = np.zeros_like(invstd) if inputs.bias is None else np.abs(to_float64(inputs.bias))
    mask = None if inputs.mask is None else inputs.mask.cpu().numpy()

    # float64 has no wider type in which to carry the mean: its rounding, seen through 1/std, is part of x̂.
    rounded = np.abs(forward.statistics.mean) * invstd if inputs.x.dtype == torch.float64 else np.zeros_like(invstd)
    x_hat = np.abs(reference.present_only(x, x, mask)) + reference.per_channel(rounded, x)
    z = x_hat * reference.per_channel(weight, x) + reference.per_channel(bias, x)
    if inputs.residual is not None:
        z = z + np.abs(reference.present_only(to_float64(inputs.residual), x, mask))
    dy = np.abs(reference.present_only(to_float64(inputs.dy), x, mask))
    # A smooth activation's slope is computed from a z that was rounded: its error is of dy's size, not of dz's.
    dz = np.abs(gradients.dresidual) if inputs.activation.is_piecewise_linear else dy
    rounding = reference.per_channel(rounded, x)
    if not inputs.activation.is_piecewise_linear:
        dz = dz * (1 + rounding * reference.per_channel(weight, x))
    dx = dz * reference.per_channel(weight * invstd, x) * (1 + rounding)
    # sigmoid(0) is a half: y may be larger than the numbers it came from.
    scales = {"y": _largest(np.maximum(z, np.abs(forward.y))), "dx": _largest(dx), "dresidual": _largest(dz)}
    scales["dbias"] = reference.sum_over_batch(dz)
    scales["dweight"] = reference.sum_over_batch(dz * x_hat)
    if inputs.training:
        # The variance of subnormal values is 0 in float64, but they have units in the last place.
        scales["mean"] = scales["running_mean"] = np.sqrt(forward.statistics.var) + np.finfo(np.float64).tiny
    return Expected(inputs, forward, gradients, scales)


def _largest(size: Array) -> Array:
    """The largest of each channel, as (1, channels, 1, ...)."""
    axes = tuple(a for a in range(size.ndim) if a != 1)
    return size.max(axis=axes, keepdims=True, initial=0.0)
