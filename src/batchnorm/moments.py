"""``Moments``: count, mean and sum of squared deviations of each channel.

It is the only statistic of the project: kernels return it, ranks exchange it, masks and weights change it, and
recalibration sums it up. Chan's formula merges two of them, so the parts of a batch, cut in any way and merged in any
order, give the moments of the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, DtypeError, expected

# Values processed at once on the CPU: two float32 copies of them fit in a second-level cache of 1 MiB.
PART = 1 << 17
# torch gives a sum of fewer values to one thread (at::internal::GRAIN_SIZE is 2¹⁵).
UNSPLIT = (1 << 15) - 1


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it: a mean of 1e6 in float32 is only known to 0.03."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Count, mean and centred sum of squares of each channel.

    .. math:: n = \sum_i w_i, \quad \mu = \frac1n \sum_i w_i x_i, \quad M_2 = \sum_i w_i (x_i - \mu)^2

    with :math:`w_i = 1` unless weights are given. The biased variance (the paper's, Algorithm 1) is
    :math:`M_2 / n`, the unbiased one :math:`M_2 / (n - 1)`.

    Arguments:
        count: how many values each channel has, shape (channels,)
        mean: their mean, shape (channels,), in the unit of the values; 0 where the count is 0
        m2: sum of squared deviations from the mean, shape (channels,), in the square of that unit

    Kernels that work in groups (virtual batches) give the moments of each group, shape (groups, channels);
    ``pooled`` merges them. The tensors are float64 where the device has it, and carry gradients where the values did.

    >>> import torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 10.0]])
    >>> whole = Moments.from_tensor(x)
    >>> whole.mean, whole.variance()
    (tensor([ 3., 10.], dtype=torch.float64), tensor([2.6667, 0.0000], dtype=torch.float64))
    >>> parts = Moments.from_tensor(x[:1]).merge(Moments.from_tensor(x[1:]))
    >>> torch.equal(parts.m2, whole.m2)
    True
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        first = self.count.shape
        if any(isinstance(n, Tensor) for n in first):
            return  # under torch.jit.trace, which records comparisons of sizes
        if not (len(first) in (1, 2) and self.mean.shape == first and self.m2.shape == first):
            got = [tuple(t.shape) for t in (self.count, self.mean, self.m2)]
            todo = "Give one value a channel in each."
            raise ArgumentError(expected("Moments", "three tensors of one shape (channels,)", got, todo))

    @property
    def channels(self) -> int:
        return self.count.shape[-1]

    def pooled(self) -> Moments:
        """The moments of all groups together, (channels,), from those of each group, (groups, channels)."""
        return self if self.count.dim() == 1 else merge_stacked(self.count, self.mean, self.m2)

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """The moments of no values: merging them changes nothing."""
        device = torch.get_default_device() if device is None else torch.device(device)
        zero = torch.zeros(channels, dtype=statistics_dtype(device), device=device)
        return cls(zero, zero.clone(), zero.clone())

    @classmethod
    def from_tensor(
        cls,
        x: Tensor,
        channel_dim: int = 1,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Moments:
        """The moments of ``x`` over every dimension but ``channel_dim``.

        Arguments:
            x: real floating-point tensor of any rank from 1 up, in any memory layout
            channel_dim: the dimension that is kept
            mask: bool, True where a value is present; shape (N,), (N, *spatial) with N the first
                dimension that is not the channel's, or x's rank and broadcastable to x
            sample_weight: non-negative frequency weights, in one of the same shapes. A weight of 2 is
                the sample counted twice, so ``count`` is the sum of the weights and the unbiased
                variance divides by that sum less one: it is the variance of the data with each sample
                repeated. (For weights that are precisions, not counts, use the biased one.)

        Absent values are left out whatever they hold, NaN included.

        Raises:
            DtypeError: x is not real floating point, or the mask is not bool
            ArgumentError: a mask or weight whose shape fits x in none of the ways above
        """
        if not x.is_floating_point():
            todo = "Convert it first, e.g. x.float()."
            raise DtypeError(expected("Moments.from_tensor", "a real floating-point tensor", x.dtype, todo))
        if not -x.dim() <= channel_dim < x.dim():
            todo = "Name the dimension that holds the channels."
            invariant = f"channel_dim within the {x.dim()} dimensions of x"
            raise ArgumentError(expected("Moments.from_tensor", invariant, channel_dim, todo))
        x = x.unsqueeze(0) if x.dim() == 1 else x.movedim(channel_dim, 1)
        weight = combine_weights("Moments.from_tensor", x, mask, sample_weight)
        if mask is not None:
            present = broadcast_weights("Moments.from_tensor", "mask", x, mask)
            x = torch.where(present, x, torch.zeros((), dtype=x.dtype, device=x.device))
        return moments_of_view(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), _flat(weight, x))

    def merge(self, *others: Moments) -> Moments:
        r"""The moments of all the values together, by Chan's formula

        .. math:: n = \sum_k n_k, \quad \mu = \frac1n \sum_k n_k \mu_k, \quad
                  M_2 = \sum_k M_{2,k} + \sum_k n_k (\mu_k - \mu)^2

        (Chan, Golub and LeVeque 1979). Empty parts change nothing. Computed in float64 where the
        device has it.
        """
        parts = (self, *others)
        if len({part.channels for part in parts}) > 1:
            got = [part.channels for part in parts]
            todo = "Merge moments of the same layer only."
            raise ArgumentError(expected("Moments.merge", "one number of channels", got, todo))
        if not others:
            return self
        wide = statistics_dtype(self.count.device)
        stacked = (torch.stack([getattr(p, name).to(wide) for p in parts]) for name in ("count", "mean", "m2"))
        return merge_stacked(*stacked)

    def variance(self, biased: bool = True) -> Tensor:
        """M2/n (biased, what normalization uses) or M2/(n−1) (what running statistics take).

        Shape (channels,), in the square of the values' unit; NaN where there are too few values.
        """
        return self.m2 / (self.count if biased else self.count - 1)

    def std(self, biased: bool = True) -> Tensor:
        """The square root of ``variance``, in the values' unit."""
        return self.variance(biased).sqrt()

    def detach(self) -> Moments:
        """The same numbers without their autograd graph."""
        return Moments(self.count.detach(), self.mean.detach(), self.m2.detach())

    def to(self, *args: object, **kwargs: object) -> Moments:
        """``torch.Tensor.to`` on each of the three tensors."""
        count, mean, m2 = (t.to(*args, **kwargs) for t in (self.count, self.mean, self.m2))  # type: ignore[call-overload]
        return Moments(count, mean, m2)


