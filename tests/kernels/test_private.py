"""Private functions of PyTorch: all that the package uses are in the table, and an absent one is named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import batchnorm
from batchnorm.kernels.private import NAMES, require_private

PACKAGE = Path(batchnorm.__file__).parent
ROOMS = ("kernels", "autograd", "nn", "functional.py", "checks.py")


def used() -> set[str]:
    """Every ``torch._C.…`` that the source of the rooms names, in full."""
    found = set()
    for room in ROOMS:
        path = PACKAGE / room
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._C."):
                    found.add(ast.unparse(node).removeprefix("torch."))
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def test_the_table_has_all_that_is_used() -> None:
    missing = [name for name in used() if not any(name == n or name.startswith(n + ".") for n in NAMES)]
    assert missing == []


def test_this_torch_has_them() -> None:
    require_private()


def test_an_absent_one_is_named() -> None:
    with pytest.raises(ImportError) as error:
        require_private(("_C._get_tracing_state", "_C._gone"))
    assert str(error.value) == (
        f"batchnorm: expected a PyTorch with torch._C._gone, got torch {torch.__version__} without it. "
        "Install torch 2.6 to 2.13, or a newer batchnorm."
    )
