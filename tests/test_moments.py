"""Count, mean and sum of squares: the same whatever way the data are cut, wherever their mean is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from batchnorm import Moments, reference
from batchnorm.errors import ArgumentError, DtypeError
from conformance import LAYOUTS, arrange
from tolerances import assert_close, to_float64

often = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def data(n: int, channels: int, seed: int, mean: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of standard deviation 1 about a mean, as they are after rounding to the dtype."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, channels, generator=g, dtype=torch.float64) + mean).to(dtype)


def assert_moments(found: Moments, x: Any, what: str = "", dtype: str = "float32", **places: Any) -> None:
    """As the reference measures them on x, (N, C, ...), whatever the dtype of x was."""
    expected = reference.mini_batch_statistics(to_float64(x), **places)
    assert torch.equal(found.count, torch.from_numpy(expected.m))
    assert_close(found.mean, expected.mean, dtype=dtype, quantity="mean", scale=np.sqrt(expected.var), what=what)
    assert_close(found.variance(), expected.var, dtype=dtype, quantity="var", what=what)
    if (expected.m > 1).all():
        unbiased = reference.unbiased_variance(expected)
        assert_close(found.variance(biased=False), unbiased, dtype=dtype, quantity="var", what=what)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Data, and their samples dealt out in any order to any number of parts of any sizes, empty ones among them."""
    n, channels = draw(st.integers(2, 200)), draw(st.integers(1, 5))
    x = data(n, channels, draw(st.integers(0, 1000)), draw(st.sampled_from([0.0, 1.0, -3e3, 1e4, 1e6])))
    order = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 1000))).permutation(n))
    ends = sorted([0, n, *draw(st.lists(st.integers(0, n), max_size=8))])
    return x, [x[order[a:b]] for a, b in pairwise(ends)]


@often
@given(cuts())
def test_split_in_any_way_gives_the_same_moments(case: tuple[Tensor, list[Tensor]]) -> None:
    x, parts = case
    moments = [Moments.from_tensor(part) for part in parts]
    assert_moments(Moments.from_tensor(x), x, "whole")
    assert_moments(moments[0].merge(*moments[1:]), x, "at once")
    one_by_one = moments[0]
    for other in moments[1:]:
        one_by_one = one_by_one.merge(other)
    assert_moments(one_by_one, x, "one by one")
    while len(moments) > 1:
        moments = [a[0].merge(*a[1:]) for a in (moments[i : i + 2] for i in range(0, len(moments), 2))]
    assert_moments(moments[0], x, "as a tree")


@often
@given(cuts(), st.integers(1, 3))
def test_an_empty_part_changes_nothing(case: tuple[Tensor, list[Tensor]], empties: int) -> None:
    x, _ = case
    whole = Moments.from_tensor(x)
    nothing = [Moments.empty(x.shape[1]), Moments.from_tensor(x[:0]), Moments.from_tensor(x, mask=x[:, 0].isnan())]
    for merged in (whole.merge(*nothing[:empties]), nothing[0].merge(*nothing[1:empties], whole)):
        for name in ("count", "mean", "m2"):
            assert torch.equal(getattr(merged, name), getattr(whole, name))


@often
@given(cuts(), st.integers(0, 1000))
def test_a_weight_is_so_many_repeats(case: tuple[Tensor, list[Tensor]], seed: int) -> None:
    x, _ = case
    repeats = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, len(x)))
    repeats[0] = 2
    repeated = x.repeat_interleave(repeats, 0)
    weighted = Moments.from_tensor(x, sample_weight=repeats.float())
    assert_moments(weighted, repeated)
    assert_moments(weighted, x, sample_weight=to_float64(repeats))


@often
@given(cuts(), st.integers(0, 1000))
def test_a_mask_is_removal(case: tuple[Tensor, list[Tensor]], seed: int) -> None:
    x, _ = case
    mask = torch.from_numpy(np.random.default_rng(seed).random(len(x)) > 0.4)
    mask[0] = True
    holed = torch.where(mask[:, None], x, float("nan"))
    assert_moments(Moments.from_tensor(holed, mask=mask), x[mask])


