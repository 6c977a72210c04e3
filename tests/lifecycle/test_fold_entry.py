"""What folding leaves as it was, what it raises, and what it reports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, MismatchError
from folding import Net, assert_folded_alike, fold, randomized


def everything(model: nn.Module, *inputs: Tensor) -> Any:
    tensors = [*model.state_dict().items(), *((str(i), t) for i, t in enumerate(inputs))]
    return (
        {name: t.clone() for name, t in tensors},
        [
            (name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        torch.get_rng_state(),
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[1:3] == after[1:3]
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
    assert torch.equal(before[3], after[3])


class Rude(nn.Module):
    """It changes its input and a buffer, draws random numbers, and may fail at its n-th run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("runs", torch.zeros(()))

    fail: tuple[int, BaseException] | None = None
    total = 0

    def forward(self, x: Tensor) -> Tensor:
        Rude.total += 1
        self.runs += 1
        x.add_(1)
        y: Tensor = self.norm(self.conv(x)) + torch.rand(())
        if Rude.fail is not None and Rude.total == Rude.fail[0]:
            raise Rude.fail[1]
        return y


def test_the_original_its_input_and_the_generator_are_as_they_were() -> None:
    model, x = randomized(Rude()).train(), torch.randn(2, 3, 4, 4)
    before = everything(model, x)
    folded = bn.fold(model, x)
    assert_same(before, everything(model, x))
    ours, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (folded, model))
    assert not ours & theirs
    assert float(folded.runs) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")], ids=lambda e: type(e).__name__)
def test_after_an_error_or_ctrl_c_at_any_moment_all_is_as_it_was(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in (1, 2, 3):
        model, x = randomized(Rude()).train(), torch.randn(2, 3, 4, 4)
        before = everything(model, x)
        monkeypatch.setattr(Rude, "total", 0)
        monkeypatch.setattr(Rude, "fail", (moment, error))
        if isinstance(error, RuntimeError) and moment == 2:
            fold(model, x)  # a model that cannot be run in float64 is compared in its own dtype
        else:
            with pytest.raises((type(error), MismatchError)):
                fold(model, x)
        assert_same(before, everything(model, x))


class Nosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) * self.norm.num_features
        return y


ERRORS: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "no norm": (
        nn.Conv2d(3, 3, 1), {},
        "fold: expected a model with batch norm, got one without. There is nothing to fold.",
    ),
    "keep": (
        Net(), {"keep": ["norm", "nrom"]},
        "fold: expected names of batch norms in keep, got ['nrom']. model.named_modules() gives the names.",
    ),
    "lazy": (
        nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)), {},
        "fold: expected initialized layers, got a lazy one, 0. Run the model once.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_folded_at_all_is_an_error(case: str) -> None:
    model, options, message = ERRORS[case]
    with pytest.raises(ArgumentError) as caught:
        fold(model, torch.randn(2, 3, 4, 4), **options)
    assert str(caught.value) == message


def test_a_model_that_looks_into_its_norm_is_named() -> None:
    model, x = Nosy(), torch.randn(2, 3, 4, 4)
    with pytest.raises(MismatchError) as caught:
        fold(model, x)
    assert str(caught.value) == (
        "fold: expected a folded model that runs, got AttributeError: 'Identity' object has no attribute "
        "'num_features'. The model looks into a norm that was replaced: name it in keep."
    )
    assert_folded_alike(model, fold(model, x, keep=["norm"]), x)


def test_a_result_that_differs_is_an_error_and_names_the_norm() -> None:
    """A way that depends on the model's own weights is one that no trace can foresee."""

    def way(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.norm(m.conv(x))
        return y + float(m.training_marker)

    class Sly(Net):
        @property
        def training_marker(self) -> bool:
            return isinstance(self.norm, nn.Identity)

    model, x = randomized(Sly(way)), torch.randn(2, 3, 4, 4)
    with pytest.raises(MismatchError) as caught:
        fold(model, x)
    message = str(caught.value)
    assert message.startswith("fold: expected the same outputs within 1.5e-08 in float64, got ")
    assert message.endswith(
        " of the largest output, first seen at the norm none of them. "
        "Name the norm in keep, and report this with the model."
    )


def test_the_report_measures_and_reads_well() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh()))
    model.append(nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(2, 3, 8, 8)
    report = bn.fold(model, x).fold_report
    assert report.folded == 1
    assert list(report.errors) == ["float32", "bfloat16"]
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.1)):
        errors = report.errors[dtype]
        assert 0 < errors.outputs < bound
        assert 0 < errors.unfolded < bound and 0 < errors.folded < bound
        assert list(errors.layers) == ["1", "3"]
        assert all(0 < error < bound for error in errors.layers.values())
    speed = report.speed
    assert speed.turns >= 5
    assert speed.before > 0 and speed.after > 0 and speed.ratio > 0
    lines = str(report).splitlines()
    assert lines[0] == "1 of 3 batch norms folded into another layer"
    assert lines[1].split() == ["norm", "kind", "went", "float32", "bfloat16"]
    assert lines[2].startswith("1     BatchNorm2d  into 0, before it")
    assert lines[3].startswith("3     BatchNorm2d  left as scale and shift")
    assert lines[4:8] == [
        "left as scale and shift, since no neighbour could take them:",
        "  3: its input comes from aten.relu in 2; its output goes to aten.tanh in 4",
        "left as they were:",
        "  5: it has no running statistics (track_running_stats=False), so eval mode normalizes by the batch too",
    ]
    assert lines[8].startswith("float32: outputs differ by ")
    assert lines[-1].startswith("one forward: ")
    assert all(len(line) <= 120 for line in lines)


def test_a_layer_beside_the_norm_is_named_shortly_in_the_report() -> None:
    model, x = randomized(nn.Sequential(Net(), nn.BatchNorm2d(3))), torch.randn(2, 3, 4, 4)
    lines = str(fold(model, x).fold_report).splitlines()
    assert lines[2].split()[:4] == ["0.norm", "BatchNorm2d", "into", ".conv,"]
    assert lines[3].split()[:4] == ["1", "BatchNorm2d", "into", "0.conv,"]


def test_a_model_that_does_not_run_in_bfloat16_says_so() -> None:
    model = randomized(Net(lambda m, x: m.norm(m.conv(x)) @ torch.eye(4)))
    report = bn.fold(model, torch.randn(2, 3, 4, 4)).fold_report
    assert list(report.errors) == ["float32"]
    assert set(report.not_run) == {"float64", "bfloat16"}
    assert report.not_run["bfloat16"].startswith("the model cannot be run in it (RuntimeError: ")
    assert copy.deepcopy(report).errors == report.errors
