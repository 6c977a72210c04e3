"""``warmup`` compiles what a model, or inputs of some dtypes, will need, and refuses the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app
from batchnorm.errors import DtypeError
from batchnorm.kernels.cpu import plan


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool]]:
    """What would be compiled, which takes a minute."""
    found: list[tuple[torch.dtype, bool]] = []

    def note(dtype: torch.dtype, masked: bool) -> int:
        found.append((dtype, masked))
        return 19

    monkeypatch.setattr(plan, "compile_all", note)
    return found


def test_of_dtypes(compiled: list[tuple[torch.dtype, bool]]) -> None:
    assert bn.warmup() == 19
    assert bn.warmup([torch.bfloat16, torch.float16], masks=True) == 38
    assert compiled == [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]


def test_of_a_model(compiled: list[tuple[torch.dtype, bool]]) -> None:
    model = nn.Sequential(
        nn.Linear(2, 3, dtype=torch.float16),
        nn.Sequential(bn.BatchNorm1d(3).double(), bn.BatchNorm2d(3, affine=False)),
        nn.BatchNorm1d(3, dtype=torch.bfloat16),
        bn.BatchNormLinear(3, 4).double(),
    )
    assert bn.warmup(model) == 3 * 19
    assert {dtype for dtype, _ in compiled} == {torch.float64, torch.float32, torch.bfloat16}
    assert bn.warmup(nn.Linear(2, 3)) == 0


def test_the_kernels_of_every_family_are_listed() -> None:
    """What ``compile_all`` walks through is not empty, and grows with masks."""
    families = [plan.inside, plan.outside_long, plan.outside_short, plan.outside_masked]
    for family in families:
        names = {name for name, value in vars(family).items() if name.isupper() and isinstance(value, dict)}
        assert {"FORWARD", "MOMENTS", "NORMALIZE", "BACKWARD"} <= names


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(DtypeError, match=r"dtypes among .*float64"):
        bn.warmup([torch.int64])
    with pytest.raises(DtypeError, match="complex64"):
        bn.warmup(nn.BatchNorm1d(3, dtype=torch.complex64))


def test_from_the_command_line(compiled: list[tuple[torch.dtype, bool]]) -> None:
    done = CliRunner().invoke(app, ["warmup", "--dtype", "bfloat16", "--masks"])
    assert done.exit_code == 0
    assert done.stdout == "19 kernels are ready\n"
    assert compiled == [(torch.bfloat16, True)]
    wrong = CliRunner().invoke(app, ["warmup", "--dtype", "float8"])
    assert isinstance(wrong.exception, DtypeError)
    assert "float8" in str(wrong.exception)
