"""What every kernel promises, and what is passed to it.

A kernel (a backend) is a module with the functions of ``Kernel`` over a tensor of any rank with channels in
dimension 1. ``forward`` and ``backward`` are the other four fused, for the case in which nothing has to happen between
measuring and using. What holds for all of them:

- mean, variance and sums are float64 of shape (channels,) where the device has it, whatever the input's dtype;
- results have the input's dtype and the memory format of ``layout.format_of``;
- the same input gives the same bits, whatever the number of threads;
- an absent tensor is None. ``mask`` and ``sample_weight`` have the input's rank and broadcast to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.moments import Moments, counted, statistics_dtype


class Groups(NamedTuple):
    """A batch in groups of consecutive samples: group g has samples g·size to (g + 1)·size, the last one up to the end.

    Each group is normalized by its own statistics, whatever the size of the last one. Statistics and sums then have the
    shape (groups, channels), ``stats`` (2, groups, channels), and weight and bias may be (groups, channels) too.
    """

    size: int
    number: int

    def sizes(self, samples: int) -> list[int]:
        """How many samples each group has."""
        return [self.size] * (self.number - 1) + [samples - self.size * (self.number - 1)]

    def pieces(self, samples: int) -> list[tuple[slice, Groups]]:
        """One or two runs of samples with groups of one size, each with its groups."""
        last = samples - self.size * (self.number - 1)
        if self.number == 1 or last == self.size:
            return [(slice(0, samples), Groups(last, self.number))]
        head = samples - last
        return [(slice(0, head), Groups(self.size, self.number - 1)), (slice(head, samples), Groups(last, 1))]


class Running(NamedTuple):
    """Running statistics that a forward updates: r ← r + factor·(batch − r). The counter goes up with them."""

    mean: Tensor  # (channels,), the dtype it is kept in
    var: Tensor  # (channels,), takes the unbiased variance
    factor: float | Tensor  # weight of the new batch
    batches: Tensor | None = None  # (), int64: how many batches they have seen

    def after(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """Mean and variance after the batch, in the batch's precision; nothing is written."""
        factor, found = self.factor, []
        for r, value in ((self.mean, batch.mean), (self.var, batch.variance(biased=False))):
            value = value.detach()
            # Not lerp with factor 1: r + (value − r) would round, and a NaN in r would survive it.
            if isinstance(factor, Tensor) or factor != 1:
                value = r.to(value.dtype) * (1 - factor) + value * factor
            found.append(value)
        return found[0], found[1]

    def update(self, batch: Moments, where: Tensor | None = None) -> None:
        """Follow the batch, in the batch's precision and rounded once; not at all where the bool ``where`` is False."""
        for r, value in zip((self.mean, self.var), self.after(batch), strict=True):
            r.copy_(value if where is None else torch.where(where, value, r))
        if self.batches is not None:
            self.batches.add_(1 if where is None else where.to(self.batches.dtype))


class Needs(NamedTuple):
    """Which gradients a backward is asked for."""

    x: bool
    weight: bool
    bias: bool
    residual: bool


INPUT_ONLY = Needs(True, False, False, False)


class Kept(NamedTuple):
    """Which tensors forward keeps for backward, beside weight, mean and variance."""

    x: bool
    bias: bool
    residual: bool
    y: bool


def kept(activation: Activation, *, training: bool, needs: Needs, residual: bool) -> Kept:
    """What backward has to look at.

    dx and dweight look at x, except that dx of inference is dz times a constant. dz = dy·activation'(z) looks at the
    sign of z (relu, leaky_relu) or at z itself. z is computed again from x, weight, bias and residual, or its sign is
    read off y: where there is a residual (y is kept by the next layer anyway) or where x is not needed otherwise.
    """
    needs_x = training or needs.weight
    if activation.name == "identity":
        return Kept(needs_x, False, False, False)
    by_y = activation.sign_survives and (residual or not needs_x)
    return Kept(needs_x or not by_y, not by_y, residual and not by_y, by_y)


class Kernel(Protocol):
    """The functions of a backend module."""

    NAME: str

    @staticmethod
    def supports(
        x: Tensor,
        *,
        activation: Activation = IDENTITY,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        groups: Groups | None = None,
    ) -> str | None:
        """None where this kernel serves plain tensors (see ``kernels.plain``) like these, else why it does not."""

    @staticmethod
    def moments(
        x: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None, groups: Groups | None = None
    ) -> Moments:
        """Count, mean and M2 of each channel."""

    @staticmethod
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

    @staticmethod
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

        dz = dy·activation'(z), x̂ = (x − mean)/√(var + eps). Where ``y`` is given, its sign stands for that of z.
        """

    @staticmethod
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

    @staticmethod
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
        """Training: y, and the batch's mean and biased variance, (2, channels)."""

    @staticmethod
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

        ``stats`` holds mean and biased variance, (2, channels): those of the batch in training, else constants. The
        values of ``bias`` are read only where ``kept`` says so; otherwise it stands for its dtype.
        """


def count_of(
    x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, groups: Groups | None = None
) -> Tensor | float:
    """Values a channel: a number, or the sum of the weights of each channel, (channels,); in groups see below."""
    if groups is not None:
        return group_counts(x, mask, sample_weight, groups)
    weight = counted(mask, sample_weight)
    if weight is None:
        return x.numel() / max(1, x.shape[1])
    return weight.to(statistics_dtype(x.device)).expand(x.shape).transpose(0, 1).flatten(1).sum(1)


def group_counts(x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, groups: Groups) -> Tensor:
    """Values a channel in each group, or the sum of their weights, (groups, channels)."""
    wide = statistics_dtype(x.device)
    samples, channels, *inner = x.shape
    weight = counted(mask, sample_weight)
    if weight is None:
        found = torch.full((groups.number, channels), groups.size * math.prod(inner), dtype=wide, device=x.device)
        last = samples - groups.size * (groups.number - 1)
        if last != groups.size:
            found[-1] = last * math.prod(inner)
        return found
    repeats = math.prod(n // m for n, m in zip(inner, weight.shape[2:], strict=True))
    per_sample = (weight.to(wide).flatten(2).sum(2) if inner else weight.to(wide)).expand(samples, channels)
    return sums_in_groups(per_sample * repeats, groups)


def group_of_samples(samples: int, groups: Groups, device: torch.device) -> Tensor:
    """Which group each sample belongs to, int64 (samples,)."""
    return (torch.arange(samples, device=device) // groups.size).clamp(max=groups.number - 1)


def sums_in_groups(t: Tensor, groups: Groups) -> Tensor:
    """The sums over the samples of each group, (groups, channels), of a tensor (samples, channels)."""
    index = group_of_samples(t.shape[0], groups, t.device)
    return t.new_zeros((groups.number, t.shape[1])).index_add(0, index, t)


def enough(found: Moments) -> Tensor:
    """() bool: True if every channel has more than one value, so that it has an unbiased variance."""
    return (found.count > 1).all()


def moments_from(stats: Tensor, count: Tensor | float) -> Moments:
    """Moments from the mean and biased variance that ``forward`` gives and the number of values."""
    if not isinstance(count, Tensor):
        count = torch.full_like(stats[0], count)
    return Moments(count, stats[0], stats[1] * count)
