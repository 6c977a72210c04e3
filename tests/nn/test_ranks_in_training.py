"""Layers with a process group in training: DDP, FSDP2, checkpointing, the compiler, and ranks that go missing."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from ranked import Died
from tolerances import assert_close, to_float64

OnRanks = Callable[..., list[Any]]
STEPS, SAMPLES = 3, 4


def network(process_group: str | None) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(5, 8),
        bn.BatchNorm1d(8, activation="relu", process_group=process_group),  # type: ignore[arg-type]
        nn.Linear(8, 6),
        bn.BatchNorm1d(6, process_group=process_group),  # type: ignore[arg-type]
        nn.Tanh(),
        nn.Linear(6, 2),
    ).double()


def data(ranks: int) -> tuple[Tensor, Tensor]:
    at = torch.Generator().manual_seed(9)
    x = torch.randn(STEPS, ranks, SAMPLES, 5, generator=at, dtype=torch.float64)
    return x, torch.randn(STEPS, ranks, SAMPLES, 2, generator=at, dtype=torch.float64)


def trained(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """SGD on the mean squared error, one step for each entry."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for inputs, wanted in zip(x, target, strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), wanted).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def data_parallel() -> dict[str, Tensor]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = network("world")
    x, target = data(ranks)
    trained(DistributedDataParallel(model), x[:, rank], target[:, rank])
    return state(model)


def fully_sharded() -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    warnings.simplefilter("ignore")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    model = network("world")
    for block in (model[1], model[3]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model[1].weight, DTensor)
    x, target = data(ranks)
    trained(model, x[:, rank], target[:, rank])
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state(model).items()}


def alone(ranks: int) -> dict[str, Tensor]:
    """The same on one process, by the concatenated batches."""
    model = network(None)
    x, target = data(ranks)
    with bn.use_backend("eager"):
        trained(model, x.flatten(1, 2), target.flatten(1, 2))
    return state(model)


def assert_same_state(found: list[dict[str, Tensor]], right: dict[str, Tensor]) -> None:
    for name, value in right.items():
        assert all(torch.equal(each[name], found[0][name]) for each in found), f"{name} differs by rank"
        assert_close(found[0][name].double(), to_float64(value), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_training_is_that_of_one_process(on_ranks: OnRanks, ranks: int) -> None:
    assert_same_state(on_ranks(ranks, data_parallel), alone(ranks))


def test_fully_sharded_training_is_that_of_one_process(on_ranks: OnRanks) -> None:
    assert_same_state(on_ranks(2, fully_sharded), alone(2))


def checkpointed(reentrant: bool) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    found = []
    for again in (False, True):
        model = network("world")
        x = data(2)[0][0, rank].requires_grad_()
        y = checkpoint(model[:4], x, use_reentrant=reentrant) if again else model[:4](x)
        model[4:](y).square().sum().backward()
        assert x.grad is not None
        found += [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_exchange_is_repeated_by_a_checkpoint(on_ranks: OnRanks, reentrant: bool) -> None:
    for found in on_ranks(2, checkpointed, reentrant):
        half = len(found) // 2
        assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def compiled() -> list[bool]:
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank()
    plain = network("world")
    twin = copy.deepcopy(plain)
    fast = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = data(2)[0][0, rank]
    for model in (plain, fast):
        model(x[: 2 + rank]).square().sum().backward()
    same = [torch.allclose(p.grad, q.grad) for p, q in zip(plain.parameters(), twin.parameters(), strict=True)]
    same += [torch.allclose(plain[at].running_var, twin[at].running_var, rtol=1e-12) for at in (1, 3)]

    layer = bn.BatchNorm1d(5, process_group="world").double()
    twin_layer = copy.deepcopy(layer)
    fast_layer = torch.compile(twin_layer, backend="aot_eager", fullgraph=True)
    mask = torch.rand(x.shape) < 0.7
    same.append(torch.allclose(layer(x, mask=mask), fast_layer(x, mask=mask)))
    same.append(torch.allclose(layer.running_mean, twin_layer.running_mean))
    before = twin_layer.running_var.clone()
    fast_layer(x[: 1 - rank])  # one sample on all ranks: no error here, and nothing changes
    return [*same, torch.equal(twin_layer.running_var, before), int(twin_layer.num_batches_tracked) == 1]


@pytest.mark.slow
def test_a_compiled_graph_holds_the_exchange(on_ranks: OnRanks) -> None:
    for same in on_ranks(2, compiled, patience=250):
        assert all(same), same


def careful() -> bool:
    """A layer that decides by a value ends the graph."""
    warnings.simplefilter("ignore")
    layer = bn.BatchNorm1d(5, process_group="world", too_few="running")
    fast = torch.compile(layer, backend="eager")
    x = torch.randn(1 - torch.distributed.get_rank(), 5)
    return torch.allclose(fast(x), x, rtol=1e-4)


@pytest.mark.slow
def test_too_few_running_is_judged_between_two_graphs(on_ranks: OnRanks) -> None:
    assert on_ranks(2, careful, patience=250) == [True, True]


def missing(how: str) -> tuple[str, float]:
    """Rank 1 does one step less than the others."""
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, process_group="world"))})
    rank = torch.distributed.get_rank()
    x = torch.randn(4, 3)
    model["block"](x).sum().backward()
    if rank == 1 and how == "dies":
        os._exit(7)
    if rank == 1 and how == "leaves":
        return "", 0.0
    return str(model["block"](x)), 0.0


def without_one(how: str) -> tuple[str, float]:
    start = time.monotonic()
    try:
        return missing(how)
    except bn.BatchNormError as error:
        return str(error), time.monotonic() - start


@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_a_rank_that_goes_missing_is_an_error_that_names_layer_and_group(on_ranks: OnRanks, how: str) -> None:
    found = on_ranks(3, without_one, how, timeout=2)
    assert found[1] == (Died(7) if how == "dies" else ("", 0.0))
    for rank in (0, 2):
        message, seconds = found[rank]
        assert message.startswith(
            "block.1 (BatchNorm1d): expected all 3 ranks of the default process group in the exchange, got on rank "
            f"{rank}: "
        )
        assert message.endswith(
            "A rank that ends its loop early, fails, or takes another way through the model stops all others: look at "
            "the output of each. For uneven numbers of batches use torch's Join with throw_on_early_termination=True."
        )
        assert seconds < 15


def half_backward() -> str:
    layer = bn.BatchNorm1d(3, process_group="world")
    y = layer(torch.randn(4, 3, requires_grad=True))
    if torch.distributed.get_rank() == 1:
        return ""
    try:
        y.sum().backward()
    except bn.BatchNormError as error:
        return str(error)
    return "no error"


def test_a_rank_without_a_backward_is_an_error_too(on_ranks: OnRanks) -> None:
    found = on_ranks(2, half_backward, timeout=2)
    assert found[0].startswith("BatchNorm1d: expected all 2 ranks of the default process group in the exchange, got on")


def uneven() -> tuple[int, str]:
    """Rank 1 has fewer batches."""
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(network("world"))
    x = data(2)[0][0, rank]
    done = 0
    try:
        with Join([model], throw_on_early_termination=True):
            for _ in range(5 - 2 * rank):
                model(x).square().sum().backward()
                done += 1
    except RuntimeError as error:
        return done, str(error)
    return done, ""


def test_join_ends_all_ranks_where_the_first_has_no_more_batches(on_ranks: OnRanks) -> None:
    found = on_ranks(2, uneven, timeout=20)
    assert [done for done, _ in found] == [3, 3]
    assert all("exhausted" in message for _, message in found), found
