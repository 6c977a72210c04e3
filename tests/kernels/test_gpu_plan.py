"""How a tensor is cut for the Triton kernels. Nothing here needs Triton or a GPU."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from batchnorm.kernels.gpu import plan, tuning
from batchnorm.kernels.gpu.plan import Plan, Problem, by_table, cut

OPERATIONS = ("forward", "backward", "moments", "normalize", "sums", "input")
# outer, channels, inner: networks' layers in both layouts, matrices, and extremes
SIZES = (
    (64, 64, 3136), (64 * 3136, 64, 1), (256, 2048, 49), (256 * 49, 2048, 1), (60, 100, 1), (65536, 64, 1),
    (6, 65536, 1), (1, 3, 1), (8, 3, 262144), (1, 1, 12345), (32, 37, 169), (2**33, 3, 1), (1, 2, 2**34),
    (1024, 2**22, 1), (64, 3, 2**28),
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 8, 132], autouse=True)
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(plan, "processors", lambda device: request.param)
    by_table.cache_clear()
    return int(request.param)


def problems() -> list[Problem]:
    return [
        Problem(operation, groups, *sizes, dtype, CPU)
        for operation, groups, sizes, dtype in product(OPERATIONS, (1, 3), SIZES, (torch.bfloat16, torch.float32))
    ]


def whole(problem: Problem, p: Plan) -> None:
    """Every value is in one tile, and every tile in one part."""
    assert all(n & (n - 1) == 0 for n in p[:4]), "tiles and warps are powers of two"
    assert p.c_block * p.o_block * p.i_block <= 2**16
    tiles = -(-problem.outer // p.o_block) * -(-problem.inner // p.i_block)
    assert (p.parts - 1) * p.per_part < tiles <= p.parts * p.per_part
    assert p.blocks == problem.groups * -(-problem.channels // p.c_block)
    assert p.parts <= 65535, "more than a grid's second dimension takes"
    assert 1 <= p.warps <= 16
    furthest = (p.o_block - 1) * problem.channels * problem.inner + (p.c_block - 1) * problem.inner + p.i_block
    assert furthest < 2**31, "an offset within a tile must fit into 32 bits"
    if p.fused:
        assert tiles == 1


def test_every_value_belongs_to_one_program() -> None:
    for problem in problems():
        whole(problem, by_table(problem))


def test_candidates_are_plans_for_the_same_problem() -> None:
    for problem in problems():
        if problem.groups == 1:
            for p in tuning.candidates(problem):
                whole(problem, p)


def test_few_channels_are_split_and_many_are_not(processors: int) -> None:
    few = by_table(Problem("moments", 1, 8, 3, 262144, torch.float32, CPU))
    assert few.blocks * few.parts >= processors
    many = by_table(Problem("moments", 1, 64, 4096, 49, torch.float32, CPU))
    assert many.parts == 1


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_one_launch_where_a_channel_fits_into_a_tile(operation: str) -> None:
    assert by_table(Problem(operation, 1, 32, 2048, 49, torch.bfloat16, CPU)).fused
    assert by_table(Problem(operation, 1, 60, 100, 1, torch.float32, CPU)).fused
    assert not by_table(Problem(operation, 1, 256, 64, 12544, torch.bfloat16, CPU)).fused
    # Rows of one or two channels: most of each sector of memory that is read would be thrown away.
    assert not by_table(Problem(operation, 1, 20000, 2048, 1, torch.bfloat16, CPU)).fused


def test_a_measured_plan_takes_the_tables_place(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("moments", 1, 64, 64, 3136, torch.float32, CPU)
    mine = cut(problem, 1, 1, 512)
    monkeypatch.setattr(plan, "measured", {problem: mine})
    assert plan.find(problem) == mine


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_file_of_plans_that_is_not_ours_counts_as_empty(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "gpu.json"
    if content is not None:
        path.write_text(content)
    assert tuning.read(path) == {}
    path.write_text(json.dumps({"key": cut(problems()[0], 1, 1, 1)}))
    assert Plan(*tuning.read(path)["key"]) == cut(problems()[0], 1, 1, 1)


class Device:
    """What tuning asks of a device's module, with a clock of its own; the kernels take as long as their tiles say."""

    capturing = False
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Device.now

        def elapsed_time(self, end: Device.Event) -> float:
            return end.at - self.at

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return Device.capturing

    @staticmethod
    def get_device_name(device: torch.device) -> str:
        return "Some GPU/2"

    @staticmethod
    def device(device: torch.device) -> torch.device:
        return device

    @staticmethod
    def synchronize() -> None:
        pass


def test_tuning_takes_the_fastest_and_remembers_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = Problem("moments", 1, 64, 64, 3136, torch.float32, CPU)
    best = list(tuning.candidates(problem))[5]
    found: dict[Problem, Plan] = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    monkeypatch.setattr(tuning, "measured", found)

    def call() -> None:
        Device.now += 1.0 if found[problem] == best else 2.0

    monkeypatch.setattr(tuning, "_call", lambda problem: call)
    monkeypatch.setattr(Device, "capturing", True)
    tuning.measure(problem)
    assert found == {}
    monkeypatch.setattr(Device, "capturing", False)
    tuning.measure(problem)
    assert found == {problem: best}
    monkeypatch.setattr(tuning, "_call", None)  # not measured again
    found.clear()
    tuning.measure(problem)
    assert found == {problem: best}
    assert [path.name for path in (tmp_path / "batchnorm").iterdir()] == ["Some_GPU-2.json"]
