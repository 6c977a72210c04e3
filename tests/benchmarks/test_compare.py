"""Two checkouts against each other: the figures of the table, and one run of this checkout against itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare

ROOT = Path(__file__).parents[2]
CASE = compare.Case((4, 3), "matrix", "float32", "forward", "plain")


def result(*ratios: float) -> compare.Result:
    return compare.Result(CASE, 1, [2.0] * len(ratios), [2.0 * r for r in ratios])


def test_ratio_and_spread_are_the_middle_of_the_rounds() -> None:
    found = result(1.0, 3.0, 1.1, 1.2, 0.1)
    assert found.ratio == pytest.approx(1.1)
    assert found.spread == pytest.approx((1.0, 1.2))


@pytest.mark.parametrize(("ratios", "slower"), [((1.06, 1.06), True), ((1.04, 1.3), False), ((0.9, 0.9), False)])
def test_a_case_is_slower_only_beyond_its_spread(ratios: tuple[float, ...], slower: bool) -> None:
    assert result(*ratios * 3).slower is slower


def test_the_table_names_families_and_the_worst_case() -> None:
    text = compare.table([result(2.0, 2.0), result(0.5, 0.5)], {"cold": {"old": 3.0, "new": 2.0}})
    assert "matrix float32 forward plain, 1 thr.: geometric mean 1.000" in text
    assert "all 2 cases: geometric mean 1.000; 1 slower" in text
    assert "worst: 2.000 4x3 matrix float32 forward plain" in text
    assert "first step, cold: 3.0 s OLD, 2.0 s NEW" in text


def test_cases_are_distinct_and_cover_every_mode() -> None:
    found = compare.cases()
    assert len(set(found)) == len(found)
    assert {case.mode for case in found} == set(compare.MODES)


def test_a_checkout_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compared.json"
    words = ["60x100", "inference plain"]
    code = compare.main(
        [str(ROOT), str(ROOT), "--filter", *words, "--rounds", "2", "--seconds", "0.01", "--no-first-step",
         "--json", str(path)]
    )  # fmt: skip
    assert code == 0
    assert "60x100" in capsys.readouterr().out
    (case,) = json.loads(path.read_text())["cases"]
    assert len(case["old"]) == len(case["new"]) == 2
    assert min(case["old"] + case["new"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([".", "."], "expected a checkout with src/batchnorm, got ."),
        ([".", ".", "--filter", "no such case", "--no-first-step"], "no case has no such case in its name"),
        ([".", ".", "--cpu-time", "--threads", "2"], "--cpu-time counts one thread"),
    ],
)
def test_what_cannot_be_compared(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src" / "batchnorm").mkdir(parents=True)
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    with pytest.raises(compare.CompareError, match="ended with exit code 3"):
        compare.Worker(tmp_path)


def test_a_checkout_that_imports_another_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src" / "batchnorm").mkdir(parents=True)
    (tmp_path / "worker.py").write_text(f"print({json.dumps(json.dumps({'package': sys.executable}))}, flush=True)")
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    with pytest.raises(compare.CompareError, match=r"expected .* to import its own package"):
        compare.Worker(tmp_path)