@pytest.mark.parametrize("mean", [3e3, 1e4, 1e6])
@pytest.mark.parametrize("layout", LAYOUTS[:6])
@pytest.mark.parametrize("shape", [(64, 3, 28, 28), (500, 3, 7), (100_000, 3)], ids=str)
def test_a_far_mean_costs_no_digits_of_the_variance(shape: tuple[int, ...], layout: str, mean: float) -> None:
    x = arrange((torch.randn(shape, dtype=torch.float64) + mean).float(), layout)
    assert_moments(Moments.from_tensor(x), x)


@pytest.mark.parametrize("channel_dim", range(-5, 5))
@pytest.mark.parametrize("places", ["all", "mask", "weights"])
def test_any_dimension_may_hold_the_channels(channel_dim: int, places: str) -> None:
    x = torch.randn(4, 3, 5, 2, 6)
    as_second = x.movedim(channel_dim, 1)
    first, _, *others = as_second.shape
    mask = torch.rand(first, *others) > 0.3 if places == "mask" else None
    weight = torch.randint(1, 4, (first,)).float() if places == "weights" else None
    found = Moments.from_tensor(x, channel_dim, mask=mask, sample_weight=weight)
    assert found.channels == x.shape[channel_dim]
    given = {"mask": mask, "sample_weight": weight}
    assert_moments(found, as_second.contiguous(), **{k: v.numpy() for k, v in given.items() if v is not None})


