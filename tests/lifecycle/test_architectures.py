"""Networks of other packages, converted, trained, joined and reverted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from architectures import ARCHITECTURES, built, images, train
from batchnorm.lifecycle.conversion import Conversion
from tolerances import assert_close, assert_not_worse_than_torch, to_float64


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Any = model(x)
    return result.logits


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
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twenty_steps_of_training_agree(name: str, fuse: bool) -> None:
    theirs = built(name).double()
    ours = copy.deepcopy(theirs)
    ours = bn.convert(ours, fuse=fuse, example_inputs=images().double() if fuse else None)
    expected = train(theirs, 20, seed=1)
    found = train(ours, 20, seed=1)
    assert len(set(expected)) == 20
    # Rounding grows from step to step: 20 steps of 1e-12 each, times the growth of a few of SGD with momentum.
    assert found == pytest.approx(expected, rel=1e-7)
    ours = bn.revert(ours.eval())
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), key


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
