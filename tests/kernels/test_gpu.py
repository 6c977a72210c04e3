"""What is particular to the Triton kernels: tiles, parts and launches of every kind, on buffers with guards around.

Runs on a GPU, or on the CPU where TRITON_INTERPRET=1 is in the environment when Python starts:
test_gpu_interpreted.py starts such a process. The conformance suite (tests/test_conformance.py -k gpu) has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import gpu
from batchnorm.kernels.contract import Running
from batchnorm.kernels.gpu import plan, tuning
from batchnorm.kernels.gpu.plan import Plan, Problem, cut
from conformance import DEVICES, EPS, MARGIN, MOMENTUM, NAMES, Case, expected_of, inputs_of, placed, skip_unless
from kernels import test_groups
from test_conformance import check_phases, check_public

pytestmark = pytest.mark.skipif(
    "gpu" not in NAMES, reason="no GPU, and not TRITON_INTERPRET=1: test_gpu_interpreted.py runs these in a process"
)

GUARD = 12345.0

# Small: the interpreter takes some 10 ms for each tile of each program.
CASES = (
    Case(shape=(3, 5, 13, 1), activation="relu", training=False),
    Case(shape=(2, 6, 5, 3), dtype=torch.bfloat16, layout="channels_last", activation="relu", residual="full"),
    Case(shape=(4, 5, 7), dtype=torch.float16, places="mask and weights", activation="leaky_relu"),
    Case(shape=(19, 3), dtype=torch.bfloat16, parameters="float32", places="mask of places", activation="relu"),
    Case(shape=(2, 3, 7, 5), values="mean 1e6", residual="full", activation="relu"),
    Case(shape=(2, 1, 49), values="constant channel", affine="none", layout="sliced"),
)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All memory that the backend takes has guards on both sides, and is NaN until it is written."""
    rooms: list[Tensor] = []

    def guarded(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        room = torch.full((size + 2 * MARGIN,), GUARD, dtype=dtype, device=device)
        rooms.append(room)
        room[MARGIN:-MARGIN] = float("nan")
        return room.as_strided(shape, strides, MARGIN)

    def like(seen: Any, x: Tensor) -> Tensor:
        strides = torch.empty_like(x, memory_format=seen.format).stride()
        return guarded(tuple(x.shape), strides, x.dtype, x.device)

    def room(x: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return guarded(shape, torch.empty(shape, device="meta").stride(), dtype, x.device)

    monkeypatch.setattr(gpu._Seen, "empty", like)
    monkeypatch.setattr(gpu, "_empty", room)
    yield
    for each in rooms:
        edges = torch.cat((each[:MARGIN], each[-MARGIN:]))
        assert torch.equal(edges, torch.full_like(edges, GUARD)), "written outside of a buffer"


def tiles(monkeypatch: pytest.MonkeyPatch, c_block: int, o_block: int, i_block: int, waves: int, merged: int) -> None:
    """Small tiles and many parts, whatever the shape. Nothing is fused then."""

    def small(problem: Problem) -> Plan:
        inner = min(i_block, plan.power(problem.inner))
        return cut(problem, c_block, o_block * (i_block // inner), inner, waves)

    monkeypatch.setattr(plan, "find", small)
    monkeypatch.setattr(plan, "MERGED", merged)
    monkeypatch.setattr(plan, "processors", lambda device: 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_the_table(case: Case) -> None:
    check_public("gpu", case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_small_tiles_and_many_parts(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    tiles(monkeypatch, 4, 1, 32, 1, 2048)
    check_phases("gpu", case)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_parts_merged_in_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    tiles(monkeypatch, 4, 1, 16, 2, 4)
    check_public("gpu", case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_running_update_is_in_the_launch(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Once for each channel, however many programs there are; the counter goes up once, and autograd learns of it."""
    inputs = inputs_of(Case(shape=(4, 5, 6, 3), layout=layout), "gpu")
    expected = expected_of(inputs)
    for split in (False, True):
        if split:
            tiles(monkeypatch, 4, 1, 64, 2, 2048)
        batches = placed(torch.tensor([41]), "gpu")[0]
        running = Running(inputs.running_mean.clone(), inputs.running_var.clone(), MOMENTUM, batches)
        monkeypatch.setattr(Running, "update", None)  # in PyTorch's operations
        versions = running.mean._version, running.var._version, batches._version
        gpu.forward(inputs.x, inputs.weight, inputs.bias, EPS, running=running)
        expected.check("running_mean", running.mean, "in the launch")
        expected.check("running_var", running.var, "in the launch")
        assert batches.item() == 42
        assert all(t._version > v for t, v in zip((running.mean, running.var, batches), versions, strict=True))


@pytest.mark.parametrize("split", ["smaller", "larger"])
def test_groups_in_small_tiles(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Parts of a group that has fewer rows than the others are empty."""
    tiles(monkeypatch, 4, 1, 8, 4, 2048)
    case = Case(shape=(12, 3, 5), residual="full", activation="relu")
    for check in (test_groups.test_the_fused_functions, test_groups.test_each_phase):
        check("gpu", split, case)


@pytest.mark.parametrize("operation", ["forward", "backward", "moments", "normalize", "sums", "input"])
def test_what_tuning_measures_runs(operation: str) -> None:
    tuning._call(Problem(operation, 1, 3, 2, 5, torch.bfloat16, torch.device(DEVICES["gpu"])))()


def test_an_outlier_in_front_costs_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first value is what others are compared with: 1e4 standard deviations away it must not matter."""
    x = torch.randn(8, 2, 96)
    x[0, :, 0] = 1e4
    for split in (False, True):
        if split:
            tiles(monkeypatch, 1, 2, 32, 2, 2048)
        found = gpu.moments(placed(x, "gpu"))
        exact = x.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(found.variance().cpu(), exact.var(1, correction=0), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.mean.cpu(), exact.mean(1), rtol=0, atol=1e-6 * float(exact.std(1).max()))


def test_an_infinite_value_in_one_part_makes_the_mean_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not NaN, as torch's; in whatever part and tile it is."""
    tiles(monkeypatch, 1, 1, 16, 2, 2048)
    for place in (0, 20, 63):
        x = torch.randn(1, 2, 64)
        x[0, 0, place] = float("inf")
        found = gpu.moments(placed(x, "gpu"))
        assert found.mean[0].item() == float("inf")
        assert found.m2[0].isnan()
        assert found.m2[1].isfinite()


def test_the_same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles(monkeypatch, 2, 1, 32, 2, 2048)
    x = placed(torch.randn(4, 3, 40), "gpu")
    first = gpu.forward(x, None, None, EPS)
    for _ in range(2):
        again = gpu.forward(x, None, None, EPS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.ones(4, 3, dtype=torch.float64), "no kernel for torch.float64"),
        (torch.ones(0, 3), "nothing to do for an input without values"),
    ],
    ids=str,
)
def test_what_is_not_served(x: Tensor, why: str) -> None:
    assert gpu.supports(x.to(DEVICES["gpu"])) == why


def test_offsets_above_two_to_the_31() -> None:
    """4.3e9 values; on a GPU only, and where it has the memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory on the GPU")
    x = torch.empty((2**16 + 1, 2**16), dtype=torch.bfloat16, device="cuda")
    x.random_(-2, 3)
    skip_unless(gpu, x)
    y, stats = gpu.forward(x, None, None, EPS)
    last = x[:, -1].double()
    torch.testing.assert_close(stats[0, -1], last.mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        y[-1, -1].double(), (last[-1] - last.mean()) / (last.var(correction=0) + EPS).sqrt(), rtol=2**-8, atol=1e-6
    )
