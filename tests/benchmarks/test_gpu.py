"""What `make bench-gpu` does apart from timing a GPU; the CPU stands in for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Case, Row


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(call: Callable[[], Any], flush: torch.Tensor) -> float:
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "timed", timed)


def test_without_a_gpu_it_says_so_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "bench-gpu: skipped, no GPU that PyTorch can use here. Nothing was measured.\n"


def test_resnet50_has_53_layers() -> None:
    assert sum(layers for _, _, layers in gpu.RESNET50) == 53
    network = gpu.resnet50("fused")
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in network.modules()) == 53
    shapes: dict[tuple[int, int], int] = {}
    for module in network.modules():
        if isinstance(module, gpu.Norm):
            module.register_forward_hook(
                lambda m, args, y: shapes.update({y.shape[1:3]: shapes.get(y.shape[1:3], 0) + 1})
            )
    with torch.device("meta"):
        network.to("meta").eval()(torch.empty(1, 3, 224, 224))
    assert {(c, side): n for c, side, n in gpu.RESNET50} == {tuple(k): n for k, n in shapes.items()}


@pytest.mark.parametrize("mode", list(gpu.PASSES))
@pytest.mark.parametrize("extra", ["plain", "relu", "residual+relu"])
def test_a_case_is_measured(on_the_cpu: None, mode: str, extra: str) -> None:
    case = Case((4, 3, 6, 5), "bfloat16", True, mode, extra, "own")
    row = gpu.measure(case, 2, torch.empty(1))
    assert row.wrong == []
    assert set(row.times) == {"ours", "torch", "copy"}
    assert row.percent_of_copy is not None
    assert "% of copy" in gpu.line(row)


def test_a_wrong_result_has_no_speed(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu.Rival.forward

    def off(self: gpu.Rival, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return honest(self, x, residual) * (1.1 if self.ours else 1.0)

    monkeypatch.setattr(gpu.Rival, "forward", off)
    row = gpu.measure(Case((4, 3, 6, 5), "float32", False, "forward", "relu", "own"), 2, torch.empty(1))
    assert row.wrong == ["ours"]
    assert set(row.times) == {"torch", "copy"}
    assert row.percent_of_copy is None
    assert gpu.line(row).endswith("WRONG: no speed is reported")
    assert gpu.summary([row]) == []


def test_the_summary_weighs_layers_and_names_the_worst() -> None:
    rows = [
        Row(Case((1, 2), family="f", layers=3), {"ours": 1.0, "torch": 4.0, "copy": 0.4}, percent_of_copy=50.0),
        Row(Case((1, 3), family="f", layers=1), {"ours": 2.0, "torch": 2.0, "copy": 0.4}, percent_of_copy=100.0),
    ]
    (found,) = gpu.summary(rows)
    assert found["layers"] == 4
    assert found["ms"] == 5.0
    assert found["times the floor"] == pytest.approx(5.0 / 3.5)
    assert found["torch"]["geometric mean"] == pytest.approx(2.0)
    assert found["torch"]["worst"] == 1.0
    assert found["torch"]["worst case"].startswith("1x3 ")
    assert found["torch"]["whole"] == pytest.approx(14.0 / 5.0)


def test_the_fewest_bytes_of_a_case() -> None:
    size = 4 * 3 * 2
    assert Case((4, 3), "bfloat16", False, "inference", "plain").bytes == 2 * size
    assert Case((4, 3), "bfloat16", False, "forward+backward", "residual+relu").bytes == 7 * size


def test_networks_agree(on_the_cpu: None) -> None:
    """Fused layers compute what the plain ones do."""
    torch.manual_seed(0)
    blocks = [
        gpu.Bottleneck(lambda c, relu, kind=kind: gpu.Norm(kind, c, relu), 8, 4, 2)
        for kind in ("torch", "ours", "fused")
    ]
    x = torch.randn(2, 8, 6, 6)
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
        torch.testing.assert_close(block(x), blocks[0](x), rtol=1e-4, atol=1e-5)
