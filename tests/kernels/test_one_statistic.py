"""The same values, cut in any way, have the same moments: by masks, weights, groups and micro-batches, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels.contract import Groups
from batchnorm.moments import Moments
from conformance import ON_THE_CPU, arrange, load
from tolerances import assert_close, to_float64


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """A float32 batch (N, C, L) in some layout, its channels' means up to a thousand standard deviations."""
    samples, channels, inner = draw(st.integers(2, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mean = draw(st.sampled_from([0.0, 1.0, 1000.0]))
    x = torch.randn(samples, channels, inner, 1, generator=generator) + mean
    return arrange(x, draw(st.sampled_from(["contiguous", "channels_last", "sliced"])))


def labels_of(draw: st.DataObject, shape: tuple[int, ...], parts: int) -> Tensor:
    """To which part each place belongs, at random."""
    generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 2**20)))
    return torch.randint(parts, shape, generator=generator)


def agree(found: Moments, x: Tensor) -> None:
    right = reference.mini_batch_statistics(to_float64(x))
    assert torch.equal(found.count, torch.from_numpy(right.m).expand(x.shape[1]).to(torch.float64))
    assert_close(found.mean, right.mean, dtype="float32", quantity="mean", scale=right.var**0.5)
    assert_close(found.variance(), right.var, dtype="float32", quantity="var")


@pytest.mark.parametrize("name", ON_THE_CPU)
@settings(deadline=None, max_examples=40)
@given(x=batches(), data=st.data())
def test_masks_that_share_out_the_values(name: str, x: Tensor, data: st.DataObject) -> None:
    kernel, parts = load(name), data.draw(st.integers(1, 4))
    labels = labels_of(data, (x.shape[0], 1, x.shape[2], 1), parts)
    order = data.draw(st.permutations(range(parts)))
    found = [kernel.moments(x, mask=labels == part) for part in order]
    agree(found[0].merge(*found[1:]), x)


@pytest.mark.parametrize("name", ON_THE_CPU)
@settings(deadline=None, max_examples=40)
@given(x=batches(), data=st.data())
def test_weights_that_add_up_to_one(name: str, x: Tensor, data: st.DataObject) -> None:
    share = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    weight = torch.full((x.shape[0], 1, 1, 1), share)
    kernel = load(name)
    found = [kernel.moments(x, sample_weight=w) for w in (weight, 1 - weight)]
    agree(found[0].merge(found[1]), x)


@pytest.mark.parametrize("name", ON_THE_CPU)
@settings(deadline=None, max_examples=40)
@given(x=batches(), data=st.data())
def test_groups_of_any_size(name: str, x: Tensor, data: st.DataObject) -> None:
    kernel, size = load(name), data.draw(st.integers(1, x.shape[0]))
    number = data.draw(st.integers(1, x.shape[0] // size))
    groups = Groups(size, number)
    if kernel.supports(x, groups=groups) is not None:
        return  # the plain kernel serves such a layout, and is tried with it
    found = kernel.moments(x, groups=groups)
    assert found.count.shape == (number, x.shape[1])
    agree(found.pooled(), x)


@pytest.mark.parametrize("name", ON_THE_CPU)
@settings(deadline=None, max_examples=40)
@given(x=batches(), data=st.data())
def test_micro_batches_in_any_order(name: str, x: Tensor, data: st.DataObject) -> None:
    kernel, samples = load(name), x.shape[0]
    ends = sorted(data.draw(st.sets(st.integers(1, samples - 1), max_size=3)))
    parts = [x[a:b] for a, b in zip([0, *ends], [*ends, samples], strict=True)]
    found = [kernel.moments(part) for part in data.draw(st.permutations(parts))]
    found.append(Moments.empty(x.shape[1]))  # an empty one changes nothing
    agree(found[0].merge(*found[1:]), x)


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_one_group_of_the_whole_size_is_the_batch_to_the_bit(name: str) -> None:
    kernel, x = load(name), torch.randn(64, 33, 5)
    one, whole = kernel.moments(x, groups=Groups(64, 1)), kernel.moments(x)
    for a, b in zip((one.count, one.mean, one.m2), (whole.count, whole.mean, whole.m2), strict=True):
        assert torch.equal(a[0], b)
