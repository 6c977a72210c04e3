"""Writes docs/where_it_runs.md: each way of running, what comes of it, and the test that says so.

``python tests/ways/table.py`` reads the marks ``@pytest.mark.way(where, way, outcome)`` of the tests beside it,
without running them; ``--check`` only says whether the page is up to date.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "where_it_runs.md"
HEAD = """\
# Where it runs

Every way of running a layer that PyTorch has and that we know of, and what comes of it. Each row is held by a test;
this page is written from the tests by `python tests/ways/table.py`, and a test fails when it is out of date.

Compiled kernels run on plain strided tensors with memory of their own. Everything else, from tensor subclasses to
tracers and transforms, goes through ordinary PyTorch operations; `batchnorm.explain` says which.
"""


def rows() -> dict[str, dict[tuple[str, str], list[str]]]:
    """By place: way and outcome, with the files of the tests that hold them; in the order of files and lines."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _constants(tree)
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "way":
                    where, way, outcome = (_text(argument, names) for argument in mark.args)
                    files = found.setdefault(where, {}).setdefault((way, outcome), [])
                    if path.name not in files:
                        files.append(path.name)
    return found


def _constants(tree: ast.Module) -> dict[str, object]:
    """The module's ``NAME = "..."`` and ``A, B = "...", "..."``."""
    names: dict[str, object] = {}
    for node in (node for node in tree.body if isinstance(node, ast.Assign)):
        pairs = [(node.targets[0], node.value)]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        for target, value in pairs:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                names[target.id] = value.value
    return names


def _text(node: ast.expr, names: dict[str, object]) -> str:
    value = names[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
    if not isinstance(value, str):
        raise TypeError(f"a mark takes strings, got {value!r}")
    return value.replace("|", "\\|")


def page() -> str:
    parts = [HEAD]
    for where, ways in rows().items():
        title = where if where.startswith("torch") else where[0].upper() + where[1:]
        parts.append(f"\n## {title}\n\n| way | outcome | test |\n| --- | --- | --- |\n")
        for (way, outcome), files in ways.items():
            links = ", ".join(f"[{name[5:-3]}](../tests/ways/{name})" for name in files)
            parts.append(f"| {way} | {outcome} | {links} |\n")
    return "".join(parts)


def main() -> int:
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if "--check" in sys.argv[1:]:
        return int(written != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
