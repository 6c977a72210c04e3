"""Plain PyTorch, for every device and dtype.

The functions of a kernel (``contract.Kernel``) over a tensor of any rank with channels in dimension 1, seen as
(outer, channel, inner), or with groups as (groups, outer, channel, inner). On the CPU each sweep goes part by part, so
that everything it needs besides its result stays in cache. Three rules preserve the digits:

- mean and variance are float64: first the mean, then the squares about it (``moments.py``);
- x − mean takes the mean as a float32 high part and a remainder. Near the mean x − hi is exact, so a mean of
  1e6 costs nothing;
- the result is (x − hi)·a + (bias − lo·a), never x·a + (bias − mean·a): a constant channel, whose mean is
  itself a float32, gives its bias exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import layout
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.contract import INPUT_ONLY, Groups, Needs, Running, count_of
from batchnorm.moments import Moments, Room, counted, cut, moments_of_view, over_channels, statistics_dtype

NAME = "eager"

LARGE = 1e18
"""Of float32 arithmetic: mean and standard deviation below it, x − mean and sums of dz·(x − mean) stay finite."""


def supports(
    x: Tensor,
    *,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Groups | None = None,
) -> str | None:
    """Serves everything."""
    return None


def moments(
    x: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None, groups: Groups | None = None
) -> Moments:
    """Count, mean and M2 of each channel. ``mask`` and ``sample_weight`` have x's rank and broadcast to it."""
    grid = _Grid.of(x, groups)
    views, present = grid.views(x), grid.any_views(mask)
    weights = grid.any_views(counted(mask, sample_weight))
    found = []
    for i, view in enumerate(views):
        if present is not None:
            view = torch.where(present[i], view, torch.zeros((), dtype=x.dtype, device=x.device))
        found.append(moments_of_view(view, None if weights is None else weights[i]))
    if len(found) == 1:
        return found[0]
    return Moments(*(torch.cat([getattr(m, name) for m in found]) for name in ("count", "mean", "m2")))


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
    groups: Groups | None = None,
) -> Tensor:
    """activation((x − mean)/√(var + eps)·weight + bias + residual), 0 where the mask is False.

    ``out`` may be ``x`` itself.
    """
    grid = _Grid.of(x, groups)
    seen = grid.seen
    y = seen.empty(x) if out is None else out
    flat = seen.view(y)
    views, results = grid.views(x), grid.split(flat)
    more, present = grid.any_views(residual), grid.any_views(mask)
    affine = _Affine.of(x, mean, var, eps, weight, bias)
    room = Room(x.device, affine.a.dtype)
    for part in grid.parts():
        into = part.of(results)
        here = affine.of_groups(part.groups)
        z = here.scaled(part.of(views), into if into.dtype == here.a.dtype else room.like(into))
        if more is not None:
            z.add_(part.of(more))
        if activation.name == "relu":
            z.relu_()
        elif activation.name != "identity":
            z = activation(z)
        if present is not None:
            z = z.masked_fill_(~part.of(present), 0)
        if z is not into:
            into.copy_(z)
    if flat.data_ptr() != y.data_ptr():
        # out's strides allow no such view, and a copy was filled.
        y.copy_(seen.unview(flat))
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
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """Σdz and Σdz·x̂ of each channel, float64 (channels,).

    dz = dy·activation'(z), x̂ = (x − mean)/√(var + eps).
    """
    sweep = _Sweep.of(dy, x, mean, var, eps, weight, bias, residual, y, activation, mask, groups)
    wide = mean.dtype
    sum_dz = torch.zeros(mean.shape, dtype=wide, device=x.device)
    sum_dz_centred = torch.zeros_like(sum_dz)
    for part in sweep.grid.parts():
        dz, centred = sweep.gradient(part)
        sum_dz[part.groups].add_(dz.sum((-3, -1)))
        centred.mul_(dz)
        if sweep.present is not None:
            centred.masked_fill_(~part.of(sweep.present), 0)
        sum_dz_centred[part.groups].add_(centred.sum((-3, -1)))
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
    groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = weight/√(var + eps)·(dz − w·(Σdz + x̂·Σdz·x̂)/count), and dz as the residual's gradient.

    With ``sums`` None the statistics are constants (inference): dx = weight/√(var + eps)·dz.
    """
    sweep = _Sweep.of(dy, x, mean, var, eps, weight, bias, residual, y, activation, mask, groups)
    grid = sweep.grid
    dx = grid.seen.empty(x) if needs.x else None
    dresidual = grid.seen.empty(x) if needs.residual else None
    dx_views, dresidual_views = grid.any_views(dx), grid.any_views(dresidual)
    weights = grid.any_views(sample_weight)
    if sums is not None:
        wide = mean.dtype
        invstd = torch.rsqrt(var.to(wide) + eps)
        per_unit = sums[1] * invstd / count
        slope = over_channels(per_unit.to(sweep.affine.a.dtype))
        constant = over_channels((sums[0] / count - sweep.affine.lo * per_unit).to(sweep.affine.a.dtype))
    for part in grid.parts():
        dz, centred = sweep.gradient(part)
        if dresidual_views is not None:
            part.of(dresidual_views).copy_(dz)
        if dx_views is None:
            continue
        if sums is not None:
            through_statistics = centred.mul_(slope[part.groups]).add_(constant[part.groups])
            if weights is not None:
                through_statistics.mul_(part.of(weights))
            if sweep.present is not None:
                through_statistics.masked_fill_(~part.of(sweep.present), 0)
            dz = torch.sub(dz, through_statistics, out=centred)
        a, into = sweep.affine.of_groups(part.groups).a, part.of(dx_views)
        torch.mul(dz, a, out=into) if into.dtype == a.dtype else into.copy_(dz * a)
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
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """Training: y, and the batch's mean and biased variance as a tensor of shape (2, channels)."""
    found = moments(x, mask=mask, sample_weight=sample_weight, groups=groups)
    stats = torch.stack((found.mean, found.variance()))
    y = normalize(
        x, stats[0], stats[1], eps, weight, bias, residual=residual, activation=activation, mask=mask, groups=groups
    )  # fmt: skip
    if running is not None:
        running.update(found.pooled())
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
    groups: Groups | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and the residual's gradient, None for each that is not needed.

    ``stats`` holds mean and biased variance, (2, channels): those of the batch in training, else constants.
    """
    mean, var = stats[0], stats[1]
    same = {"residual": residual, "y": y, "activation": activation, "mask": mask, "groups": groups}
    sums = None
    if training or needs.weight or needs.bias:
        sums = backward_sums(dy, x, mean, var, eps, weight, bias, **same)  # type: ignore[arg-type]
    dx = dresidual = None
    if needs.x or needs.residual:
        count = count_of(x, mask, sample_weight, groups)
        dx, dresidual = backward_input(
            dy, x, mean, var, eps, weight, bias, sums if training else None, count,
            sample_weight=sample_weight, needs=needs, **same,  # type: ignore[arg-type]
        )  # fmt: skip
    if sums is not None and groups is not None:
        sums = (sums[0].sum(0), sums[1].sum(0))
    dweight = sums[1].to(weight.dtype) if needs.weight and sums is not None and weight is not None else None
    dbias = sums[0].to(bias.dtype) if needs.bias and sums is not None and bias is not None else None
    return dx, dweight, dbias, dresidual


class _Part(NamedTuple):
    """A piece of a sweep: where it lies in the views, and whose statistics it uses."""

    view: int
    where: tuple[slice, ...]
    groups: tuple[slice, ...]  # an index into tensors of the shape of the statistics; () where there are no groups

    def of(self, views: tuple[Tensor, ...]) -> Tensor:
        return views[self.view][self.where]


class _Grid(NamedTuple):
    """How x is seen: as one view (outer, channel, inner), or as one or two views (groups, outer, channel, inner).

    Two where the last group has a size of its own.
    """

    seen: layout.Layout
    runs: tuple[tuple[slice, Groups], ...]  # runs of samples with groups of one size; none where there are no groups
    device: torch.device

    @staticmethod
    def of(x: Tensor, groups: Groups | None) -> _Grid:
        runs = () if groups is None else tuple(groups.pieces(x.shape[0]))
        return _Grid(layout.of(x), runs, x.device)

    def views(self, t: Tensor) -> tuple[Tensor, ...]:
        """``t``, which broadcasts to x, as the views."""
        return self.split(self.seen.view(t))

    def any_views(self, t: Tensor | None) -> tuple[Tensor, ...] | None:
        """``views``; None where ``t`` is absent."""
        return None if t is None else self.views(t)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The views of a tensor that is seen as (outer, channel, inner) already."""
        if not self.runs:
            return (flat,)
        rows = flat.shape[0] // self.seen.shape[0]  # of a sample
        return tuple(
            flat[run.start * rows : run.stop * rows].unflatten(0, (groups.number, -1)) for run, groups in self.runs
        )

    def parts(self) -> list[_Part]:
        """The pieces in which a sweep goes: on the CPU such that they stay in cache, elsewhere whole views."""
        shape, first, parts = self.seen.shape, 0, []
        outer, channels, inner = (self._size(dims) for dims in (self.seen.outer, (1,), self.seen.inner))
        if not self.runs:
            whole = torch.Size((outer, channels, inner))
            return [_Part(0, where, ()) for where in self._cut(whole)]
        for i, (_, groups) in enumerate(self.runs):
            for where in self._cut(torch.Size((groups.number, groups.size * (outer // shape[0]), channels, inner))):
                own = where[0]
                start, stop = (0, groups.number) if own.start is None else (own.start, own.stop)
                parts.append(_Part(i, where, (slice(first + start, first + stop),)))
            first += groups.number
        return parts

    def _cut(self, shape: torch.Size) -> list[tuple[slice, ...]]:
        return list(cut(shape)) if self.device.type == "cpu" else [(slice(None),) * len(shape)]

    def _size(self, dims: tuple[int, ...]) -> int:
        size = 1
        for d in dims:
            size *= self.seen.shape[d]
        return size


class _Affine(NamedTuple):
    """Scale and shift of each channel: y = (x − hi)·a + shift, in the precision the values are computed in.

    The part of the mean that float32 cannot hold, lo = mean − hi, is the same for all values of a channel. So it is
    part of the shift (bias − lo·a) and costs no pass over the values.
    """

    hi: Tensor  # (1, channels, 1) or (groups, 1, channels, 1), as a and shift
    a: Tensor
    shift: Tensor
    lo: Tensor  # (channels,) or (groups, channels), float64 where the device has it

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
        # An infinite mean has no remainder: inf − inf would turn the infinity of y into NaN.
        shift = -torch.where(torch.isfinite(lo), lo * a, torch.zeros_like(lo))
        if bias is not None:
            shift = shift + bias.to(wide)
        hi, a, shift = (over_channels(t.to(dtype)) for t in (hi, a, shift))
        return _Affine(hi, a, shift, lo)

    def of_groups(self, groups: tuple[slice, ...]) -> _Affine:
        """That of some groups; of all channels for the index ()."""
        return self if not groups else _Affine(self.hi[groups], self.a[groups], self.shift[groups], self.lo)

    def centred(self, x: Tensor, out: Tensor) -> Tensor:
        """x − hi."""
        return torch.sub(x, self.hi, out=out)

    def scaled(self, x: Tensor, out: Tensor) -> Tensor:
        # Not one addcmul: with two broadcast factors it takes a slow path. Three passes in cache are faster.
        return torch.sub(x, self.hi, out=out).mul_(self.a).add_(self.shift)


class _Sweep(NamedTuple):
    """The tensors of a backward, as the views of a grid."""

    grid: _Grid
    dy: tuple[Tensor, ...]
    x: tuple[Tensor, ...]
    affine: _Affine
    residual: tuple[Tensor, ...] | None
    y: tuple[Tensor, ...] | None
    activation: Activation
    present: tuple[Tensor, ...] | None
    room: Room

    @staticmethod
    def of(
        dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, y: Tensor | None, activation: Activation, mask: Tensor | None, groups: Groups | None,
    ) -> _Sweep:  # fmt: skip
        grid = _Grid.of(x, groups)
        affine = _Affine.of(x, mean, var, eps, weight, bias)
        dy_views, x_views = grid.views(dy), grid.views(x)
        return _Sweep(
            grid, dy_views, x_views, affine, grid.any_views(residual), grid.any_views(y), activation,
            grid.any_views(mask), Room(x.device, affine.a.dtype),
        )  # fmt: skip

    def gradient(self, part: _Part) -> tuple[Tensor, Tensor]:
        """dz = dy·activation'(z), 0 where absent, and x − hi in memory that the caller may overwrite."""
        x, affine = part.of(self.x), self.affine.of_groups(part.groups)
        dz = part.of(self.dy).to(affine.a.dtype)
        if self.y is not None:
            dz = self.activation.backward(dz, part.of(self.y))
        elif self.activation.name != "identity":
            z = affine.scaled(x, self.room.like(x))
            dz = self.activation.backward(dz, z if self.residual is None else z.add_(part.of(self.residual)))
        if self.present is not None:
            dz = dz.masked_fill(~part.of(self.present), 0)
        return dz, affine.centred(x, self.room.like(x))


def _is_large(mean: Tensor, var: Tensor) -> bool:
    """True if x − mean or sums of it may overflow float32, or 1/std may be subnormal there."""
    return bool(((mean.abs() > LARGE) | (var > LARGE * LARGE)).any())
