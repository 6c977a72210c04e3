"""The Triton programs compile for GPUs, so that nothing works in the interpreter alone. No GPU is needed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import gpu
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Needs, Running
from batchnorm.kernels.gpu import plan
from kernels.gpu_compile import Built, Compiler, programs

CUDA, HIP = ("cuda", 90, 32), ("hip", "gfx942", 64)
PROCESSORS = 132
# Shapes that take different ways: channels split among programs, merged in a launch of their own, in one launch.
SHAPES = ((64, 64, 56, 56), (64, 512, 7, 7), (32, 3, 31, 31), (60, 100), (70000, 65))
# Registers that a thread may keep in memory, in bytes; a tile that does not fit would take hundreds.
STACK = 64


def built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: tuple[Any, ...], shape: tuple[int, ...], *,
    dtype: torch.dtype = torch.bfloat16, channels_last: bool = False, activation: str | None = "relu",
    places: str = "all", residual: bool = False, training: bool = True, offset: int = 0,
) -> list[Built]:  # fmt: skip
    """All programs of a forward, a backward and the functions beside them."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = Compiler(GPUTarget(*target), programs())
    monkeypatch.setattr(gpu, "_programs", lambda: compiler)
    monkeypatch.setattr(plan, "processors", lambda device: PROCESSORS)
    plan.by_table.cache_clear()
    x = torch.empty(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = torch.empty(shape[1]), torch.empty(shape[1])
    options: dict[str, Any] = {"activation": activation_by_name(activation)}
    weights = {}
    if places != "all":
        channels = shape[1] if places == "mask of places" else 1
        options["mask"] = torch.ones((shape[0], channels, *shape[2:]), dtype=torch.bool)
        weights["sample_weight"] = torch.ones((shape[0], *(1,) * (len(shape) - 1))) if places == "weights" else None
    more = {"residual": x} if residual else {}
    running = Running(torch.empty(shape[1]), torch.empty(shape[1]), 0.1, torch.zeros((), dtype=torch.int64))
    y, stats = gpu.forward(x, weight, bias, 1e-5, running=running, **options, **more, **weights)
    needs = Needs(True, True, True, residual)
    by_y: dict[str, Tensor] = {"y": y} if residual else {}
    gpu.backward(y, x, stats, 1e-5, weight, bias, training=training, needs=needs, **options, **by_y, **weights)
    if not training:
        gpu.normalize(x, stats[0].float(), stats[1].float(), 1e-5, weight, None, **options, **more)
    plan.by_table.cache_clear()
    return compiler.built


def check(found: list[Built], target: tuple[Any, ...], tmp_path: Path) -> None:
    for each in found:
        what = f"{each.name} {each.options}"
        assert each.asm["cubin" if target is CUDA else "hsaco"], what
        # Sums over a tile go through shared memory. More means that whole tiles are handed from thread to thread.
        assert each.shared <= 32 * 1024, what
        if target is CUDA:
            assert each.resources(tmp_path)["STACK"] <= STACK, what
            assert each.asm["ptx"].count("st.shared") <= 128, what


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_program_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels_last: bool) -> None:
    found = built(monkeypatch, tmp_path, CUDA, (64, 64, 56, 56), channels_last=channels_last, residual=True)
    names = {"moments_program", "normalize_program", "sums_program", "input_program"}
    assert {each.name for each in found} == names | ({"merge_program"} if channels_last else set())
    check(found, CUDA, tmp_path)
    for each in found:
        if each.name != "merge_program":
            assert "ld.global.v4.b32" in each.asm["ptx"], f"{each.name} loads fewer than 16 bytes at once"


@pytest.mark.slow
@pytest.mark.parametrize("target", [CUDA, HIP], ids=lambda t: t[0])
@pytest.mark.parametrize("places", ["all", "mask", "mask of places", "weights"])
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [(shape, last) for shape, last in product(SHAPES, (False, True)) if len(shape) == 4 or not last],
    ids=str,
)
def test_every_variant_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: tuple[Any, ...], shape: tuple[int, ...],
    channels_last: bool, places: str,
) -> None:  # fmt: skip
    turns = product((torch.float32, torch.bfloat16, torch.float16), (None, "relu", "leaky_relu"), (False, True))
    chosen = list(turns)[hash((shape, channels_last)) % 5 :: 5]  # each pair somewhere: all of them take hours
    for dtype, activation, residual in chosen:
        found = built(
            monkeypatch, tmp_path, target, shape, dtype=dtype, channels_last=channels_last, activation=activation,
            places=places, residual=residual, training=residual or activation is None,
        )  # fmt: skip
        check(found, target, tmp_path)
