"""What PyTorch's tools do to modules: parameters replaced, copied, moved, looked for by type, converted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import mkldnn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from ways.common import OURS, TORCHS, activations, agree, both_modes, data, in_a_fork, pair, same, step

way = pytest.mark.way
WHERE = "modules and their tools"
X, OTHER, DY = data(), data(seed=2), data(seed=3)


class Squared(nn.Module):
    """A parametrization: w²."""

    def forward(self, w: Tensor) -> Tensor:
        return w.square()


def plain_attribute(norm: Any, name: str) -> None:
    value = getattr(norm, name).detach().clone()
    delattr(norm, name)
    setattr(norm, name, value)


def plain_buffer(norm: Any, name: str) -> None:
    value = norm._buffers.pop(name)
    object.__setattr__(norm, name, value)


def old_weight_norm(norm: nn.Module) -> None:
    nn.utils.weight_norm(norm, "weight", dim=0)


CHANGED: dict[str, Callable[[Any], Any]] = {
    "parametrize": lambda norm: parametrize.register_parametrization(norm, "weight", Squared()),
    "parametrize the bias": lambda norm: parametrize.register_parametrization(norm, "bias", Squared()),
    "prune": lambda norm: prune.l1_unstructured(norm, "weight", 1),
    "prune the bias": lambda norm: prune.random_unstructured(norm, "bias", 2),
    "parametrizations.weight_norm": lambda norm: parametrizations.weight_norm(norm, "weight", dim=None),
    "nn.utils.weight_norm": old_weight_norm,
    "plain weight": lambda norm: plain_attribute(norm, "weight"),
    "plain bias": lambda norm: plain_attribute(norm, "bias"),
    "plain running_mean": lambda norm: plain_buffer(norm, "running_mean"),
    "plain running_var": lambda norm: plain_buffer(norm, "running_var"),
    "plain counter": lambda norm: plain_buffer(norm, "num_batches_tracked"),
    "weight set to None": lambda norm: norm.register_parameter("weight", None),
    "bias set to None": lambda norm: norm.register_parameter("bias", None),
    "a class attribute": lambda norm: setattr(norm, "__class__", type("Child", (type(norm),), {})),
}


@way(WHERE, "`nn.utils.parametrize`, `prune`, `weight_norm`", "work")
@way(WHERE, "`weight`, `bias`, `running_mean`, … as plain attributes", "work")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@both_modes
@activations
@pytest.mark.parametrize("how", CHANGED)
@in_a_fork
def test_parameters_that_are_something_else(how: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        torch.manual_seed(0)
        norm: Any = layer[0]  # type: ignore[index]
        CHANGED[how](norm)
        given = step(layer, X, DY)
        return given, step(layer, OTHER, DY), norm.running_mean, norm.running_var, norm.num_batches_tracked

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`spectral_norm`", "as with torch's layer: an error, or the same numbers")
@in_a_fork
def test_spectral_norm() -> None:
    def scenario(layer: nn.Module) -> Any:
        torch.manual_seed(0)
        try:
            parametrizations.spectral_norm(layer[0], "weight")  # type: ignore[index]
        except Exception as error:
            return type(error).__name__
        return step(layer, X, DY)

    agree(scenario, "relu", "dx")


@way(WHERE, "`isinstance(layer, torch.nn.BatchNorm1d/2d/3d)`", "true")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_instances_of_torchs_classes(rank: int) -> None:
    layer = OURS[rank](3)
    for other, kind in TORCHS.items():
        assert isinstance(layer, kind) == (rank == other)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert isinstance(bn.BatchNormLinear(3, 2).norm, nn.modules.batchnorm._BatchNorm)


def reset(m: nn.Module) -> None:
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.constant_(m.weight, 0.25)
        m.eval()
        m.requires_grad_(False)


@way(WHERE, "loops that freeze, initialize or sort parameters by layer type", "find it")
def test_a_loop_over_types() -> None:
    ours, torchs = pair("relu")
    for net in (ours, torchs):
        net.apply(reset)
    assert [p.requires_grad for p in ours.parameters()] == [False, False]
    assert not ours[0].training
    same(ours(X), torchs(X))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: through_file(layer),
    "share_memory": lambda layer: layer.share_memory(),
    "double and back": lambda layer: layer.double().to(torch.float64),
    "channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "requires_grad_": lambda layer: layer.requires_grad_(True),
}


def through_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@way(WHERE, "`deepcopy`, `copy`, `pickle`, `torch.save`, `share_memory`", "the copy trains as the original")
@both_modes
@activations
@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        other = COPIES[how](layer)
        return step(other, X, DY), dict(other.state_dict())

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`torch.save` of a state dict, `weights_only=True`", "loads into torch's layer and back")
def test_a_state_dict_through_a_file() -> None:
    ours, torchs = pair("relu")
    ours(X)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    torchs.load_state_dict(torch.load(buffer, weights_only=True))
    same(dict(torchs.state_dict()), dict(ours.state_dict()))


@way(WHERE, "`to_empty`, made on meta, `load_state_dict(assign=True)`", "work")
@both_modes
@in_a_fork
def test_made_on_meta(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        state = copy.deepcopy(dict(layer.state_dict()))
        empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        empty.load_state_dict(state)
        assigned = copy.deepcopy(layer).to("meta")
        assigned.load_state_dict(state, assign=True)
        return [step(net, X, DY) for net in (empty, assigned)], dict(empty.state_dict()), dict(assigned.state_dict())

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "`torch.utils.swap_tensors` of parameters, `set_swap_module_params_on_conversion`", "work")
@both_modes
@in_a_fork
def test_swapped_tensors(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        other = nn.Parameter(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        step(layer, X, DY)
        torch.utils.swap_tensors(layer[0].weight, other)  # type: ignore[index]
        first = step(layer, X, DY)
        torch.__future__.set_swap_module_params_on_conversion(True)
        return first, step(layer.float().double(), X, DY)

    agree(scenario, "relu", "dx", training=training)


@way(WHERE, "one weight tied between two layers", "works")
@both_modes
def test_one_weight_for_two_layers(training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        second = copy.deepcopy(layer)
        second[0].weight = layer[0].weight  # type: ignore[index]
        return step(nn.Sequential(layer, second), X, DY)

    agree(scenario, "relu", "dx", training=training)


# These read the attributes of a layer that they take for torch's; what it does beyond them they cannot see.
READERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convert_sync_batchnorm": lambda norm: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0],
    "fuse_conv_bn_eval": lambda norm: nn.utils.fusion.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).double().eval(), norm),
    "to_mkldnn": lambda norm: mkldnn.to_mkldnn(nn.Sequential(norm.float()))[0],
}


@way(WHERE, "`convert_sync_batchnorm`, `fuse_conv_bn_eval`, `to_mkldnn` of a layer with an activation",
     "an error, or the docstring says that the activation is lost and names the right way")  # fmt: skip
@pytest.mark.parametrize("tool", READERS)
@in_a_fork
def test_an_activation_is_not_lost_without_a_word(tool: str) -> None:
    norm = pair("relu", training=False)[0][0]
    try:
        READERS[tool](norm)
    except BatchNormError:
        return
    said = bn.BatchNorm.__doc__ or ""
    assert tool in said
    assert "activation" in said[max(0, said.index(tool) - 600) : said.index(tool) + 600]


@way(WHERE, "`convert_sync_batchnorm` of a layer without an activation", "works")
@in_a_fork
def test_a_bare_layer_becomes_torchs_sync_layer() -> None:
    ours, torchs = (nn.SyncBatchNorm.convert_sync_batchnorm(net) for net in pair())
    assert type(ours[0]) is nn.SyncBatchNorm
    same(dict(ours.state_dict()), dict(torchs.state_dict()))


@way(WHERE, "`convert_sync_batchnorm` and `recalibrate` of `BatchNormLinear`", "work: its norm is called as a module")
@in_a_fork
def test_the_block_after_conversion() -> None:
    block = bn.BatchNormLinear(3, 2, dtype=torch.float64)
    block(data(8, 3))
    twin = copy.deepcopy(block).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).eval()
    x = data(6, 3, seed=4)
    same(converted(x).detach(), twin(x).detach())


@way(WHERE, "`convert_sync_batchnorm` and `recalibrate` of `BatchNormLinear`", "work: its norm is called as a module")
def test_the_block_is_recalibrated() -> None:
    block = bn.BatchNormLinear(3, 2, dtype=torch.float64)
    batches = [data(8, 3, seed=s) for s in range(3)]
    found = bn.recalibrate(block, batches)
    assert [layer.uses for layer in found.layers.values()] == [3]
    assert [layer.count for layer in found.layers.values()] == [24]
    every = torch.cat(batches)
    same(block.norm.running_mean, every.mean(0), "dx")
    same(block.norm.running_var, every.var(0), "dx")


@way(WHERE, "hooks on the norm of `BatchNormLinear`", "run")
def test_hooks_inside_the_block() -> None:
    block = bn.BatchNormLinear(3, 2, dtype=torch.float64)
    calls: list[str] = []
    block.norm.register_forward_hook(lambda *_: calls.append("forward"))
    block(data(8, 3))
    block(data(1, 3), inference=True)
    assert calls == ["forward", "forward"]
    assert block.training
    assert block.norm.training
