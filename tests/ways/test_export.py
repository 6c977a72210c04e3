"""``torch.export``: a graph of standard operators in which runtimes recognize batch normalization."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import batchnorm as bn
from ways.common import ACTIVATIONS, MORE, activations, agree, alone, both_modes, data, pair, same

way = pytest.mark.way
WHERE = "torch.export"
X, OTHER, LONGER = data(), data(seed=2), data(9, 3, 5, 2, seed=4)
exports = pytest.mark.parametrize(
    ("dynamic", "strict"),
    [(True, False), (False, True), pytest.param(False, False, marks=MORE), pytest.param(True, True, marks=MORE)],
)


def exported(layer: nn.Module, *, dynamic: bool = False, strict: bool = False) -> ExportedProgram:
    """Exported from a copy: the program's state is its own."""
    shapes = ({0: Dim("batch", min=2)},) if dynamic else None
    return torch.export.export(copy.deepcopy(layer), (X,), dynamic_shapes=shapes, strict=strict)


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@way(WHERE, "eval, static and dynamic batch, strict or not", "works: `aten.batch_norm`, then the activation's operator")
@pytest.mark.parametrize(
    "activation", [*ACTIVATIONS, *(pytest.param(a, marks=MORE) for a in ("silu", "sigmoid", "tanh"))]
)
@exports
def test_eval_is_standard_operators(dynamic: bool, strict: bool, activation: str | None) -> None:
    ours, torchs = pair(activation, training=False)
    programs = [exported(layer[0], dynamic=dynamic, strict=strict) for layer in (ours, torchs)]
    names, torch_names = map(operators, programs)
    assert names[: len(torch_names)] == torch_names == ["aten.batch_norm.default"]
    assert all(name.startswith("aten.") for name in names), names
    assert len(names) == 1 + (activation is not None)
    for x in (OTHER, LONGER) if dynamic else (OTHER,):
        same(programs[0].module()(x).detach(), torchs(x).detach())


@way(WHERE, "training, static and dynamic batch, strict or not", "works; running statistics are updated")
@activations
@exports
def test_training(dynamic: bool, strict: bool, activation: str | None) -> None:
    def scenario(layer: nn.Module) -> Any:
        module = exported(layer, dynamic=dynamic, strict=strict).module()
        results = [module(x).detach() for x in ((OTHER, LONGER) if dynamic else (OTHER,))]
        return results, dict(sorted(module.state_dict().items()))

    agree(scenario, activation)


@way(WHERE, "training", "its graph is `aten`'s")
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_training_is_standard_operators(options: dict[str, Any]) -> None:
    program = exported(pair("relu", **options)[0])
    assert all(name.startswith("aten.") for name in operators(program)), operators(program)


@way(WHERE, "saved, and loaded in a process that never imports `batchnorm`", "works")
@both_modes
def test_loaded_where_batchnorm_is_not_imported(training: bool, tmp_path: Path) -> None:
    ours, torchs = pair("relu", training=training)
    torch.export.save(exported(ours, dynamic=True), tmp_path / "model.pt2")
    state = {name: t.clone() for name, t in torchs.state_dict().items()}
    y = torchs(LONGER).detach()
    torch.save((LONGER, y, state, torchs.state_dict()), tmp_path / "data.pt")
    code = f"""
    x, y, before, after = torch.load({str(tmp_path / "data.pt")!r})
    module = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
    for name, t in module.state_dict().items():
        torch.testing.assert_close(t, before[name])
    torch.testing.assert_close(module(x).detach(), y, rtol=1e-12, atol=1e-12)
    for name, t in module.state_dict().items():
        torch.testing.assert_close(t, after[name], rtol=1e-12, atol=1e-12)
    assert "batchnorm" not in sys.modules
    """
    alone(code, library=False)


@way(WHERE, "`run_decompositions()` down to core operators", "works, as torch's")
@activations
@both_modes
def test_core_operators(training: bool, activation: str | None) -> None:
    ours, torchs = pair(activation, training=training)
    programs = [exported(layer).run_decompositions() for layer in (ours, torchs)]
    names = [operators(program) for program in programs]
    assert names[0] == names[1]
    same(programs[0].module()(OTHER).detach(), torchs(OTHER).detach())


@way(WHERE, "with `residual=`, `mask=`, `sample_weight=`", "works; the graph is `aten`'s")
@both_modes
def test_what_torch_has_no_argument_for(training: bool) -> None:
    layer = pair("relu", training=training)[0][0]
    given = {
        "residual": data(seed=6),
        "mask": torch.arange(X[:, :1].numel()).view_as(X[:, :1]) % 3 != 0,
        "sample_weight": torch.linspace(0.5, 2, len(X), dtype=torch.float64),
    }
    for chosen in (["residual"], ["mask"], ["residual", "mask", "sample_weight"]):
        keywords = {name: given[name] for name in chosen}
        program = torch.export.export(copy.deepcopy(layer), (X,), keywords)
        assert all(name.startswith("aten.") for name in operators(program)), operators(program)
        same(program.module()(OTHER, **keywords).detach(), copy.deepcopy(layer)(OTHER, **keywords).detach())


@way(WHERE, "`BatchNormLinear`", "works; `aten.batch_norm` and `aten.linear`")
def test_the_block() -> None:
    block = bn.BatchNormLinear(3, 2, dtype=torch.float64).eval()
    x = data(6, 3)
    program = torch.export.export(block, (x,))
    assert {"aten.batch_norm.default", "aten.linear.default"} <= set(operators(program))
    assert all(name.startswith("aten.") for name in operators(program)), operators(program)
    same(program.module()(x).detach(), block(x).detach())


@way(WHERE, "of fake tensors (`FakeTensorMode`)", "works")
@pytest.mark.parametrize("training", [True, False])
def test_exported_without_data(training: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        names = []
        for layer in (bn.BatchNorm2d(3), nn.BatchNorm2d(3)):
            program = torch.export.export(layer.train(training), (torch.empty(4, 3, 5, 2),))
            names.append(operators(program))
    assert names[0] == names[1]
