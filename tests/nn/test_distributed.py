"""A training batch spread over ranks: what one process gives on the concatenated batch, by two small exchanges."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import functional, kernels
from batchnorm.errors import ArgumentError
from batchnorm.functional import Batch
from batchnorm.kernels.activations import activation
from batchnorm.kernels.seams import Seams
from batchnorm.nn.distributed import Ranks, wire_of
from tolerances import assert_close, to_float64

OnRanks = Callable[..., list[Any]]
CHANNELS = 3
SIZES = {2: (5, 2), 3: (4, 0, 3), 4: (1, 3, 0, 2)}
"""Samples on each rank: uneven, one value a channel, none."""


@dataclass(frozen=True)
class Case:
    """One layer and the shape of its samples."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    activation: str | None = None
    residual: bool = False
    mask: str | None = None  # "sample", "place" or "channel"
    weights: str | None = None  # "sample" or "channel"
    momentum: float | None = 0.1
    channels_last: bool = False


CASES = (
    Case(()),
    Case((), mask="channel"),
    Case((6,), activation="relu"),
    Case((4, 3), residual=True, activation="relu"),
    Case((4, 3), residual=True, activation="gelu", momentum=None),
    Case((7,), mask="place"),
    Case((7,), mask="channel", activation="silu", residual=True),
    Case((4, 3), weights="sample"),
    Case((5,), mask="place", weights="channel", activation="leaky_relu"),
    Case((4, 4), channels_last=True),
    Case((5,), dtype=torch.float32, activation="relu", residual=True),
    Case((), dtype=torch.float32, mask="sample"),
    Case((6, 6), dtype=torch.float32, channels_last=True, weights="sample"),
)


@dataclass
class Given:
    """All that goes into a step, of the whole batch."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None

    def part(self, rank: int, sizes: tuple[int, ...]) -> Given:
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x, dy, *others = (None if t is None else t[rows].clone() for t in vars(self).values())
        assert x is not None and dy is not None
        return Given(x, dy, *others)


def given(case: Case, samples: int) -> Given:
    torch.manual_seed(len(str(case)))
    shape = (samples, CHANNELS, *case.shape)
    x, dy, residual = (torch.randn(shape, dtype=case.dtype) for _ in range(3))
    x = x * torch.tensor([1.0, 3.0, 0.2], dtype=case.dtype).view(1, -1, *(1,) * len(case.shape)) + 5
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    of = {"sample": (samples,), "place": (samples, *case.shape), "channel": shape}
    mask = None if case.mask is None else torch.rand(of[case.mask]) < 0.8
    weights = None if case.weights is None else torch.rand(of[case.weights], dtype=case.dtype) * 2
    return Given(x, dy, residual if case.residual else None, mask, weights)


def step(case: Case, use: Given, process_group: Any, backend: str = "eager") -> dict[str, Tensor]:
    """One training step's results; weight and bias are not trivial."""
    with bn.use_backend(backend):
        return _step(case, use, process_group)


