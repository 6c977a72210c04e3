"""Masks and weights through the layers: what is absent does not count, comes out as 0 and gets no gradient."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, AutogradError, DtypeError
from conformance import ON_THE_CPU
from tolerances import assert_close, to_float64

WAYS = [*ON_THE_CPU, "composite", "torch.compile"]
LENGTHS = (7, 2, 5, 1)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(way: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's result, by a backend or as one compiled graph."""
    if way == "cpu" and getattr(layer, "activation", None) == "gelu":
        pytest.skip("the compiled kernels do not fuse gelu")
    if way == "torch.compile":
        compiled: Callable[..., Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
        return compiled(*args, **kwargs)
    with bn.use_backend(way):
        y: Tensor = layer(*args, **kwargs)
        return y


def padded(
    seed: int = 0, more: int = 0, channels: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x with NaN where padded, dy, and the mask of the positions; the same values however much padding there is."""
    draw = torch.Generator().manual_seed(seed)
    size = max(LENGTHS)
    x, dy = (torch.randn(len(LENGTHS), channels, size, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = bn.mask_from_lengths(LENGTHS, size + more)
    x, dy = (nn.functional.pad(t, (0, more)).masked_fill(~mask[:, None], torch.nan).to(dtype) for t in (x, dy))
    return x, dy, mask


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> bn.BatchNorm1d:
    layer = bn.BatchNorm1d(3, **options)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert t is not None
            t.copy_(torch.rand(3, generator=draw) + 0.5)
    return layer.to(dtype) if dtype == torch.float64 else layer


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("way", WAYS)
def test_padding_is_zero_with_zero_gradient_and_the_rest_is_as_if_it_were_not_there(
    way: str, activation: str | None, training: bool
) -> None:
    x, dy, mask = padded()
    layer = layer_of(activation=activation).train(training)
    alone = copy.deepcopy(layer)
    residual = x.flip(1)
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = run(way, layer, *leaves, mask=mask)
    dx, dresidual, *dparameters = torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)
    for result in (y, dx, dresidual):
        assert (result.transpose(1, 2)[~mask] == 0).all()

    # The steps that are present, one after the other, as a batch without padding.
    packed = [t.transpose(1, 2)[mask].requires_grad_() for t in (x, residual)]
    expected = alone(*packed)
    wanted = torch.autograd.grad(expected, [*packed, *alone.parameters()], dy.transpose(1, 2)[mask])
    for quantity, got, right in zip(("y", "dx", "dresidual"), (y, dx, dresidual), (expected, *wanted[:2]), strict=True):
        assert_close(got.transpose(1, 2)[mask], to_float64(right), dtype="float64", quantity=quantity)
    for got, right in zip(dparameters, wanted[2:], strict=True):
        assert_close(got, to_float64(right), dtype="float64", quantity="dweight", scale=dy.nan_to_num().abs().sum())
    for name, t in alone.state_dict().items():
        assert_close(layer.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_padding_a_batch_more_changes_nothing(way: str, dtype: torch.dtype) -> None:
    results = []
    for more in (0, 1, 50):
        x, dy, mask = padded(more=more, dtype=dtype)
        layer = layer_of(dtype, activation="relu")
        leaf = x.requires_grad_()
        y = run(way, layer, leaf, mask=mask)
        grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        size = max(LENGTHS)
        results.append((y[..., :size], grads[0][..., :size], *grads[1:], layer.running_mean, layer.running_var))
        assert y.shape == x.shape
    scale = float(padded()[1].nan_to_num().abs().sum())
    for other in results[1:]:
        for quantity, got, right in zip(("y", "dx", "dweight", "dbias"), other[:4], results[0][:4], strict=True):
            assert_close(
                got, to_float64(right), dtype=got.dtype, quantity=quantity,
                scale=scale if quantity in ("dweight", "dbias") else None,
            )  # fmt: skip
        for quantity, got, right in zip(("running_mean", "running_var"), other[4:], results[0][4:], strict=True):
            assert_close(
                got, to_float64(right), dtype=dtype, quantity=quantity,
                scale=2.0 if quantity == "running_mean" else None,
            )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_of_two_is_the_sample_twice_through_the_layer(way: str) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(5, 3, 4, generator=draw, dtype=torch.float64)
    counts = torch.tensor([1, 2, 0, 3, 1])
    layer, twin = layer_of(), layer_of()
    y = run(way, layer, x, sample_weight=counts.double())
    repeated = twin(x.repeat_interleave(counts, 0))
    assert_close(y.repeat_interleave(counts, 0), to_float64(repeated), dtype="float64", quantity="y")
    for name, t in twin.state_dict().items():
        assert_close(layer.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("present", [0, 1])
def test_in_a_compiled_graph_a_mask_that_leaves_too_few_values_moves_nothing(present: int) -> None:
    x, dy, _ = padded()
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    mask[0, :present] = True
    layer = layer_of()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    leaf = x.requires_grad_()
    y = run("torch.compile", layer, leaf, mask=mask)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert layer.bias is not None
    assert torch.equal(y.transpose(1, 2)[mask], layer.bias.detach().expand(present, -1))
    assert (y.transpose(1, 2)[~mask] == 0).all()
    assert (grads[0] == 0).all(), "a value alone is always at its own mean"
    assert (grads[1] == 0).all()
    assert torch.equal(grads[2], dy[0, :, 0] * present if present else torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("way", [*ON_THE_CPU, "composite"])
@pytest.mark.parametrize("present", [0, 1])
def test_elsewhere_it_is_an_error_that_changes_nothing(way: str, present: int) -> None:
    x, _, _ = padded()
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    mask[0, :present] = True
    layer = layer_of()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ArgumentError) as caught:
        run(way, layer, x, mask=mask)
    assert str(caught.value) == (
        "BatchNorm1d: expected more than 1 present value per channel when training (the sum of the weights), "
        f"got {present}. Leave such a batch out, or give it more present values."
    )
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("present", [0, 1, 2])
def test_too_few_counts_what_the_mask_leaves(present: int) -> None:
    x, _, _ = padded()
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    mask[0, :present] = True
    layer = layer_of(too_few="running")
    twin = copy.deepcopy(layer).train(present > 1)
    assert torch.equal(layer(x, mask=mask), twin(x, mask=mask))
    for name, t in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], t), name
    assert int(layer.num_batches_tracked) == (present > 1)


def test_too_few_counts_weights() -> None:
    x = torch.randn(4, 3)
    layer = bn.BatchNorm1d(3, too_few="running")
    layer(x, sample_weight=torch.full((4,), 0.25))
    assert int(layer.num_batches_tracked) == 0
    layer(x, sample_weight=torch.full((4,), 0.5))
    assert int(layer.num_batches_tracked) == 1


def test_too_few_running_with_a_mask_ends_a_compiled_graph_and_stays_right() -> None:
    x, _, mask = padded()
    layer = layer_of(too_few="running")
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    for chosen in (mask, torch.zeros_like(mask)):
        assert_close(compiled(x, mask=chosen), to_float64(twin(x, mask=chosen)), dtype="float64", quantity="y")
    assert int(layer.num_batches_tracked) == int(twin.num_batches_tracked) == 1


def test_too_few_running_with_a_mask_under_a_transform_says_what_it_cannot_do() -> None:
    layer = bn.BatchNorm1d(3, too_few="running", track_running_stats=True)
    x, mask = torch.randn(2, 4, 3, 5), torch.ones(2, 4, 5, dtype=torch.bool)
    with pytest.raises(AutogradError) as caught:
        torch.func.vmap(lambda x, mask: layer(x, mask=mask))(x, mask)
    assert str(caught.value) == (
        'BatchNorm1d: expected a call in which too_few="running" can count the present values, got a function '
        'transform (torch.func) is active. Use too_few="raise" there, which reads no values.'
    )


def test_recalibration_measures_what_the_masks_leave() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.norm(x, mask=mask)
            return y

    model = Masked()
    batches = [padded(seed, more) for seed, more in ((0, 0), (1, 3), (2, 9))]
    bn.recalibrate(model, [((x, mask),) for x, _, mask in batches])
    everything = torch.cat([x.transpose(1, 2)[mask] for x, _, mask in batches])
    right = bn.Moments.from_tensor(everything)
    assert model.norm.running_mean is not None
    assert model.norm.running_var is not None
    assert_close(
        model.norm.running_mean, to_float64(right.mean), dtype="float64", quantity="running_mean",
        scale=to_float64(right.std()),
    )  # fmt: skip
    assert_close(
        model.norm.running_var, to_float64(right.variance(biased=False)), dtype="float64", quantity="running_var"
    )


# mask_from_lengths


def test_lengths_become_a_mask() -> None:
    mask = bn.mask_from_lengths(torch.tensor([0, 2, 3]), 4)
    assert mask.tolist() == [[False] * 4, [True, True, False, False], [True, True, True, False]]
    assert torch.equal(bn.mask_from_lengths([0, 2, 3]), mask[:, :3])
    assert bn.mask_from_lengths([], 3).shape == (0, 3)
    assert bn.mask_from_lengths(torch.tensor([2], dtype=torch.uint8), 300).sum() == 2


def test_lengths_become_a_mask_in_one_compiled_graph() -> None:
    compiled = torch.compile(lambda n: bn.mask_from_lengths(n, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([0, 4])), bn.mask_from_lengths([0, 4], 4))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ([1.0], 3),
            DtypeError,
            "mask_from_lengths: expected integer lengths, got torch.float32. Convert them first, e.g. lengths.long().",
        ),
        (
            ([[1]], 3),
            ArgumentError,
            "mask_from_lengths: expected lengths of shape (N,), got (1, 1). Give one length for each sample.",
        ),
        (
            ([4, 1], 3),
            ArgumentError,
            "mask_from_lengths: expected lengths from 0 to 3, got 1 to 4. "
            "Correct the lengths, or give the padded length as size.",
        ),
        (
            ([-1, 1], 3),
            ArgumentError,
            "mask_from_lengths: expected lengths from 0 to 3, got -1 to 1. "
            "Correct the lengths, or give the padded length as size.",
        ),
    ],
)
def test_lengths_that_are_none_are_refused(arguments: tuple[Any, int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message) + "$"):
        bn.mask_from_lengths(*arguments)
