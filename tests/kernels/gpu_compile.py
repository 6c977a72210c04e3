"""Compile what a call of the GPU backend would launch, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@dataclass
class Built:
    """A program as the compiler left it."""

    name: str
    asm: dict[str, Any]
    shared: int  # bytes of shared memory
    options: dict[str, Any]

    def resources(self, folder: Path) -> dict[str, int]:
        """Registers, bytes of stack (where registers are spilled to) and so on a thread, of a cubin."""
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        (folder / "it.cubin").write_bytes(self.asm["cubin"])
        shown = subprocess.run(
            [tool, "-res-usage", folder / "it.cubin"], capture_output=True, text=True, timeout=60, check=True
        )
        return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout)}


@dataclass
class Compiler:
    """Stands in for the backend's programs: ``program[grid](*arguments)`` compiles instead of launching."""

    target: Any
    programs: ModuleType
    built: list[Built] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return _Launch(self, getattr(self.programs, name))


@dataclass
class _Launch:
    compiler: Compiler
    program: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(n >= 1 for n in grid)
        return self.compile

    def compile(self, *arguments: Any, num_warps: int, **options: Any) -> None:
        """As Triton's own launcher does: None, 1 and compile-time constants become part of the program."""
        import triton
        from triton.compiler import ASTSource

        names = [p.name for p in self.program.params]
        values = dict(zip(names, arguments, strict=False)) | options
        assert set(values) == set(names), "an argument is missing or too many"
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        multiples: dict[tuple[int], Any] = {}
        for i, p in enumerate(self.program.params):
            value = values[p.name]
            if p.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[p.name], constants[p.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name] = POINTERS[value.dtype]
                multiples[i,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[p.name] = p.annotation_type or "fp32"
            else:
                signature[p.name] = "i64" if value >= 2**31 else "i32"
        source = ASTSource(self.program, signature, constants, multiples)
        made = triton.compile(source, target=self.compiler.target, options={"num_warps": num_warps})
        self.compiler.built.append(Built(self.program.__name__, dict(made.asm), made.metadata.shared, options))


def programs() -> ModuleType:
    """The programs; a visible skip where they cannot be compiled."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from batchnorm.kernels import gpu
    from batchnorm.kernels.gpu import programs as module

    if gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    return module
