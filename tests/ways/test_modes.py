"""Modes around the call: fake tensors, dispatch and function modes, counters, hooks on what is saved, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import batchnorm as bn
from ways.common import activations, agree, both_modes, data, in_a_fork, pair, same, step

way = pytest.mark.way
WHERE = "modes and hooks"
X, OTHER, DY = data(), data(seed=2), data(seed=3)


class Seen(TorchDispatchMode):
    """Writes down each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Zeroing(TorchDispatchMode):
    """Each operation gives zeros: a kernel that passes the mode by would give something else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda t: torch.zeros_like(t), result)


class Functions(TorchFunctionMode):
    """Passes each function on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@way(WHERE, "`TorchDispatchMode`", "sees `aten` operations only, forward and backward")
@both_modes
@activations
@in_a_fork
def test_a_dispatch_mode_sees_standard_operations(activation: str | None, training: bool) -> None:
    modes: list[Seen] = []

    def scenario(layer: nn.Module) -> Any:
        with Seen() as mode:
            given = step(layer, X, DY)
        modes.append(mode)
        return given

    agree(scenario, activation, "dx", training=training)
    assert modes[-1].names
    assert all(name.startswith(("aten.", "prim")) for name in modes[-1].names), modes[-1].names


@way(WHERE, "`TorchDispatchMode` that changes results", "has its effect")
@both_modes
@in_a_fork
def test_a_dispatch_mode_can_change_the_result(training: bool) -> None:
    for layer in pair(training=training):
        with torch.no_grad(), Zeroing():
            y = layer(X)
        assert torch.equal(y, torch.zeros_like(X))


@way(WHERE, "`TorchFunctionMode`", "works")
@both_modes
@activations
@in_a_fork
def test_a_function_mode(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with Functions():
            return step(layer, X, DY)

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`FlopCounterMode`", "works, counts what it counts with torch's layer")
@both_modes
@in_a_fork
def test_flop_counter(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=X.dtype), layer)
        with FlopCounterMode(display=False) as counter:
            y = net(X)
            y.backward(DY)
        return y.detach(), [p.grad for p in net.parameters()], counter.get_total_flops()

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "fake tensors, forward and backward", "shapes, and strides of the result, as torch's")
@both_modes
@activations
@pytest.mark.parametrize("converted", [True, False], ids=["layer converted", "layer made inside"])
@in_a_fork
def test_fake_tensors(converted: bool, activation: str | None, training: bool) -> None:
    def scenario(kind: type[nn.Module], **options: Any) -> Any:
        outside = kind(3, **options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer = (outside if converted else kind(3, **options)).train(training)
            x = mode.from_tensor(X.float().contiguous(memory_format=torch.channels_last)).requires_grad_()
            y = layer(x)
            if activation is not None and not options:
                y = torch.relu(y)
            given = [y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])]
        # torch's own fake gradients have other strides than its real ones.
        return y.stride(), [(type(t).__name__, t.shape, t.dtype, str(t.device)) for t in given]

    options = {} if activation is None else {"activation": activation}
    assert scenario(bn.BatchNorm2d, **options) == scenario(nn.BatchNorm2d)


@way(WHERE, "`saved_tensors_hooks`, `save_on_cpu`", "work")
@both_modes
@activations
@pytest.mark.parametrize("how", ["pack in float64", "save_on_cpu"])
@in_a_fork
def test_hooks_on_saved_tensors(how: str, activation: str | None, training: bool) -> None:
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.double().clone()

    def scenario(layer: nn.Module) -> Any:
        hooks: Any = torch.autograd.graph.save_on_cpu()
        if how != "save_on_cpu":
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        leaf = X.clone().requires_grad_()
        with hooks:
            y = layer(leaf)
        return y, torch.autograd.grad(y, [leaf, *layer.parameters()], DY)

    agree(scenario, activation, "dx", training=training)
    assert packed or how == "save_on_cpu"


@way(WHERE, "`checkpoint`, reentrant or not", "gradients as without; running statistics move once, torch's twice")
@both_modes
@activations
@pytest.mark.parametrize("reentrant", [True, False])
@in_a_fork
def test_checkpoint(reentrant: bool, activation: str | None, training: bool) -> None:
    ours, torchs = pair(activation, training=training)
    given = []
    for layer in (ours, torchs):
        leaf = X.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=reentrant)
        y.backward(DY)
        given.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    same(given[0], given[1], "dx")
    moved = [int(layer[0].num_batches_tracked) - 3 for layer in (ours, torchs)]
    assert moved == ([1, 2] if training else [0, 0])


@way(WHERE, "selective checkpointing", "works; running statistics move once")
@both_modes
@activations
@pytest.mark.parametrize("policy", [CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE])
@in_a_fork
def test_selective_checkpoint(policy: CheckpointPolicy, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()

        def contexts() -> Any:
            def choose(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
                norms = "batch_norm" in str(op) or "relu" in str(op)
                return policy if norms else CheckpointPolicy.PREFER_RECOMPUTE

            return create_selective_checkpoint_contexts(choose)

        y = checkpoint(layer, leaf, use_reentrant=False, context_fn=contexts)
        return y.detach(), torch.autograd.grad(y, [leaf, *layer.parameters()], DY)

    ours, torchs = pair(activation, training=training)
    same(scenario(ours), scenario(torchs), "dx")
    assert int(ours[0].num_batches_tracked) == 3 + training


@way(WHERE, "`inference_mode`, and its tensors in a later graph", "as torch's layer")
@both_modes
@in_a_fork
def test_inference_mode(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.inference_mode():
            y = layer(X)
            inside = X.clone()
        try:
            again = layer(inside.requires_grad_(False)).detach()
        except RuntimeError as error:
            again = str(error)
        return y.is_inference(), y.clone(), again

    # The statistics are not compared: torch's layer has moved them when it refuses to save an inference tensor.
    ours, torchs = pair("relu", training=training)
    same(scenario(ours), scenario(torchs))


@way(WHERE, "autocast", "as torch's layer: the input's dtype, statistics in float32")
@both_modes
@in_a_fork
def test_autocast(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y, z = layer(X.bfloat16()), layer(X.float())
        return str(y.dtype), str(z.dtype)

    ours, torchs = pair("relu", training=training, dtype=torch.float32)
    assert scenario(ours) == scenario(torchs)


@way(WHERE, "the profiler", "works")
@both_modes
@in_a_fork
def test_profiler(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True):
            return step(layer, X, DY)

    agree(scenario, "relu", "dx", training=training)
