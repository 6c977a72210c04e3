"""Means, worst cases, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from batchnorm.bench import results
from batchnorm.bench.results import Group, Report, Row
from bench_rows import failed, row


def test_a_group_has_the_geometric_mean_and_the_worst_with_its_shape() -> None:
    rows = [row((1, 2), 1.0, 8.0, 0.5), row((3, 4), 1.0, 0.5, 0.25), row((5, 6), 1.0, 2.0, 1.0)]
    (group,) = results.groups(rows)
    assert group["cases"] == 3
    assert group["times_faster"]["torch"]["mean"] == pytest.approx(2.0)
    assert (group["times_faster"]["torch"]["worst"], group["times_faster"]["torch"]["shape"]) == (0.5, [3, 4])
    # Of copies fewer are better: the worst is the largest.
    assert group["times_copy"] is not None
    assert group["times_copy"]["mean"] == pytest.approx(2.0)
    assert (group["times_copy"]["worst"], group["times_copy"]["shape"]) == (4.0, [3, 4])
    assert group["times_clone"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("family", "other"),
        ("dtype", "bfloat16"),
        ("layout", "channels_last"),
        ("mode", "inference"),
        ("extra", "relu"),
        ("threads", 2),
    ],
)
def test_rows_that_differ_in_anything_but_shape_are_not_mixed(key: str, value: str | int) -> None:
    rows = [row((1, 2), 1.0, 8.0, 0.5), row((1, 2), 1.0, 2.0, 0.5, **{key: value})]
    assert [group["times_faster"]["torch"]["mean"] for group in results.groups(rows)] == pytest.approx([8.0, 2.0])


def test_a_wrong_row_is_counted_and_has_no_part_in_the_mean() -> None:
    bad = row((3, 4), 1.0, 1.0, 1.0, peers={"ours": failed("wrong", "y is off")}, times_faster={}, times_copy={})
    (group,) = results.groups([row((1, 2), 1.0, 8.0, 0.5), bad])
    assert (group["cases"], group["wrong"], group["times_faster"]["torch"]["cases"]) == (2, 1, 1)
    assert group["times_faster"]["torch"]["mean"] == pytest.approx(8.0)
    assert results.wrong([bad]) == [(bad, "ours", "y is off")]


def test_the_lost_come_worst_first() -> None:
    rows = [row((1, 2), 1.2, 1.0, 1.0), row((3, 4), 1.0, 1.0, 1.0), row((5, 6), 3.0, 1.0, 1.0)]
    assert [each["shape"] for each in results.lost(rows)] == [[5, 6], [1, 2]]


def test_reasons_for_skipping_are_counted() -> None:
    absent = row((1, 2), 1.0, 1.0, 1.0)
    absent["peers"]["onednn"] = failed("skipped", "float16")
    other = row((3, 4), 1.0, 1.0, 1.0)
    other["peers"]["onednn"] = failed("skipped", "float16")
    assert results.skipped([absent, other]) == {"onednn": {"float16": 2}}


def report(rows: list[Row]) -> Report:
    return Report(
        schema=results.SCHEMA,
        registry="own",
        complete=True,
        left_out=[],
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        plan={},
        machine={},
        rows=rows,
        groups=results.groups(rows),
        resnet50=[],
    )


def test_the_file_holds_what_the_types_say(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bench.json"
    results.write(path, report([row((1, 2), 1.0, 8.0, 0.5)]))
    read = json.loads(path.read_text(encoding="utf-8"))
    assert set(read) == set(get_type_hints(Report))
    assert set(read["rows"][0]) == set(get_type_hints(Row))
    assert set(read["groups"][0]) == set(get_type_hints(Group))


def test_a_number_that_is_not_finite_does_not_reach_a_file(tmp_path: Path) -> None:
    bad = row((1, 2), 1.0, 8.0, 0.5, times_clone={"ours": float("nan")})
    with pytest.raises(ValueError):
        results.write(tmp_path / "bench.json", report([bad]))
    assert list(tmp_path.iterdir()) == []
