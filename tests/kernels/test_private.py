"""Private names of PyTorch: the table has all that the package uses, and an import without one names it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import batchnorm
from batchnorm.kernels.private import NAMES, require_private

PACKAGE = Path(batchnorm.__file__).parent
# Base classes that everyone's isinstance needs, and names of operators, which are in every exported program.
KEPT_BY_TORCH = ("torch.nn.modules.", "torch.ops.")
# Imported on first use, which is rare: an import of it with the package would take time in every program.
ON_FIRST_USE = {"torch.distributed._functional_collectives"}

# Take one name away, import the package, say what came of it, and put the name back.
WITHOUT_EACH = """
import sys
from importlib import import_module
import torch
for name in sys.argv[1:]:
    place, _, attribute = name.rpartition(".")
    module = import_module(place)
    value = getattr(module, attribute)
    delattr(module, attribute)
    try:
        import batchnorm
        print("imported")
    except ImportError as error:
        print(error)
    setattr(module, attribute, value)
    for each in [each for each in sys.modules if each.partition(".")[0] == "batchnorm"]:
        del sys.modules[each]
import batchnorm
"""


def used(source: str) -> Iterator[str]:
    """The private names of torch in a file, in full: ``torch.….name`` with a part that begins with an underscore.

    >>> sorted(used("from torch.overrides import _pop_mode, wrap_torch_function\\ntorch._C._a(), torch.nn.Linear"))
    ['torch._C._a', 'torch.overrides._pop_mode']
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found |= {f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found.add(f"torch.autograd.{name}" if name.startswith("forward_ad._") else name)
    for name in found:
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        if (
            name.startswith("torch.")
            and not name.startswith(KEPT_BY_TORCH)
            and private
            and not any(other.startswith(f"{name}.") for other in found)
        ):
            yield name


def test_the_table_is_what_the_package_uses() -> None:
    names = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name != "private.py":
            # What is in a private module or class stands in the table as that module or class.
            names |= {_without_member(name) for name in used(file.read_text(encoding="utf-8"))}
    assert names == set(NAMES) | ON_FIRST_USE


def _without_member(name: str) -> str:
    head, _, last = name.rpartition(".")
    return name if last.startswith("_") or head not in NAMES else head


def test_this_torch_has_them() -> None:
    require_private()


def test_an_import_without_one_names_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_EACH, *NAMES], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"batchnorm: expected a PyTorch with {name}, got torch {torch.__version__} without it. "
        "Install torch 2.6 to 2.13, or a newer batchnorm."
        for name in NAMES
    ]
