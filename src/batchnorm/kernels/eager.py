"""Plain PyTorch, for every device and dtype.

The functions of a kernel (``contract.Kernel``), over a tensor of any rank with channels in dimension 1, seen as
(outer, channel, inner). On the CPU each sweep goes part by part, so that what it needs beside its result
stays in cache. Three points keep the digits:

- mean and variance are float64, found mean first and squares about it after (``moments.py``);
- x − mean takes the mean as a float32 high part and a remainder. Near the mean x − hi is exact, so a mean of
  1e6 costs nothing;
- the result is (x − hi)·a + (bias − lo·a) and never x·a + (bias − mean·a): a constant channel, whose mean is
  itself a float32, gives its bias exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import layout
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import INPUT_ONLY, Needs, Running, count_of
from batchnorm.moments import Moments, Room, counted, cut, moments_of_view, statistics_dtype

NAME = "eager"

LARGE = 1e18
"""Of float32 arithmetic: mean and standard deviation below it, x − mean and sums of dz·(x − mean) stay finite."""


def supports(
    x: Tensor,
    *,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> str | None:
    """Serves everything."""
    return None


def moments(x: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Moments:
    """Count, mean and M2 of each channel. ``mask`` and ``sample_weight`` have x's rank and broadcast to it."""
    seen = layout.of(x)
    view = seen.view(x)
    if mask is not None:
        view = torch.where(seen.view(mask), view, torch.zeros((), dtype=x.dtype, device=x.device))
    return moments_of_view(view, _view(seen, counted(mask, sample_weight)))


@torch.no_grad()
def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation((x − mean)/√(var + eps)·weight + bias + residual), 0 where the mask is False.

    ``out`` may be ``x`` itself.
    """
    seen = layout.of(x)
    y = seen.empty(x) if out is None else out
    view, result = seen.view(x), seen.view(y)
    more, present = _view(seen, residual), _view(seen, mask)
    affine = _Affine.of(x, mean, var, eps, weight, bias)
    room = Room(x.device, affine.a.dtype)
    for part in _parts(view):
        into = result[part]
        z = affine.scaled(view[part], into if into.dtype == affine.a.dtype else room.like(into))
        if more is not None:
            z.add_(more[part])
        if activation.name == "relu":
            z.relu_()
        elif activation.name != "identity":
            z = activation(z)
        if present is not None:
            z = z.masked_fill_(~present[part], 0)
        if z is not into:
            into.copy_(z)
    if result.data_ptr() != y.data_ptr():
        # out's strides allowed no such view: a copy was filled.
        y.copy_(seen.unview(result))
    return y


@torch.no_grad()
def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Σdz and Σdz·x̂ of each channel, float64 (channels,).

    dz = dy·activation'(z), x̂ = (x − mean)/√(var + eps).
    """
    sweep = _Sweep.of(dy, x, mean, var, eps, weight, bias, residual, y, activation, mask)
    wide = mean.dtype
    sum_dz = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    sum_dz_centred = torch.zeros_like(sum_dz)
    for part in _parts(sweep.x):
        dz, centred = sweep.gradient(part)
        sum_dz += dz.sum((0, 2))
        centred.mul_(dz)
        if sweep.present is not None:
            centred.masked_fill_(~sweep.present[part], 0)
        sum_dz_centred += centred.sum((0, 2))
    if x.numel() == 0:
        return sum_dz, sum_dz_centred  # where the variance is NaN
    sum_dz_centred -= sweep.affine.lo * sum_dz
    return sum_dz, sum_dz_centred * torch.rsqrt(var.to(wide) + eps)


