"""The oldest versions that CI installs are those of pyproject.toml."""

from __future__ import annotations

import pytest

from lower_bounds import PYPROJECT, lower_bounds


def test_each_dependency_of_users_has_one() -> None:
    found = lower_bounds(PYPROJECT.read_text(encoding="utf-8"))
    names = [line.split("==")[0] for line in found]
    assert names == ["torch", "numpy", "numba", "typer", "rich", "matplotlib", "jinja2", "scikit-learn", "pillow"]
    assert all(line.count("==") == 1 for line in found)


def test_a_file_without_the_lists_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected dependencies and tools"):
        lower_bounds("[project]\n")
