"""float16 by integer arithmetic: each of the 65,536 values, both ways, and the machines that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from batchnorm.kernels.cpu.halves import float_to_half, half_to_float
from kernels.cpu_process import in_a_new_process

LANES = 8
HALVES = np.arange(1 << 16, dtype=np.uint16)


def _converter(convert: Any, source: ir.Type, target: ir.Type, lanes: int) -> Any:
    """A compiled function (from, to, count): each value converted, so many at a time."""

    @intrinsic
    def step(typing: Any, to: Any, of: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def place(array: Any, type_: Any, item: ir.Type) -> Any:
                data = context.make_array(type_)(context, builder, array).data
                kind = ir.VectorType(item, lanes) if lanes else item
                return builder.bitcast(builder.gep(data, [args[2]]), kind.as_pointer())

            value = builder.load(place(args[1], signature.args[1], source), align=item_bytes(source))
            result = convert(builder, value, lanes)
            builder.store(result, place(args[0], signature.args[0], target), align=item_bytes(target))
            return cgutils.get_null_value(context.get_value_type(types.int64))

        return types.int64(to, of, types.int64), code

    def item_bytes(item: ir.Type) -> int:
        return 2 if isinstance(item, ir.IntType) else 4

    width = max(lanes, 1)

    @njit
    def run(to, of):  # type: ignore[no-untyped-def]
        for i in range(0, of.size, width):
            step(to, of, i)

    return run


@pytest.mark.parametrize("lanes", [0, LANES])
def test_every_float16_becomes_the_same_number(lanes: int) -> None:
    found = np.empty(HALVES.size, dtype=np.float32)
    _converter(half_to_float, ir.IntType(16), ir.FloatType(), lanes)(found, HALVES)
    expected = HALVES.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(found[~number]).all()
    assert np.array_equal(np.signbit(found), (HALVES & 0x8000) != 0)


@pytest.mark.parametrize("lanes", [0, LANES])
def test_every_number_becomes_the_nearest_float16(lanes: int) -> None:
    """All float16, the ties between them and the numbers next to the ties, what is beyond them, and any bits."""
    halves = HALVES.view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float64))
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beyond = np.array([65519.996, 65520.0, 65536.0, 3.4e38, np.inf, 1e-45, 1e-38, 2.0**-25, 2.0**-26], dtype=np.float32)
    edges = np.concatenate([ties, beyond, -beyond])
    near = [np.nextafter(edges, np.float32(side)) for side in (-np.inf, np.inf)]
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([halves, edges, *near, any_bits.view(np.float32)])
    values = np.concatenate([values, np.zeros(-values.size % LANES, dtype=np.float32)])
    found = np.empty(values.size, dtype=np.uint16)
    _converter(float_to_half, ir.FloatType(), ir.IntType(16), lanes)(found, values)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(values)
    assert np.array_equal(found[number], expected.view(np.uint16)[number])
    assert np.isnan(found.view(np.float16)[~number]).all()
    assert np.array_equal((found & 0x8000) != 0, np.signbit(values))


MACHINES = [
    {"NUMBA_CPU_NAME": "generic"},
    {"NUMBA_CPU_NAME": "x86-64-v2"},
    {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": "+sse4.2"},
    {"NUMBA_ENABLE_AVX": "0"},
]


def test_without_instructions_for_float16_kernels_work(tmp_path: Path) -> None:
    code = """
        from batchnorm.kernels.cpu.target import VECTOR_BYTES, converts_float16
        x = torch.randn(4, 3, 100).half()
        moments = torch.empty(3, 3, dtype=torch.float64)
        call(outside.family(4, 100), "MOMENTS", x, stats=moments)
        assert torch.allclose(moments[1], x.double().mean((0, 2))), "wrong result"
        print(converts_float16(), VECTOR_BYTES)
    """
    done = in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic")
    assert done.stdout == "False 32\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: " ".join(machine.values()))
def test_a_lesser_machine_keeps_every_promise(machine: dict[str, str], dtype: str, tmp_path: Path) -> None:
    """Both layouts, forward and backward, against the float64 reference."""
    code = f"""
        from kernels import test_cpu_inside, test_cpu_outside
        torch.manual_seed(0)
        dtype = torch.{dtype}
        for shape in ((9, 5, 49), (3, 5, 300)):
            case = test_cpu_outside.Case(shape, dtype, activation="relu")
            case.check_forward(*outside_forward(case.x, **case.options))
            test_cpu_outside.check_backward(case)
        case = test_cpu_inside.Case((301, 37), dtype, activation="relu")
        y, stats = case.run_forward()
        case.check_statistics(*stats)
        case.check_y(y)
        case.check_backward(case.run_backward())
        print("right")
    """
    done = in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path), **machine)
    assert done.stdout == "right\n", done.stderr
