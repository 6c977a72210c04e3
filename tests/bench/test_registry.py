"""The registry of ``make bench-full`` is whole, and the short one is a part of it."""

from __future__ import annotations

import pytest

from batchnorm.bench.cases import EXTRAS, MODES
from benchmarks import registry, run


def test_no_case_stands_twice() -> None:
    cases = registry.everything()
    assert len(cases) == len(set(cases))


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_all_of_resnet50_is_there(batch: int) -> None:
    shapes = {case.shape for case in registry.everything() if case.family == f"resnet50 N={batch}"}
    sides = {(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)}
    assert shapes == {(batch, channels, side, side) for channels, side in sides}


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_all_of_mobilenetv2_is_there(batch: int) -> None:
    shapes = {case.shape for case in registry.everything() if case.family == f"mobilenetv2 N={batch}"}
    sides = {(32, 112), (96, 112), (144, 56), (192, 28), (576, 14), (960, 7), (1280, 7)}
    assert shapes == {(batch, channels, side, side) for channels, side in sides}


def test_matrices_and_extremes_are_there() -> None:
    shapes = {case.shape for case in registry.everything()}
    assert shapes >= {(60, 100), (128, 256), (1024, 1024), (8192, 4096), (65536, 64), (6, 65536)}
    assert any(shape[1:] == (3, 512, 512) for shape in shapes)
    values = {shape[2:] for shape in shapes}
    assert values >= {(1, 1), (7, 7), (197,)}  # 1, 7 × 7 and 197 places
    assert any(shape[1] % 2 and shape[1] > 3 for shape in shapes)  # an odd number of channels
    assert any(len(shape) == 5 for shape in shapes)


def test_every_image_is_measured_in_every_dtype_layout_mode_and_fusion() -> None:
    some = [case for case in registry.everything() if case.shape == (32, 256, 14, 14)]
    assert {(c.dtype, c.layout, c.mode, c.extra) for c in some} == {
        (dtype, layout, mode, extra)
        for dtype in ("float32", "bfloat16", "float16")
        for layout in ("contiguous", "channels_last")
        for mode in MODES
        for extra in EXTRAS
    }


def test_every_case_has_the_rivals_and_the_yardsticks() -> None:
    for entry in registry.full((1, 2)):
        assert set(entry.peers) >= {"torch", "onednn", "copy", "clone", "memmove"}
        assert entry.threads == (1, 2)
    assert any("compile" in entry.peers for entry in registry.full((1,)))


def test_the_short_registry_is_part_of_the_whole() -> None:
    assert {entry.case for entry in registry.short((1, 2))} <= set(registry.everything())


def test_the_short_registry_has_what_is_promised_at_one_and_all_threads() -> None:
    entries = {entry.case: entry for entry in registry.short((1, 2))}
    kind = ("resnet50 N=32", "float32", "contiguous", "plain")
    promised = [
        case
        for case in registry.everything()
        if case.training and (case.family, case.dtype, case.layout, case.extra) == kind
    ]
    assert len(promised) == 18
    for case in promised:
        assert entries[case].threads == (1, 2)
    for name in ("dtype", "layout", "mode", "extra"):
        assert {getattr(case, name) for case in entries} == {getattr(c, name) for c in registry.everything()}


def test_words_pick_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--filter", "60×100", "--filter", "forward+backward", "--threads", "1"]) == 0
    assert capsys.readouterr().out == "matrices: 60×100 float32 contiguous forward+backward\n"


def test_words_that_pick_nothing_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--filter", "nothing"]) == 2
    assert capsys.readouterr().err == "benchmarks: no case has nothing in its name\n"


def test_wrong_threads_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--threads", "none"]) == 2
    assert capsys.readouterr().err == (
        'benchmarks: bench: expected threads from 1 to 1024, or "all", got \'none\'. Give e.g. "1,all".\n'
    )
