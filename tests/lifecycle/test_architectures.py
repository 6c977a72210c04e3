"""Networks of other packages, converted, trained, joined and reverted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from architectures import ARCHITECTURES, built, images, train
from batchnorm.lifecycle.conversion.report import Conversion
from tolerances import assert_close, assert_not_worse_than_torch, to_float64


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Any = model(x)
    return result.logits


def built_of_ours(model: nn.Module) -> nn.Module:
    """A copy with new layers of ours that were given the old ones' state."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.BatchNorm2d:
            ours = bn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum).eval()
            ours.load_state_dict(layer.state_dict())
            model.set_submodule(name, ours)
    return model


def hooked(model: nn.Module) -> list[Any]:
    return [
        (name, key, list(hooks.items()))
        for name, module in model.named_modules()
        for key, hooks in module.__dict__.items()
        if "hooks" in key and isinstance(hooks, dict) and hooks
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_converting_changes_no_output_beyond_rounding_and_reverting_none_at_all(name: str) -> None:
    model, x = built(name), images()
    for module in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:2]:
        module.register_forward_hook(lambda *args: None)
        module.register_forward_pre_hook(lambda *args: None)
    exact, torchs = logits(copy.deepcopy(model).double(), x.double()), logits(model, x)
    by_hand = built_of_ours(model)
    modules, hooks = list(model.modules()), hooked(model)
    types = [type(m) for m in modules]
    tensors = [*model.parameters(), *model.buffers()]
    reports: list[Conversion] = []
    model = bn.convert(model, report=reports.append)
    assert reports[0].left == ()
    assert len(reports[0].changed) == sum(t is nn.BatchNorm2d for t in types) > 5
    for backend in ("eager", "cpu"):
        with bn.use_backend(backend):
            ours = logits(model, x)
            assert torch.equal(ours, logits(by_hand, x)), "to the bit what a network built of our layers gives"
        assert_not_worse_than_torch(ours, torchs, to_float64(exact), dtype="float32", factor=4.0, what=backend)
    wide = copy.deepcopy(model).double()
    assert_close(logits(wide, x.double()), to_float64(exact), dtype="float64", quantity="y")
    model = bn.revert(model)
    assert torch.equal(logits(model, x), torchs)
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert hooked(model) == hooks


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twenty_steps_of_training_agree_to_what_one_rounding_of_the_weights_does(name: str) -> None:
    """The yardstick is torch's own training from weights moved by one rounding: small batches make it grow fast."""
    model = built(name).double()
    theirs = copy.deepcopy(model)
    expected = train(theirs, 20, seed=1)
    assert len(set(expected)) == 20
    spread, state_spread = [0.0] * 20, 0.0
    for seed in range(2):
        moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in moved.parameters():
                p.mul_(1 + 2.0**-52 * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1))
        spread = [max(pair) for pair in zip(spread, deviations(train(moved, 20, seed=1), expected), strict=True)]
        state_spread = max(state_spread, state_deviation(moved, theirs))
    for fuse in (False, True):
        ours = copy.deepcopy(model)
        ours = bn.convert(ours, fuse=fuse, example_inputs=images().double() if fuse else None)
        found = deviations(train(ours, 20, seed=1), expected)
        assert all(a <= 10 * b + 1e-13 for a, b in zip(found, spread, strict=True)), (found, spread)
        assert state_deviation(bn.revert(ours), theirs) <= 10 * state_spread


def deviations(losses: list[float], expected: list[float]) -> list[float]:
    """The largest relative difference up to each step."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return [max(differences[: k + 1]) for k in range(len(differences))]


def state_deviation(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of any value in the state dict."""
    a, b = model.state_dict(), other.state_dict()
    assert list(a) == list(b)
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("name", ["transformers ResNet", "transformers EfficientNet"])
def test_norms_and_activations_are_joined_and_taken_apart(name: str) -> None:
    model, x = built(name), images()
    torchs, types = logits(model, x), [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    reports: list[Conversion] = []
    model = bn.convert(model, fuse=True, example_inputs={"pixel_values": x}, report=reports.append)
    joined = [fusion for fusion in reports[0].fusions if not fusion.reason]
    assert len(joined) >= 5
    assert {fusion.followed_by for fusion in joined} <= {"relu", "silu"}
    assert list(model.state_dict()) == keys
    exact = logits(copy.deepcopy(model).double(), x.double())
    assert_not_worse_than_torch(logits(model, x), torchs, to_float64(exact), dtype="float32", factor=4.0)
    model = bn.revert(model)
    assert torch.equal(logits(model, x), torchs)
    assert [type(m) for m in model.modules()] == types