def _step(case: Case, use: Given, process_group: Any) -> dict[str, Tensor]:
    layer = bn.BatchNorm(
        CHANNELS, momentum=case.momentum, activation=case.activation, dtype=case.dtype, process_group=process_group
    )
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.7, 0.3]))
        layer.bias.copy_(torch.tensor([0.2, -0.1, 0.4]))
    x = use.x.requires_grad_()
    residual = None if use.residual is None else use.residual.requires_grad_()
    y = layer(x, residual=residual, mask=use.mask, sample_weight=use.sample_weight)
    y.backward(use.dy)
    found = {"y": y, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    found["counter"] = layer.num_batches_tracked
    if residual is not None:
        found["dresidual"] = residual.grad
    return {name: t.detach() for name, t in found.items()}


def steps(sizes: tuple[int, ...], process_group: str | None) -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    return [step(case, given(case, sum(sizes)).part(rank, sizes), process_group) for case in CASES]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_give_what_one_process_gives_on_the_whole_batch(on_ranks: OnRanks, ranks: int) -> None:
    sizes = SIZES[ranks]
    found = on_ranks(ranks, steps, sizes, "world")
    for i, case in enumerate(CASES):
        whole = given(case, sum(sizes))
        right = step(
            Case(case.shape, torch.float64, case.activation, case.residual, case.mask, case.weights, case.momentum),
            Given(*(t if t is None or t.dtype == torch.bool else t.double() for t in vars(whole).values())),
            None,
        )
        parts = [each[i] for each in found]
        for name in ("y", "dx", "dresidual"):
            if name in right:
                joined = torch.cat([part[name] for part in parts])
                assert_close(joined, to_float64(right[name]), dtype=case.dtype, quantity=name, what=str(case))
        for name in ("dweight", "dbias"):
            # The sum of |terms| is at least this; the terms are of the size of dy.
            scale = whole.dy.abs().double().sum([d for d in range(whole.dy.dim()) if d != 1])
            total = torch.stack([part[name].double() for part in parts]).sum(0).to(case.dtype)
            assert_close(total, to_float64(right[name]), dtype=case.dtype, quantity=name, scale=scale, what=str(case))
        for name in ("running_mean", "running_var", "counter"):
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), f"{case}: {name} differs by rank"
        std = right["running_var"].sqrt()
        got = parts[0]
        assert_close(got["running_mean"], to_float64(right["running_mean"]), dtype=case.dtype, quantity="running_mean",
                     scale=std)  # fmt: skip
        assert_close(got["running_var"], to_float64(right["running_var"]), dtype=case.dtype, quantity="running_var")
        assert int(got["counter"]) == 1


KERNEL_SIZES = (4, 1, 3)  # a kernel that is named refuses an input without values
KERNEL_CASES = (Case((4, 3), dtype=torch.float32), Case((5,), activation="relu", residual=True))


def kernel_steps(sizes: tuple[int, ...], process_group: str | None) -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank() if process_group else 0
    return [step(case, given(case, sum(sizes)).part(rank, sizes), process_group, "cpu") for case in KERNEL_CASES]


class Itself:
    """The reducer of one rank."""

    moments = sums = staticmethod(lambda local: local)


def compiled_kernels() -> None:
    """The kernels of two phases, compiled once and for all ranks. Which ones depends on the number of samples."""
    for case, samples in product(KERNEL_CASES, KERNEL_SIZES):
        use = given(case, samples)
        x = use.x.requires_grad_()
        act = activation(case.activation)
        weight, bias = (torch.ones(CHANNELS, dtype=case.dtype, requires_grad=True) for _ in range(2))
        with bn.use_backend("cpu"):
            batch = Batch(None, Seams(Itself()))  # type: ignore[arg-type]
            functional.run(x, weight, bias, 1e-5, batch, act, use.residual).backward(use.dy)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in kernels.BACKENDS, reason="no compiled kernels here")
def test_the_compiled_kernels_do_the_same(on_ranks: OnRanks) -> None:
    sizes = KERNEL_SIZES
    found = on_ranks(3, kernel_steps, sizes, "world", before=compiled_kernels)
    for i, case in enumerate(KERNEL_CASES):
        right = step(case, given(case, sum(sizes)), None)
        for name in ("y", "dx"):
            joined = torch.cat([each[i][name] for each in found])
            assert_close(joined, to_float64(right[name]), dtype=case.dtype, quantity=name, what=str(case))
        assert all(torch.equal(each[i]["running_var"], found[0][i]["running_var"]) for each in found)


