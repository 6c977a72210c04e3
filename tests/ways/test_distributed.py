"""DTensor, FSDP and DataParallel, in processes of one rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ways.common import agree, both_modes, data, in_a_fork, pair, same

way = pytest.mark.way
WHERE = "distributed"
X, OTHER, DY = data(), data(seed=2), data(seed=3)
pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
    ),
    pytest.mark.filterwarnings("ignore"),
]


def one_rank() -> None:
    """A process group of this process alone. Called in a fork, so that it ends with it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def bare(t: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


@way(WHERE, "DTensor: `distribute_module`, input replicated", "works")
@both_modes
@pytest.mark.parametrize("activation", [None, "relu"])
@in_a_fork
def test_distribute_module(activation: str | None, training: bool) -> None:
    one_rank()
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    ours, torchs = pair(activation, training=training)
    expected_state = dict(torchs.state_dict())
    leaf = X.clone().requires_grad_()
    y = torchs(leaf)
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, *torchs.parameters()], DY)]
    layer = distribute_module(ours, mesh)
    x = distribute_tensor(X, mesh, [Replicate()]).requires_grad_()
    y = layer(x)
    assert type(y).__name__ == "DTensor"
    found = torch.autograd.grad(y, [x, *layer.parameters()], distribute_tensor(DY, mesh, [Replicate()]))
    same([bare(y), *map(bare, found)], expected, "dx")
    same({name: bare(t) for name, t in layer.state_dict().items()}, expected_state, "dx")


@way(WHERE, "DTensor: input sharded over the batch", "as torch's layer, or an error")
@both_modes
@in_a_fork
def test_a_sharded_input(training: bool) -> None:
    one_rank()
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    outcomes: list[Any] = []
    for layer in pair("relu", training=training):
        try:
            y = distribute_module(layer, mesh)(distribute_tensor(X, mesh, [Shard(0)]))
            outcomes.append(bare(y))
        except Exception:
            outcomes.append("raises")
    if isinstance(outcomes[1], Tensor):
        same(outcomes[0], outcomes[1])
    elif isinstance(outcomes[0], Tensor):
        same(outcomes[0], pair("relu", training=training)[1](X).detach())


@way(WHERE, "`fully_shard` (FSDP2)", "works")
@both_modes
@in_a_fork
def test_fully_shard(training: bool) -> None:
    one_rank()
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    def scenario(layer: nn.Module) -> Any:
        net = fully_shard(copy.deepcopy(layer), mesh=init_device_mesh("cpu", (1,)))
        results = []
        for _ in range(2):
            y = net(X)
            y.backward(DY)
            results.append([y.detach(), *(bare(p.grad) for p in net.parameters())])
        return results, {name: bare(t) for name, t in net.state_dict().items()}

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "FSDP1 on the CPU with `device_id`", "works")
@both_modes
@pytest.mark.parametrize("original", [True, False])
@in_a_fork
def test_fsdp1(original: bool, training: bool) -> None:
    one_rank()
    from torch.distributed.fsdp import FullyShardedDataParallel

    def scenario(layer: nn.Module) -> Any:
        net = FullyShardedDataParallel(
            copy.deepcopy(layer), device_id=torch.device("cpu"), use_orig_params=original
        )  # fmt: skip
        results = []
        for _ in range(2):
            y = net(X)
            y.backward(DY)
            results.append([y.detach(), *(p.grad for p in net.parameters())])
        return results, dict(net.state_dict())

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "`DistributedDataParallel`", "works")
@both_modes
@in_a_fork
def test_distributed_data_parallel(training: bool) -> None:
    one_rank()

    def scenario(layer: nn.Module) -> Any:
        net = nn.parallel.DistributedDataParallel(layer)
        results = []
        for _ in range(2):
            y = net(X)
            y.backward(DY)
            results.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        return results

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "`DataParallel` replicas", "work: parameters are plain attributes there")
@both_modes
@pytest.mark.parametrize("activation", [None, "relu"])
@in_a_fork
def test_a_replica(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        norm: Any = layer[0]  # type: ignore[index]
        replica = norm._replicate_for_data_parallel()
        weight = (norm.weight * 1).requires_grad_() if norm.weight is not None else None
        replica._former_parameters = {}
        for name, p in (("weight", weight), ("bias", norm.bias * 1)):
            setattr(replica, name, p)
            replica._former_parameters[name] = p
        y = layer[1:](replica(X)) if len(layer) > 1 else replica(X)  # type: ignore[arg-type, index]
        return y.detach(), torch.autograd.grad(y, [norm.weight, norm.bias], DY)

    agree(scenario, activation, "dx", training=training)