def test_one_dimension_is_one_value_a_channel() -> None:
    found = Moments.from_tensor(torch.tensor([1.0, 2.0, 3.0]), channel_dim=0)
    assert found.count.tolist() == [1.0, 1.0, 1.0]
    assert found.mean.tolist() == [1.0, 2.0, 3.0]
    assert found.variance().tolist() == [0.0, 0.0, 0.0]
    assert found.variance(biased=False).isnan().all()
    assert found.merge(Moments.from_tensor(torch.tensor([3.0, 2.0, 5.0]), 0)).std(biased=False).tolist() == [
        2.0**0.5,
        0.0,
        2.0**0.5,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_in_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    x = arrange((torch.randn(6, 5, 4, 7, dtype=torch.float64) * 2 + 3).to(dtype), layout)
    found = Moments.from_tensor(x)
    assert {t.dtype for t in (found.count, found.mean, found.m2)} == {torch.float64}
    assert_moments(found, x, dtype=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    "size", [(6,), (6, 4, 7), (6, 1, 1, 1), (6, 1, 4, 7), (1, 5, 1, 1), (6, 5, 4, 7), (1, 1, 4, 1)]
)
def test_masks_and_weights_of_every_documented_shape(size: tuple[int, ...]) -> None:
    x = torch.randn(6, 5, 4, 7)
    mask = torch.rand(size) > 0.2
    mask.view(-1)[0] = True
    if size == (1, 5, 1, 1):
        mask[:] = True
    weight = torch.randint(1, 4, size).float()
    assert_moments(Moments.from_tensor(x, mask=mask), x, mask=mask.numpy())
    assert_moments(Moments.from_tensor(x, sample_weight=weight), x, sample_weight=to_float64(weight))
    both = Moments.from_tensor(x, mask=mask, sample_weight=weight)
    assert_moments(both, x, mask=mask.numpy(), sample_weight=to_float64(weight))


def test_values_near_the_largest_of_the_dtype_do_not_overflow() -> None:
    x = torch.tensor([[3e38], [-3e38], [1e38]])
    assert_moments(Moments.from_tensor(x), x)
    x = torch.tensor([[6e4], [-6e4], [1e4]], dtype=torch.float16)
    assert_moments(Moments.from_tensor(x), x, dtype="float16")


@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_channel(poison: float) -> None:
    x = torch.randn(40, 3)
    x[7, 1] = poison
    found = Moments.from_tensor(x)
    assert not found.mean[1].isfinite()
    assert found.variance()[1].isnan()
    rest = Moments(*(t[[0, 2]] for t in (found.count, found.mean, found.m2)))
    assert_moments(rest, x[:, [0, 2]])
    assert not found.merge(Moments.from_tensor(torch.randn(5, 3))).mean[1].isfinite()


def test_moments_are_differentiable_where_the_values_are() -> None:
    x, w = torch.randn(7, 2, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.5

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        whole = Moments.from_tensor(x, sample_weight=w)
        merged = Moments.from_tensor(x[:3], sample_weight=w[:3]).merge(Moments.from_tensor(x[3:]))
        return (whole.count, whole.mean, whole.variance(), whole.std(biased=False), merged.mean, merged.m2)

    assert gradcheck(both, (x.requires_grad_(), w.requires_grad_()))
    found = Moments.from_tensor(x)
    assert found.mean.requires_grad
    assert found.m2.requires_grad
    assert not found.detach().mean.requires_grad
    assert torch.equal(found.detach().m2, found.m2)


def test_to_converts_each_of_the_three() -> None:
    found = Moments.from_tensor(torch.randn(5, 3)).to(torch.float32)
    assert {t.dtype for t in (found.count, found.mean, found.m2)} == {torch.float32}
    # Merging goes back to float64.
    assert found.merge(found).mean.dtype == torch.float64


def test_they_cannot_be_changed() -> None:
    found = Moments.empty(2)
    with pytest.raises(FrozenInstanceError):
        found.mean = torch.zeros(2)  # type: ignore[misc]
    assert found.variance().isnan().all()
    assert found.channels == 2


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "three shapes": (
        lambda: Moments(torch.zeros(2), torch.zeros(2), torch.zeros(3)),
        ArgumentError,
        "Moments: expected three tensors of one shape (channels,), got [(2,), (2,), (3,)]. "
        "Give one value a channel in each.",
    ),
    "three dimensions": (
        lambda: Moments(*(torch.zeros(1, 2, 1) for _ in range(3))),
        ArgumentError,
        "Moments: expected three tensors of one shape (channels,), got [(1, 2, 1), (1, 2, 1), (1, 2, 1)]. "
        "Give one value a channel in each.",
    ),
    "channels": (
        lambda: Moments.empty(2).merge(Moments.empty(3)),
        ArgumentError,
        "Moments.merge: expected one number of channels, got [2, 3]. Merge moments of the same layer only.",
    ),
    "integers": (
        lambda: Moments.from_tensor(torch.zeros(2, 3, dtype=torch.int64)),
        DtypeError,
        "Moments.from_tensor: expected a real floating-point tensor, got torch.int64. "
        "Convert it first, e.g. x.float().",
    ),
    "complex": (
        lambda: Moments.from_tensor(torch.zeros(2, 3, dtype=torch.complex64)),
        DtypeError,
        "Moments.from_tensor: expected a real floating-point tensor, got torch.complex64. "
        "Convert it first, e.g. x.float().",
    ),
    "channel_dim": (
        lambda: Moments.from_tensor(torch.zeros(2, 3), channel_dim=2),
        ArgumentError,
        "Moments.from_tensor: expected channel_dim within the 2 dimensions of x, got 2. "
        "Name the dimension that holds the channels.",
    ),
    "mask of numbers": (
        lambda: Moments.from_tensor(torch.zeros(2, 3), mask=torch.ones(2)),
        DtypeError,
        "Moments.from_tensor: expected a mask of dtype torch.bool, got torch.float32. "
        "Compare it first, e.g. mask != 0; weights go to sample_weight.",
    ),
    "mask's shape": (
        lambda: Moments.from_tensor(torch.zeros(2, 3, 4), mask=torch.ones(3, dtype=torch.bool)),
        ArgumentError,
        "Moments.from_tensor: expected mask of shape (2,), (2, 4) or broadcastable to (2, 3, 4), got (3,). "
        "Reshape the mask.",
    ),
    "weight's shape": (
        lambda: Moments.from_tensor(torch.zeros(2, 3, 4), sample_weight=torch.ones(2, 3)),
        ArgumentError,
        "Moments.from_tensor: expected sample_weight of shape (2,), (2, 4) or broadcastable to (2, 3, 4), got (2, 3). "
        "Reshape the sample_weight.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_what_to_do(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