def merge_stacked(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Chan's formula over the first dimension of three tensors of shape (parts, ..., channels)."""
    total = count.sum(0)
    mean = torch.where(count > 0, mean, torch.zeros_like(mean))
    # About the first part's mean, not about zero: parts with equal means then merge to exactly that mean.
    origin = mean.gather(0, count.argmax(0, keepdim=True))[0]
    safe = torch.where(total > 0, total, torch.ones_like(total))
    whole = origin + (count * (mean - origin)).sum(0) / safe
    m2 = m2.sum(0) + (count * (mean - whole).square()).sum(0)
    return Moments(total, whole, m2)


def moments_of_view(x: Tensor, weight: Tensor | None = None) -> Moments:
    """Moments of a tensor seen as (outer, channel, inner), weights broadcastable to it.

    A tensor (groups, outer, channel, inner) gives the moments of each group. The mean is computed first, then the
    squares about it, so nothing cancels. Values of 32 bits or fewer are summed in float32 over short runs, about a
    shift near the mean, so that x − shift is exact. Everything else is summed in float64.
    """
    graph = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if weight is None and not graph and x.dtype != torch.float64 and x.numel():
        found = _narrow_moments(x)
        # Squares and sums of values near the largest float32 overflow; float64 then separates them from a real Inf.
        if x.device.type != "cpu" or bool(torch.isfinite(found.m2).all()):
            return found
    parts = [(slice(None),) * x.dim()] if graph or x.device.type != "cpu" else list(cut(x.shape))
    weight = None if weight is None else weight.expand_as(x)
    of_groups: dict[Hashable, list[Moments]] = {}
    for part in parts:
        found = _wide_moments(x[part], None if weight is None else weight[part])
        of_groups.setdefault(tuple((s.start, s.stop) for s in part[:-3]), []).append(found)
    wide = [first.merge(*others) for first, *others in of_groups.values()]
    if len(wide) == 1:
        return wide[0]
    return Moments(*(torch.cat([getattr(m, name) for m in wide]) for name in ("count", "mean", "m2")))


def _narrow_moments(x: Tensor) -> Moments:
    """Two sweeps, on the CPU part by part so that intermediate results stay in cache.

    With s near the mean and d = x − s: mean = s + Σd/n and M2 = Σd² − (Σd)²/n, whose second term only corrects
    the rounding of s.
    """
    wide = statistics_dtype(x.device)
    on_cpu = x.device.type == "cpu"
    parts = list(cut(x.shape)) if on_cpu else [(slice(None),) * x.dim()]
    # The CPU sums float32 pairwise, in one pass; elsewhere float64 accumulators cost nothing.
    summed = torch.float32 if on_cpu else wide
    count = float(x.shape[-3] * x.shape[-1])
    total = torch.zeros((*x.shape[:-3], x.shape[-2]), dtype=wide, device=x.device)
    for part in parts:
        total[part[:-3]].add_(x[part].sum((-3, -1), dtype=summed))
    shift = (total / count).to(torch.float32)
    shift_view = over_channels(shift)
    sum_d, sum_dd = torch.zeros_like(total), torch.zeros_like(total)
    room = Room(x.device)
    for part in parts:
        groups = part[:-3]
        d = torch.sub(x[part], shift_view[groups], out=room.like(x[part]))
        sum_d[groups].add_(d.sum((-3, -1), dtype=summed))
        sum_dd[groups].add_(d.mul_(d).sum((-3, -1), dtype=summed))
    mean = shift.to(wide) + sum_d / count
    # Rounding could make the difference negative in a constant channel.
    return Moments(torch.full_like(total, count), mean, (sum_dd - sum_d.square() / count).clamp_(min=0))


class Room:
    """Working memory of one sweep, reused from part to part: fresh pages cost more than the sums."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def like(self, part: Tensor) -> Tensor:
        """Memory of the shape of ``part``. It overwrites what the last call returned."""
        if self._flat.numel() < part.numel():
            self._flat = torch.empty(part.numel(), dtype=self._flat.dtype, device=self._flat.device)
        strides = [0] * part.dim()
        step = 1
        for d in sorted(range(part.dim()), key=part.stride):
            strides[d] = step
            step *= part.shape[d]
        return self._flat.as_strided(part.shape, strides)


def _wide_moments(x: Tensor, weight: Tensor | None) -> Moments:
    x = x.to(statistics_dtype(x.device))
    inside = (-3, -1)
    if weight is None:
        shape = (*x.shape[:-3], x.shape[-2])
        count = torch.full(shape, float(x.shape[-3] * x.shape[-1]), dtype=x.dtype, device=x.device)
    else:
        weight = weight.to(x.dtype)
        count = weight.sum(inside)
    safe = torch.where(count > 0, count, torch.ones_like(count))
    mean = _weighted(x, weight).sum(inside) / safe
    # A second pass about the mean removes the rounding of the sum; a constant channel gets exactly its value.
    rest = _weighted(x - over_channels(mean), weight).sum(inside) / safe
    mean = mean + torch.where(torch.isfinite(rest), rest, torch.zeros_like(rest))
    m2 = _weighted((x - over_channels(mean)).square(), weight).sum(inside)
    return Moments(count, mean, m2)


def over_channels(t: Tensor) -> Tensor:
    """(channels,) or (groups, channels) so that it broadcasts to a view (outer, channel, inner) or (groups, ...)."""
    return t.unsqueeze(-1).unsqueeze(-3)


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def cut(shape: torch.Size, values: int = PART) -> Iterator[tuple[slice, ...]]:
    """Slices that cut an (outer, channel, inner) tensor into parts of about ``values`` elements, all channels each.

    A tensor (groups, outer, channel, inner) is cut between its groups, and within them where they are larger.
    """
    *groups, outer, channels, inner = shape
    if channels == 1:
        # torch splits a sum to a single number among threads, and its bits would depend on how many there are.
        values = min(values, UNSPLIT)
    if groups:
        together = values // max(1, outer * channels * inner)
        if together > 1:
            for first in range(0, groups[0], together):
                yield slice(first, min(first + together, groups[0])), slice(None), slice(None), slice(None)
            return
    rows = max(1, values // max(1, channels * inner))
    width = inner if rows > 1 else max(1, values // max(1, channels))
    for group in [(slice(g, g + 1),) for g in range(groups[0])] if groups else [()]:
        for first in range(0, max(outer, 1), rows):
            for start in range(0, max(inner, 1), max(width, 1)):
                yield *group, slice(first, first + rows), slice(None), slice(start, start + width)


def broadcast_weights(function: str, name: str, x: Tensor, weight: Tensor) -> Tensor:
    """A mask or weight of a documented shape, with x's rank, broadcastable to x (channels in dimension 1)."""
    given = tuple(weight.shape)
    if given != tuple(x.shape):
        if given == (x.shape[0],):
            weight = weight.view(-1, *(1,) * (x.dim() - 1))
        elif given == (x.shape[0], *x.shape[2:]):
            weight = weight.unsqueeze(1)
    fits = weight.dim() == x.dim() and all(w in (1, s) for w, s in zip(weight.shape, x.shape, strict=True))
    if not fits:
        n, spatial = x.shape[0], tuple(x.shape[2:])
        invariant = f"{name} of shape {(n,)}, {(n, *spatial)} or broadcastable to {tuple(x.shape)}"
        raise ArgumentError(expected(function, invariant, given, f"Reshape the {name}."))
    return weight


def combine_weights(function: str, x: Tensor, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor | None:
    """Mask and weights as one tensor with x's rank: 0 where absent, else the weight (1 without weights)."""
    if mask is not None and mask.dtype != torch.bool:
        todo = "Compare it first, e.g. mask != 0; weights go to sample_weight."
        raise DtypeError(expected(function, "a mask of dtype torch.bool", mask.dtype, todo))
    present = None if mask is None else broadcast_weights(function, "mask", x, mask)
    if sample_weight is None:
        return present
    return counted(present, broadcast_weights(function, "sample_weight", x, sample_weight))


def counted(mask: Tensor | None, sample_weight: Tensor | None) -> Tensor | None:
    """How often each value counts: its weight, 0 if masked out; None if all count once."""
    if mask is None or sample_weight is None:
        return mask if sample_weight is None else sample_weight
    return torch.where(mask, sample_weight, torch.zeros_like(sample_weight))


def _flat(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight that broadcasts to x.flatten(2), where all positions are in the last dimension."""
    if weight is None:
        return None
    if x.dim() == 2:
        return weight.unsqueeze(2)
    return weight.expand(*weight.shape[:2], *x.shape[2:]).flatten(2)