def random_cuts(seed: int) -> list[dict[str, Tensor]]:
    """Batches cut among the ranks at random, some of them empty."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = []
    for trial in range(12):
        at = torch.Generator().manual_seed(seed + trial)
        sizes = tuple(int(n) for n in torch.randint(0, 4, (size,), generator=at))
        sizes = sizes if sum(sizes) > 1 else (2, *sizes[1:])
        found.append(step(CASES[0], given(CASES[0], sum(sizes)).part(rank, sizes), "world") | {"sizes": sizes})
    return found


def test_a_batch_cut_in_any_way_gives_the_same(on_ranks: OnRanks) -> None:
    every = on_ranks(3, random_cuts, 7)
    assert len({each["sizes"] for each in every[0]}) > 8
    for parts in zip(*every, strict=True):
        right = step(CASES[0], given(CASES[0], sum(parts[0]["sizes"])), None)
        for name in ("y", "dx"):
            joined = torch.cat([part[name] for part in parts])
            # A batch of two values has dx near 0, whatever the terms that it is the difference of.
            assert_close(joined, to_float64(right[name]), dtype="float64", quantity=name, scale=20.0)
        assert_close(parts[0]["running_var"], to_float64(right["running_var"]), dtype="float64", quantity="running_var")


def images_of_two_sizes() -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(3)
    images = [torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64), torch.randn(3, CHANNELS, 2, 7, dtype=torch.float64)]
    layer = bn.BatchNorm2d(CHANNELS, process_group="world", dtype=torch.float64)
    return layer(images[rank]), layer.running_var


def test_the_ranks_may_have_different_spatial_sizes(on_ranks: OnRanks) -> None:
    (y0, var0), (y1, var1) = on_ranks(2, images_of_two_sizes)
    torch.manual_seed(3)
    images = [torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64), torch.randn(3, CHANNELS, 2, 7, dtype=torch.float64)]
    values = torch.cat([i.transpose(0, 1).flatten(1) for i in images], 1).T
    layer = bn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    with bn.use_backend("eager"):
        right = layer(values)
    got = torch.cat([y.transpose(0, 1).flatten(1) for y in (y0, y1)], 1).T
    assert_close(got.detach(), to_float64(right), dtype="float64", quantity="y")
    assert_close(var0, to_float64(layer.running_var), dtype="float64", quantity="running_var")
    assert torch.equal(var0, var1)


def second_order(sizes: tuple[int, ...], process_group: str | None, rank: int | None = None) -> dict[str, Tensor]:
    """The gradient of a penalty on the gradient, as in WGAN-GP."""
    if rank is None:
        rank = torch.distributed.get_rank()
    torch.manual_seed(5)
    whole = [torch.randn(sum(sizes), CHANNELS, 4, dtype=torch.float64) for _ in range(3)]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) if process_group else slice(None)
    x, dy, v = (t[rows].clone().requires_grad_() for t in whole)
    layer = bn.BatchNorm1d(CHANNELS, activation="silu", dtype=torch.float64, process_group=process_group)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.7, 0.3]))
    y = layer(x)
    (dx, dweight) = torch.autograd.grad(y, (x, layer.weight), dy, create_graph=True)
    # dweight is this rank's part of a sum, so only a linear function of it is the sum of the ranks' functions.
    ((dx.square() * v).sum() + (dweight * torch.tensor([0.3, -1.1, 0.8])).sum()).backward()
    assert layer.bias.grad is not None
    found = {"dx": x.grad, "ddy": dy.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    return {name: t.detach() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("ranks", [2, 3])
def test_second_derivatives_are_those_of_the_whole_batch(on_ranks: OnRanks, ranks: int) -> None:
    sizes = SIZES[ranks]
    parts = on_ranks(ranks, second_order, sizes, "world")
    right = second_order(sizes, None, 0)
    for name in ("dx", "ddy"):
        joined = torch.cat([part[name] for part in parts])
        assert_close(joined, to_float64(right[name]), dtype="float64", quantity="dx", what=name)
    for name in ("dweight", "dbias"):
        total = torch.stack([part[name] for part in parts]).sum(0)
        assert_close(total, to_float64(right[name]), dtype="float64", quantity=name, scale=100.0)


def adjoint() -> bool:
    rank = torch.distributed.get_rank()
    wire = wire_of("test", "world")
    assert wire is not None

    def of_all(t: Tensor) -> Tensor:
        every = [torch.empty_like(t) for _ in range(2)]
        torch.distributed.all_gather(every, t.detach())
        return torch.stack(every)

    torch.manual_seed(rank)
    local = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    gathered = wire.gather(local)
    assert torch.equal(gathered, of_all(local))
    (grad,) = torch.autograd.grad(gathered, local, weight, create_graph=True)
    assert torch.equal(grad, of_all(weight)[:, rank].sum(0))
    v = torch.randn(5, dtype=torch.float64)
    (back,) = torch.autograd.grad(grad, weight, v)
    return bool(torch.equal(back, of_all(v)))


def test_the_gather_and_its_adjoint_are_adjoint_to_each_other(on_ranks: OnRanks) -> None:
    assert on_ranks(2, adjoint) == [True, True]


def collectives() -> list[tuple[str, int]]:
    """What goes over the wire in a step, in a step without gradients, and in eval mode."""
    seen: list[tuple[str, int]] = []
    gather, reduce = torch.distributed.all_gather_single, torch.distributed.all_reduce

    def counted_gather(result: Tensor, local: Tensor, **others: Any) -> Any:
        seen.append(("gather", local.numel()))
        return gather(result, local, **others)

    def counted_reduce(t: Tensor, **others: Any) -> Any:
        seen.append(("reduce", t.numel()))
        return reduce(t, **others)

    torch.distributed.all_gather_single, torch.distributed.all_reduce = counted_gather, counted_reduce
    layer = bn.BatchNorm1d(5, process_group="world", activation="relu")
    x = torch.randn(4, 5, requires_grad=True)
    layer(x).sum().backward()
    seen.append(("-", 0))
    layer(x.detach()).sum().backward()  # only weight and bias have gradients
    seen.append(("-", 0))
    with torch.no_grad():
        layer(x)
    seen.append(("-", 0))
    layer(x, mask=torch.rand(4, 5) < 2)
    seen.append(("-", 0))
    layer.eval()(x).sum().backward()
    return seen


@pytest.mark.skipif(not hasattr(torch.distributed, "all_gather_single"), reason="named otherwise before torch 2.13")
def test_a_step_is_one_gather_of_2c_plus_1_and_one_reduction_of_2c_values(on_ranks: OnRanks) -> None:
    forward, backward, end = ("gather", 11), ("reduce", 10), ("-", 0)
    by_channel = [forward, ("gather", 5)]
    assert on_ranks(2, collectives)[0] == [forward, backward, end, forward, end, forward, end, *by_channel, end]


def too_few() -> list[str]:
    rank = torch.distributed.get_rank()
    found = []
    held = nn.ModuleDict({"norm": bn.BatchNorm1d(CHANNELS, process_group="world")})
    layer = held["norm"]
    for x, mask in (
        (torch.randn(1 if rank == 1 else 0, CHANNELS), None),
        (torch.randn(4, CHANNELS), torch.tensor([rank == 0, False, False, False])),
        (torch.randn(4, CHANNELS), torch.ones(4, CHANNELS, dtype=torch.bool).index_fill(1, torch.tensor([1]), False)),
    ):
        try:
            layer(x, mask=mask)
            found.append("nothing raised")
        except ArgumentError as error:
            found.append(str(error))
        assert int(layer.num_batches_tracked) == 0
    # Two ranks with one value each are a batch of two.
    layer(torch.tensor([[1.0, 2.0, 3.0]]) + 2 * rank)
    found.append(str(layer.running_mean.tolist()))
    # Nothing on any rank changes nothing, not even the counter.
    y = layer(torch.randn(0, CHANNELS))
    z = layer(torch.randn(2, CHANNELS), mask=torch.zeros(2, dtype=torch.bool))
    assert int(layer.num_batches_tracked) == 1
    assert y.shape == (0, CHANNELS)
    assert not z.any()
    held["norm"] = layer = bn.BatchNorm1d(CHANNELS, process_group="world", too_few="running", affine=False)
    x = torch.randn(1 - rank, CHANNELS)
    y = layer(x)
    assert torch.allclose(y, x, rtol=1e-4)
    assert int(layer.num_batches_tracked) == 0
    return found


def test_too_few_is_judged_over_all_ranks_and_all_say_so(on_ranks: OnRanks) -> None:
    at = "over the 2 ranks of the default process group at norm (BatchNorm1d)"
    message = f"Expected more than 1 value per channel when training, got 1 {at}"
    none = f"Expected more than 1 value per channel when training, got 0 {at}"
    running = str([0.2 * v for v in (1.0,)])  # (1 + 3)/2 · 0.1
    found = on_ranks(2, too_few)
    assert found[0] == found[1]
    assert found[0][:3] == [message, message, none]
    assert found[0][3].startswith(running[:-1])


def nonfinite(policy: str) -> tuple[str, Tensor, int]:
    rank = torch.distributed.get_rank()
    layer = bn.BatchNorm1d(CHANNELS, process_group="world", nonfinite=policy)  # type: ignore[arg-type]
    x = torch.randn(4, CHANNELS)
    if rank == 1:
        x[0, 2] = torch.inf
    message = ""
    try:
        layer(x)
    except bn.BatchNormError as error:
        message = str(error)
    return message, layer.running_var, int(layer.num_batches_tracked)


def test_an_inf_on_one_rank_is_an_inf_of_the_batch(on_ranks: OnRanks) -> None:
    for message, var, batches in on_ranks(2, nonfinite, "raise"):
        assert message == (
            "BatchNorm1d: expected finite values, got Inf or NaN in channel 2 of batch 1. Look at the layers before "
            'it, lower the learning rate, or drop such batches with nonfinite="skip".'
        )
        assert torch.equal(var, torch.ones(CHANNELS))
        assert batches == 0
    assert [(m, v.tolist(), b) for m, v, b in on_ranks(2, nonfinite, "skip")] == [("", [1.0] * CHANNELS, 0)] * 2


def groups() -> dict[str, Any]:
    """Layers over some of the ranks only."""
    rank = torch.distributed.get_rank()
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    mine, other = pairs[rank // 2], pairs[1 - rank // 2]
    layer = bn.BatchNorm1d(1, process_group=mine)
    layer(torch.tensor([[float(rank)]]))
    found: dict[str, Any] = {"mean": float(layer.running_mean), "repr": repr(layer)}
    with pytest.raises(ArgumentError) as error:
        bn.BatchNorm1d(1, process_group=other)
    found["error"] = str(error.value)
    twin = copy.deepcopy(nn.Sequential(layer))[0]
    assert twin.process_group is mine
    read = pickle.loads(pickle.dumps(layer))
    assert read.process_group is mine
    read(torch.tensor([[float(rank)]]))
    assert torch.equal(read.running_mean, layer.running_mean * 1.9)
    world = bn.BatchNorm1d(1, process_group=torch.distributed.group.WORLD)
    assert world.process_group == "world"
    world(torch.tensor([[float(rank)]]))
    found["world"] = float(world.running_mean)
    world.process_group = None
    with pytest.raises(ArgumentError):
        world(torch.tensor([[float(rank)]]))
    found["pickle"] = pickle.dumps(layer)
    torch.distributed.destroy_process_group(mine)
    with pytest.raises(bn.BatchNormError) as gone:
        layer(torch.ones(2, 1))
    found["gone"] = str(gone.value)
    torch.distributed.destroy_process_group()
    layer(torch.ones(2, 1))  # nothing is distributed any more
    return found


def test_a_group_of_some_ranks_is_copied_pickled_and_missed(on_ranks: OnRanks) -> None:
    found = on_ranks(4, groups)
    assert [each["mean"] for each in found] == pytest.approx([0.05, 0.05, 0.25, 0.25])
    assert [each["world"] for each in found] == pytest.approx([0.15] * 4)
    assert found[3]["repr"] == (
        "BatchNorm1d(1, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "process_group=<process group '2' of ranks [2, 3]>)"
    )
    assert found[0]["error"] == (
        'BatchNorm1d: expected a process_group of None, "world" or a ProcessGroup that this rank belongs to, got -100. '
        'torch.distributed.new_group returns one; "world" is the default group.'
    )
    assert found[0]["gone"] == (
        "BatchNorm1d: expected the process group '1' of ranks [0, 1], which the layer was built with, got no such "
        "group in this process. Create the group before the first forward, or set layer.process_group."
    )
    # Here nothing is distributed: the layer is the plain one, and still knows its group by name.
    layer = pickle.loads(found[2]["pickle"])
    assert repr(layer.process_group) == "<process group '2' of ranks [2, 3]>"
    layer(torch.randn(4, 1))
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("make", [bn.BatchNorm1d, bn.LazyBatchNorm1d, bn.BatchNorm], ids=lambda kind: kind.__name__)
def test_outside_of_a_group_it_is_the_plain_layer(make: type[nn.Module]) -> None:
    arguments = () if make is bn.LazyBatchNorm1d else (CHANNELS,)
    ours, plain = make(*arguments, process_group="world"), make(*arguments)
    x = torch.randn(4, CHANNELS, 5)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_var, plain.running_var)
    assert ours.process_group == "world"
    assert pickle.loads(pickle.dumps(ours)).process_group == "world"
    assert ours.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ArgumentError) as error:
        ours(x[:1, :, :1])
    assert str(error.value) == (
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1])"
    )


def test_a_linear_block_hands_its_group_to_its_norm() -> None:
    assert bn.BatchNormLinear(3, 2, process_group="world").norm.process_group == "world"


@pytest.mark.parametrize("wrong", ["everyone", True, 3])
def test_what_is_no_group_is_refused_when_the_layer_is_built(wrong: Any) -> None:
    with pytest.raises(ArgumentError) as error:
        bn.BatchNorm2d(3, process_group=wrong)
    assert str(error.value) == (
        f'BatchNorm2d: expected a process_group of None, "world" or a ProcessGroup that this rank belongs to, got '
        f'{wrong!r}. torch.distributed.new_group returns one; "world" is the default group.'
    )


def test_virtual_batches_and_a_group_exclude_each_other_whichever_comes_first() -> None:
    message = (
        "one of process_group and virtual_batch_size, got both. A virtual batch is smaller than the batch of a rank, a "
        "process group's larger: leave one of them away."
    )
    layer = bn.BatchNorm1d(3, virtual_batch_size=2)
    with pytest.raises(ArgumentError) as error:
        layer.process_group = "world"
    assert str(error.value) == f"BatchNorm1d: expected {message}"
    assert layer.process_group is None
    with pytest.raises(ArgumentError) as error:
        bn.convert(nn.Sequential(nn.BatchNorm1d(3), layer), process_group="world")
    assert str(error.value) == f"convert: expected {message}"


def test_groups_are_equal_by_name_and_ranks() -> None:
    assert Ranks("1", (0, 1)) == Ranks("1", (0, 1)) != Ranks("1", (0, 2))
    assert len({Ranks("world"), Ranks("world"), Ranks("1", (0,))}) == 2


def test_scripting_refuses_to_train_over_ranks_and_serves_inference() -> None:
    layer = bn.BatchNorm1d(CHANNELS, process_group="world")
    scripted = torch.jit.script(layer)
    with pytest.raises(torch.jit.Error) as error:
        scripted(torch.randn(4, CHANNELS))
    assert "TorchScript trains without process_group, renorm and virtual_batch_size." in str(error.value)
    x = torch.randn(4, CHANNELS)
    assert torch.equal(scripted.eval()(x), layer.eval()(x))
