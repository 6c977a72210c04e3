"""Virtual (ghost) batches through the layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm.errors import ArgumentError
from batchnorm.kernels.contract import Groups
from batchnorm.nn.counting import groups_of
from conformance import ON_THE_CPU
from tolerances import assert_close, to_float64

WAYS = [*ON_THE_CPU, "composite", "torch.compile"]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(size: int | None, **options: Any) -> bn.BatchNorm1d:
    layer = bn.BatchNorm1d(3, virtual_batch_size=size, dtype=torch.float64, **options)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if t is not None:
                t.copy_(torch.rand(3, generator=draw) + 0.5)
    return layer


def data(samples: int, *inner: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(samples, 3, *inner, generator=draw, dtype=torch.float64) for _ in range(2))
    return x * 2 + 1, dy


def run(way: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    if way == "cpu" and getattr(layer, "activation", None) == "gelu":
        pytest.skip("the compiled kernels do not fuse gelu")
    if way == "torch.compile":
        y: Tensor = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args, **kwargs)
        return y
    with bn.use_backend(way):
        y = layer(*args, **kwargs)
        return y


def chunks(samples: int, sizes: list[int]) -> list[slice]:
    assert sum(sizes) == samples
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize(
    ("samples", "inner", "size", "sizes"),
    [
        (12, (), 4, [4, 4, 4]),
        (12, (), 5, [5, 5, 2]),  # a remainder of two values
        (11, (), 5, [5, 6]),  # one value joins the last
        (11, (4,), 5, [5, 5, 1]),  # a sample of four values is a group of its own
        (4, (6,), 1, [1, 1, 1, 1]),
        (7, (), 4, [4, 3]),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("way", WAYS)
def test_each_virtual_batch_is_a_batch_of_its_own(
    way: str, activation: str | None, samples: int, inner: tuple[int, ...], size: int, sizes: list[int]
) -> None:
    if way == "torch.compile" and (activation == "gelu" or samples == 7):
        pytest.skip("the graph is that of composite, which is tried with it")
    x, dy = data(samples, *inner)
    layer = layer_of(size, activation=activation)
    leaf = x.clone().requires_grad_()
    y = run(way, layer, leaf)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)

    plain = layer_of(None, activation=activation)
    other = x.clone().requires_grad_()
    expected = torch.cat([plain(other[rows]) for rows in chunks(samples, sizes)])
    right = torch.autograd.grad(expected, [other, *plain.parameters()], dy)
    for quantity, a, b in zip(("y", "dx", "dweight", "dbias"), (y, *grads), (expected, *right), strict=True):
        scale = float(dy.abs().sum()) if quantity in ("dweight", "dbias") else None
        assert_close(a, to_float64(b), dtype="float64", quantity=quantity, scale=scale)


@pytest.mark.parametrize("way", WAYS)
def test_the_running_statistics_move_once_by_those_of_the_whole_batch(way: str) -> None:
    x, _ = data(11, 2)
    layer, plain = layer_of(4), layer_of(None)
    run(way, layer, x)
    plain(x)
    for name, t in plain.state_dict().items():
        assert_close(layer.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("size", [8, 9, 100])
def test_virtual_batches_of_the_whole_size_are_none(size: int) -> None:
    x, dy = data(8, 5)
    layer, plain = layer_of(size), layer_of(None)
    results = []
    for each in (layer, plain):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *each.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for name, t in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], t), name


def test_in_eval_mode_they_do_nothing() -> None:
    x, _ = data(8)
    assert torch.equal(layer_of(2).eval()(x), layer_of(None).eval()(x))
    # Without running statistics eval mode normalizes by the batch: the whole one.
    for options in ({"track_running_stats": False}, {"track_running_stats": False, "affine": False}):
        assert torch.equal(layer_of(2, **options).eval()(x), layer_of(None, **options).eval()(x))


@pytest.mark.parametrize("way", WAYS)
def test_with_residual_mask_and_weights(way: str) -> None:
    x, dy = data(10, 6)
    draw = torch.Generator().manual_seed(8)
    mask = torch.rand(10, 6, generator=draw) > 0.4
    mask[:, 0] = True
    x = x.masked_fill(~mask[:, None], torch.nan)
    weights = torch.rand(10, generator=draw, dtype=torch.float64) + 0.5
    residual = data(10, 6, seed=3)[0]
    layer, plain = layer_of(4, activation="relu"), layer_of(None, activation="relu")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = run(way, layer, leaf, residual, mask, weights)
    rows = chunks(10, [4, 4, 2])
    expected = torch.cat([plain(other[r], residual[r], mask[r], weights[r]) for r in rows])
    assert_close(y, to_float64(expected), dtype="float64", quantity="y")
    (dx,), (right,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(expected, other, dy)
    assert_close(dx, to_float64(right), dtype="float64", quantity="dx")
    absent = ~mask[:, None].expand(x.shape)
    assert (y[absent] == 0).all()
    assert (dx[absent] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_with_renormalization_each_has_an_r_and_d_of_its_own(way: str) -> None:
    x, dy = data(10, 2)
    renorm = bn.Renorm(1.3, 0.2, (0, 0, 0))
    layer, plain = layer_of(4, renorm=renorm), layer_of(None, renorm=renorm)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = run(way, layer, leaf)
    plain.momentum = 0.0  # every virtual batch sees the statistics before the forward
    expected = torch.cat([plain(other[r]) for r in chunks(10, [4, 4, 2])])
    assert_close(y, to_float64(expected), dtype="float64", quantity="y")
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    right = torch.autograd.grad(expected, [other, *plain.parameters()], dy)
    for quantity, a, b in zip(("dx", "dweight", "dbias"), grads, right, strict=True):
        assert_close(a, to_float64(b), dtype="float64", quantity=quantity, scale=None if quantity == "dx" else 100.0)


@pytest.mark.parametrize("way", [*ON_THE_CPU, "composite"])
@pytest.mark.parametrize("size", [2, 3])
def test_derivatives_of_first_and_second_order(way: str, size: int) -> None:
    layer = layer_of(size, momentum=0.0)
    x, _ = data(5, 2)
    leaves = (x.requires_grad_(), layer.weight, layer.bias)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    with bn.use_backend(way):
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(512, 130)
    layer = bn.BatchNorm1d(130, virtual_batch_size=50)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            twin = copy.deepcopy(layer)
            leaf = x.clone().requires_grad_()
            y = twin(leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, *twin.parameters()], x), twin.running_var])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# What is refused


def test_a_virtual_batch_of_one_value_is_an_error_that_changes_nothing() -> None:
    layer = layer_of(1)
    with pytest.raises(ArgumentError) as caught:
        layer(data(4)[0])
    assert str(caught.value) == (
        "BatchNorm1d: expected more than 1 value per channel in each virtual batch, got virtual_batch_size=1 for input "
        "size (4, 3). Take a larger virtual_batch_size."
    )
    assert int(layer.num_batches_tracked) == 0


def test_a_mask_that_empties_a_virtual_batch() -> None:
    x, _ = data(6, 2)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[3:6] = False
    layer = layer_of(3)
    with pytest.raises(ArgumentError) as caught:
        layer(x, mask=mask)
    assert str(caught.value) == (
        "BatchNorm1d, in each virtual batch: expected more than 1 present value per channel when training (the sum of "
        "the weights), got 0. Leave such a batch out, or give it more present values."
    )
    assert int(layer.num_batches_tracked) == 0
    patient = layer_of(3, too_few="running")
    assert torch.equal(patient(x, mask=mask), copy.deepcopy(patient).eval()(x, mask=mask))
    assert int(patient.num_batches_tracked) == 0


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        bn.BatchNorm1d(3, virtual_batch_size=size)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"BatchNorm1d: expected a virtual_batch_size of 1 sample or more, got {size!r}. None is the whole batch."
    )


def test_groups() -> None:
    assert groups_of("test", torch.zeros(12, 3), 5) == Groups(5, 3)
    assert groups_of("test", torch.zeros(11, 3), 5) == Groups(5, 2)
    assert groups_of("test", torch.zeros(9, 3), 5) == Groups(5, 2)
    assert groups_of("test", torch.zeros(6, 3), 5) is None
    assert groups_of("test", torch.zeros(0, 3), 5) is None
    assert Groups(5, 2).sizes(11) == [5, 6]
    assert Groups(5, 3).pieces(12) == [(slice(0, 10), Groups(5, 2)), (slice(10, 12), Groups(2, 1))]
    assert Groups(5, 2).pieces(10) == [(slice(0, 10), Groups(5, 2))]


def test_the_option_is_shown_and_not_lost() -> None:
    layer = bn.BatchNorm2d(3, virtual_batch_size=4)
    assert repr(layer).endswith(", virtual_batch_size=4)")
    reports: list[Any] = []
    model = bn.revert(nn.Sequential(layer), report=reports.append)
    assert model[0] is layer
    assert "has nothing for virtual_batch_size=4" in str(reports[0])
    with pytest.raises(ArgumentError, match="virtual_batch_size=4"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
