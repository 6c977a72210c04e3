"""docs/where_it_runs.md says what the tests say."""

from __future__ import annotations

import ast

from ways import table


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run: python tests/ways/table.py"


def test_every_way_has_one_outcome() -> None:
    for where, ways in table.rows().items():
        names = [way for way, _ in ways]
        assert len(names) == len(set(names)), where


def test_every_test_file_has_rows() -> None:
    rowless = {"test_table.py"}
    for path in table.HERE.glob("test_*.py"):
        marks = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "way"
        ]
        assert bool(marks) != (path.name in rowless), path.name
