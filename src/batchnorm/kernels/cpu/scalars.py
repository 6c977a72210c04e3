"""Element types and single values: how each dtype lies in memory and which float it is computed in.

Numba knows neither bfloat16 nor float16 on a CPU. Here an element is a Numba type of its own, stored as 16
bits and computed in float32; float32 and float64 are computed as they are. A kernel takes an element
(``FLOAT32`` ...) as an argument, so that one source serves all four: ``p = pointer(address, element)``,
``load(p, i)``, ``store(p, i, value)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import float32, float64, njit, types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, typeof_impl

from batchnorm.kernels.cpu.halves import I16, I32, float_to_half, half_to_float, shaped, splat
from batchnorm.kernels.cpu.target import ROUNDS_TO_BFLOAT16, converts_float16

I64 = ir.IntType(64)


class _BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


INTERNAL = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""For functions that kernels alone call: Numba makes no wrappers for other callers, which take as long to compile.

Called from Python such a function would end the process; what Python calls too is ``channel.counting``.
"""


@dataclass(frozen=True)
class Element:
    """The dtype of a tensor's elements, as an argument of kernels."""

    name: str


FLOAT32 = Element("float32")
FLOAT64 = Element("float64")
BFLOAT16 = Element("bfloat16")
FLOAT16 = Element("float16")
ELEMENTS = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)


class ElementType(types.Type):  # type: ignore[misc]
    """Numba's type of an Element. ``real`` is the type that it is computed in."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"batchnorm.{name}")
        self.element = name
        self.real = types.float64 if name == "float64" else types.float32

    @property
    def storage(self) -> ir.Type:
        """How LLVM sees it in memory."""
        return {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(self.element, I16)


@register_default(ElementType)
class _ElementModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, type_: ElementType) -> None:
        super().__init__(manager, type_, type_.storage)


@typeof_impl.register(Element)
def _typeof_element(value: Element, context: Any) -> ElementType:
    return ElementType(value.name)


@lower_constant(ElementType)
def _constant_element(context: Any, builder: Any, type_: ElementType, value: Element) -> ir.Constant:
    return ir.Constant(type_.storage, None)


# What one element, or a vector of them, becomes in registers and back. `lanes` = 0 means one.


def widen(builder: Any, name: str, value: Any, lanes: int = 0) -> Any:
    """From its bits in memory to the float that it is computed in."""
    if name == "bfloat16":
        bits = shaped(I32, lanes)
        shifted = builder.shl(builder.zext(value, bits), splat(I32, 16, lanes))
        return builder.bitcast(shifted, shaped(ir.FloatType(), lanes))
    if name == "float16":
        if not converts_float16():
            return half_to_float(builder, value, lanes)
        return builder.fpext(builder.bitcast(value, shaped(ir.HalfType(), lanes)), shaped(ir.FloatType(), lanes))
    return value


def narrow(builder: Any, name: str, value: Any, lanes: int = 0) -> Any:
    """Back to memory: the nearest value, ties to even; NaN stays NaN.

    The instruction for bfloat16 takes subnormal numbers (below 1.2e-38) for 0.
    """
    if name == "bfloat16" and ROUNDS_TO_BFLOAT16 and lanes:
        return builder.bitcast(builder.fptrunc(value, shaped(_BFloatType(), lanes)), shaped(I16, lanes))
    if name == "bfloat16":
        bits = builder.bitcast(value, shaped(I32, lanes))
        odd = builder.and_(builder.lshr(bits, splat(I32, 16, lanes)), splat(I32, 1, lanes))
        nearest = builder.add(bits, builder.add(odd, splat(I32, 0x7FFF, lanes)))
        quiet = builder.or_(bits, splat(I32, 0x400000, lanes))  # a carry would turn NaN into Inf or -0
        kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
        return builder.trunc(builder.lshr(kept, splat(I32, 16, lanes)), shaped(I16, lanes))
    if name == "float16":
        if not converts_float16():
            return float_to_half(builder, value, lanes)
        return builder.bitcast(builder.fptrunc(value, shaped(ir.HalfType(), lanes)), shaped(I16, lanes))
    return value


@intrinsic
def pointer(typing: Any, address: Any, element: Any) -> Any:
    """The address (int64) as a pointer to elements."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    if isinstance(element, ElementType):
        return types.CPointer(element)(types.int64, element), code
    return None


@intrinsic
def load(typing: Any, base: Any, index: Any) -> Any:
    """base[index], as the float that it is computed in."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = signature.args[0].dtype.element
        return widen(builder, name, builder.load(builder.gep(args[0], [args[1]])))

    if isinstance(base, types.CPointer) and isinstance(base.dtype, ElementType):
        return base.dtype.real(base, types.int64), code
    return None


@intrinsic
def store(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index] = value, rounded once."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = signature.args[0].dtype.element
        builder.store(narrow(builder, name, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    if isinstance(base, types.CPointer) and isinstance(base.dtype, ElementType):
        return types.void(base, types.int64, base.dtype.real), code
    return None


@intrinsic
def load_byte(typing: Any, address: Any, index: Any) -> Any:
    """The byte at address + index, as an int64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(builder.add(args[0], args[1]), ir.IntType(8).as_pointer())
        return builder.zext(builder.load(place), I64)

    return types.int64(types.int64, types.int64), code


@intrinsic
def stays_a_call(typing: Any) -> Any:
    """At the head of a function: LLVM does not copy its body to the places that call it (compilation takes longer)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def increment(typing: Any, address: Any) -> Any:
    """One more in the int64 at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], I64.as_pointer())
        builder.store(builder.add(builder.load(place), ir.Constant(I64, 1)), place)
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def real(typing: Any, element: Any, value: Any) -> Any:
    """The number as the float that elements are computed in."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    if isinstance(element, ElementType):
        return element.real(element, value), code
    return None


@intrinsic
def as_stored(typing: Any, element: Any, value: Any) -> Any:
    """The number, of the float that elements are computed in, rounded to what an element can hold."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return widen(builder, element.element, narrow(builder, element.element, args[1]))

    if isinstance(element, ElementType):
        return element.real(element, element.real), code
    return None


@intrinsic
def slot_float(typing: Any, block: Any, slot: Any) -> Any:
    """The float64 whose bits stand in the block's slot."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]])
        return builder.load(builder.bitcast(place, ir.DoubleType().as_pointer()))

    return types.float64(types.CPointer(types.int64), types.int64), code


@njit(**INTERNAL)
def load_channel(address, code, channel):  # type: ignore[no-untyped-def]
    """One value of a per-channel vector of any dtype (a code of ``block.CODES``), as float64."""
    if code == 0:
        return float64(load(pointer(address, FLOAT32), channel))
    if code == 1:
        return load(pointer(address, FLOAT64), channel)
    if code == 2:
        return float64(load(pointer(address, BFLOAT16), channel))
    return float64(load(pointer(address, FLOAT16), channel))


@njit(**INTERNAL)
def store_channel(address, code, channel, value):  # type: ignore[no-untyped-def]
    """Write one value (float64) of a per-channel vector of any dtype, rounded once."""
    if code == 0:
        store(pointer(address, FLOAT32), channel, float32(value))
    elif code == 1:
        store(pointer(address, FLOAT64), channel, value)
    elif code == 2:
        store(pointer(address, BFLOAT16), channel, float32(value))
    else:
        store(pointer(address, FLOAT16), channel, float32(value))
