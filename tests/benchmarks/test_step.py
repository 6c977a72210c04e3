"""The parts of a training step, on a network small enough for a test."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.measure import Samples
from batchnorm.kernels.cpu import plan
from benchmarks import step


class Tiny(nn.Module):
    """A convolution, a layer and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), norm, nn.Linear(4, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return y


def tiny(variant: str) -> nn.Module:
    layers = {
        "without": nn.Identity,
        "parameters": lambda: step.Parameters(4),
        "allocating": lambda: step.Allocating(4),
        "torch": lambda: nn.BatchNorm2d(4),
    }
    torch.manual_seed(0)
    return Tiny(layers.get(variant, lambda: bn.BatchNorm2d(4))())


@pytest.mark.parametrize("threads", [1, 2])
def test_every_variant_is_timed_and_set_against_the_network_without(threads: int) -> None:
    images, labels = step.problem(2, 8)
    before = torch.get_num_threads()
    timed = step.time_steps(threads, 0.5, images, labels, "contiguous", tiny)
    assert torch.get_num_threads() == before
    assert list(timed["variants"]) == list(step.VARIANTS)
    assert timed["rounds"] >= step.LEAST_ROUNDS
    assert timed["variants"]["without"]["cost"] == 0
    assert timed["variants"]["torch"]["of_torch"] == 1
    assert all(of_one["median"] > 0 for of_one in timed["variants"].values())
    lines = step.time_lines(timed)
    assert [line.split()[0] for line in lines[1:]] == list(step.VARIANTS)


def test_networks_that_do_not_compute_the_same_are_not_compared() -> None:
    def other(variant: str) -> nn.Module:
        return Tiny(nn.Identity()) if variant == "ours" else tiny(variant)

    with pytest.raises(SystemExit, match=r"^benchmarks.step: the loss is [\d.]+ with ours, [\d.]+ with torch$"):
        step.steps(*step.problem(2, 8), "contiguous", other)


def test_skipped_kernels_write_nothing_and_run_again_afterwards() -> None:
    layer, x = bn.BatchNorm2d(4), torch.randn(2, 4, 8, 8)
    with step.kernels_skipped():
        layer(x)
    assert layer.running_mean is not None
    assert not layer.running_mean.any()
    layer(x)
    assert layer.running_mean.any()
    assert plan.launch is not step._launch_nothing


def test_only_the_layers_differ_between_variants() -> None:
    def convolutions(model: nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if p.dim() > 1}

    reference = convolutions(step.network("torch"))
    for variant, layers in (("parameters", 53), ("skipped", 53), ("without", 0)):
        model = step.network(variant)
        own = convolutions(model)
        assert [p.shape for p in own.values()] == [p.shape for p in reference.values()]
        assert all(torch.equal(a, b) for a, b in zip(own.values(), reference.values(), strict=True))
        per_channel = [p for p in model.parameters() if p.dim() == 1]
        assert len(per_channel) == 2 * layers + 1  # the head's bias


def test_layers_of_parameters_alone_are_stepped_by_the_optimizer() -> None:
    model = tiny("parameters")
    step.training_step("parameters", model, *step.problem(2, 8))()
    assert model.norm.weight.grad is not None  # type: ignore[union-attr]


def test_costs_are_differences_of_the_same_round() -> None:
    found = step.breakdown(
        {name: Samples(of_one, 1) for name, of_one in {
            "without": (2.0, 4.0, 3.0), "torch": (4.0, 8.0, 6.0), "ours": (2.5, 5.0, 3.75),
        }.items()}
    )  # fmt: skip
    assert found["torch"]["share"] == 0.5
    assert found["ours"]["cost"] == 0.75
    assert found["ours"]["of_torch"] == pytest.approx(0.4)


def test_rounds_end_with_the_time() -> None:
    begun = time.perf_counter()
    found = step.rounds({"a": lambda: time.sleep(0.01), "b": lambda: None}, 0.1, time.perf_counter)
    assert time.perf_counter() - begun < 0.15
    assert step.LEAST_ROUNDS <= len(found["a"].seconds) == len(found["b"].seconds) <= 10


def test_memory_is_that_of_the_process() -> None:
    assert step.memory_lines({"ours": {"peak": 3 << 20, "loaded": 2 << 20, "private": None, "kept": 1 << 20}})[1:] == [
        "ours                                      3                 2                       –                  1"
    ]


def test_a_process_that_fails_says_why() -> None:
    options = argparse.Namespace(batch=1, size=32, layout="contiguous")
    with pytest.raises(SystemExit, match=r"^benchmarks.step: nothing in a process of its own ended with 2:\nusage: "):
        step.in_own_process("nothing", options, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "argument --batch: expected a whole number from 2 on, got '1'"),
        (["--size", "x"], "argument --size: expected a whole number from 32 on, got 'x'"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        step.main(arguments)
    assert refused.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m benchmarks.step: error: {message}"


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert step.main(["--json", str(file / "step.json")]) == 2
    assert capsys.readouterr() == ("", f"benchmarks.step: [Errno 17] File exists: {str(file)!r}\n")


@pytest.mark.slow
def test_the_program_prints_and_writes_all_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "step.json"
    arguments = ["--batch", "4", "--size", "64", "--threads", "1", "--minutes", "0.1", "--json", str(path)]
    assert step.main(arguments) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [timed["threads"] for timed in report["times"]] == [1]
    assert set(report["memory"]) == set(step.LAYERS)
    # What a layer keeps is on top of what the network keeps without it.
    assert report["memory"]["without"]["kept"] < report["memory"]["ours"]["kept"]
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name} ") == 2 for name in step.LAYERS)
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]