@torch.no_grad()
def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    count: Tensor | float,
    *,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    needs: Needs = INPUT_ONLY,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = weight/√(var + eps)·(dz − w·(Σdz + x̂·Σdz·x̂)/count), and dz as the residual's gradient.

    With ``sums`` None the statistics are constants (inference): dx = weight/√(var + eps)·dz.
    """
    sweep = _Sweep.of(dy, x, mean, var, eps, weight, bias, residual, y, activation, mask)
    dx = sweep.seen.empty(x) if needs.x else None
    dresidual = sweep.seen.empty(x) if needs.residual else None
    dx_view, dresidual_view = _view(sweep.seen, dx), _view(sweep.seen, dresidual)
    a = sweep.affine.a
    weights = _view(sweep.seen, sample_weight)
    if sums is not None:
        wide = mean.dtype
        invstd = torch.rsqrt(var.to(wide) + eps)
        per_unit = sums[1] * invstd / count
        slope = _per_channel(per_unit, a.dtype)
        constant = _per_channel(sums[0] / count - sweep.affine.lo * per_unit, a.dtype)
    for part in _parts(sweep.x):
        dz, centred = sweep.gradient(part)
        if dresidual_view is not None:
            dresidual_view[part] = dz
        if dx_view is None:
            continue
        if sums is not None:
            through_statistics = centred.mul_(slope).add_(constant)
            if weights is not None:
                through_statistics.mul_(weights[part])
            if sweep.present is not None:
                through_statistics.masked_fill_(~sweep.present[part], 0)
            dz = torch.sub(dz, through_statistics, out=centred)
        torch.mul(dz, a, out=dx_view[part]) if dx_view.dtype == a.dtype else dx_view[part].copy_(dz * a)
    return dx, dresidual


@torch.no_grad()
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """Training: y, and the batch's mean and biased variance as a tensor of shape (2, channels)."""
    found = moments(x, mask=mask, sample_weight=sample_weight)
    stats = torch.stack((found.mean, found.variance()))
    y = normalize(x, stats[0], stats[1], eps, weight, bias, residual=residual, activation=activation, mask=mask)
    if running is not None:
        running.update(found)
    return y, stats


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and the residual's gradient, None for each that is not needed.

    ``stats`` holds mean and biased variance, (2, channels): those of the batch in training, else constants.
    """
    mean, var = stats[0], stats[1]
    same = {"residual": residual, "y": y, "activation": activation, "mask": mask}
    sums = None
    if training or needs.weight or needs.bias:
        sums = backward_sums(dy, x, mean, var, eps, weight, bias, **same)  # type: ignore[arg-type]
    dx = dresidual = None
    if needs.x or needs.residual:
        count = count_of(x, mask, sample_weight)
        dx, dresidual = backward_input(
            dy, x, mean, var, eps, weight, bias, sums if training else None, count,
            sample_weight=sample_weight, needs=needs, **same,  # type: ignore[arg-type]
        )  # fmt: skip
    dweight = sums[1].to(weight.dtype) if needs.weight and sums is not None and weight is not None else None
    dbias = sums[0].to(bias.dtype) if needs.bias and sums is not None and bias is not None else None
    return dx, dweight, dbias, dresidual


class _Affine(NamedTuple):
    """Scale and shift of each channel: y = (x − hi)·a + shift, in the precision the values are computed in.

    What float32 leaves of the mean, lo = mean − hi, is the same for all values of a channel, so it goes into
    the shift (bias − lo·a) and costs no pass over the values.
    """

    hi: Tensor  # (1, channels, 1), as a and shift
    a: Tensor
    shift: Tensor
    lo: Tensor  # (channels,), float64 where the device has it

    @staticmethod
    def of(x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> _Affine:
        wide = statistics_dtype(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.is_cpu and dtype != wide and _is_large(mean, var):
            dtype = wide
        hi = mean.to(dtype)
        lo = mean.to(wide) - hi.to(wide)
        a = torch.rsqrt(var.to(wide) + eps)
        if weight is not None:
            a = a * weight.to(wide)
        # An infinite mean has no remainder: inf − inf would turn the infinity of y into a NaN it is not.
        shift = -torch.where(torch.isfinite(lo), lo * a, torch.zeros_like(lo))
        if bias is not None:
            shift = shift + bias.to(wide)
        return _Affine(_per_channel(hi, dtype), _per_channel(a, dtype), _per_channel(shift, dtype), lo)

    def centred(self, x: Tensor, out: Tensor) -> Tensor:
        """x − hi."""
        return torch.sub(x, self.hi, out=out)

    def scaled(self, x: Tensor, out: Tensor) -> Tensor:
        # Not one addcmul: with two factors to broadcast it takes a slow path; three passes in cache do not.
        return torch.sub(x, self.hi, out=out).mul_(self.a).add_(self.shift)


class _Sweep(NamedTuple):
    """The tensors of a backward, seen as (outer, channel, inner)."""

    seen: layout.Layout
    dy: Tensor
    x: Tensor
    affine: _Affine
    residual: Tensor | None
    y: Tensor | None
    activation: Activation
    present: Tensor | None
    room: Room

    @staticmethod
    def of(
        dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, y: Tensor | None, activation: Activation, mask: Tensor | None,
    ) -> _Sweep:  # fmt: skip
        seen = layout.of(x)
        affine = _Affine.of(x, mean, var, eps, weight, bias)
        return _Sweep(
            seen, seen.view(dy), seen.view(x), affine,
            _view(seen, residual), _view(seen, y), activation, _view(seen, mask),
            Room(x.device, affine.a.dtype),
        )  # fmt: skip

    def gradient(self, part: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor]:
        """dz = dy·activation'(z), 0 where absent, and x − hi in memory that the caller may overwrite."""
        x, dtype = self.x[part], self.affine.a.dtype
        dz = self.dy[part].to(dtype)
        if self.y is not None:
            dz = self.activation.backward(dz, self.y[part])
        elif self.activation.name != "identity":
            z = self.affine.scaled(x, self.room.like(x))
            dz = self.activation.backward(dz, z if self.residual is None else z.add_(self.residual[part]))
        if self.present is not None:
            dz = dz.masked_fill(~self.present[part], 0)
        return dz, self.affine.centred(x, self.room.like(x))


def _is_large(mean: Tensor, var: Tensor) -> bool:
    """Whether x − mean or sums of it may overflow float32, or 1/std be subnormal there."""
    return bool(((mean.abs() > LARGE) | (var > LARGE * LARGE)).any())


def _per_channel(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).view(1, -1, 1)


def _view(seen: layout.Layout, t: Tensor | None) -> Tensor | None:
    return None if t is None else seen.view(t)


def _parts(view: Tensor) -> list[tuple[slice, slice, slice]]:
    if view.device.type != "cpu":
        return [(slice(None), slice(None), slice(None))]
    return list(cut(view.shape))
