"""Wide vectors: four registers of channels side by side, the unit of work of the channel-inside kernels.

Four independent chains of sums hide the latency of an addition, and 256 bytes of a row at a time use whole cache
lines. Arithmetic is that of ``vectors`` (``vadd``, ``vfma`` ...), which works on vectors of any width; here are reading
and writing. ``count`` is None for a whole vector, or how many of its lanes there are at the end of a row.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from batchnorm.kernels.cpu.halves import I32
from batchnorm.kernels.cpu.scalars import I64, INTERNAL, ElementType, narrow, widen
from batchnorm.kernels.cpu.target import VECTOR_BYTES
from batchnorm.kernels.cpu.vectors import (
    Vector,
    _elements,
    _first,
    _item_bytes,
    _masked,
    _place,
    _splat,
    stream_bits,
)

REGISTERS = 4


def plain(function: Any) -> Any:
    """Compile for use in kernels. Numba hands "always inline" down to callees unless they say no; these do."""
    return njit(error_model="numpy", forceinline=False, **INTERNAL)(function)


def inlined(function: Any) -> Any:
    """Like plain, and always inlined by LLVM."""
    return njit(error_model="numpy", forceinline=True, **INTERNAL)(function)


CACHE_LINE = 64


class Wide(Vector):
    """Numba's type of a wide vector."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.name = f"batchnorm.wide[{real}]"
        self.lanes = wide_lanes(real.bitwidth // 8)


def wide_lanes(real_bytes: int) -> int:
    """How many channels a wide vector holds; ``real_bytes`` is the size of the float that they are computed in."""
    return REGISTERS * VECTOR_BYTES // real_bytes


@register_default(Wide)
class _WideModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, type_: Wide) -> None:
        super().__init__(manager, type_, type_.llvm)


@intrinsic
def wide(typing: Any, element: Any) -> Any:
    """How many channels a wide vector of this element holds: a constant to the compiler."""
    count = Wide(element.real).lanes
    return types.int64(element), lambda context, builder, signature, args: ir.Constant(I64, count)


@intrinsic
def wide_zero(typing: Any, element: Any) -> Any:
    """Zero in every lane."""
    vector = Wide(element.real)
    return vector(element), lambda context, builder, signature, args: ir.Constant(vector.llvm, None)


@intrinsic
def wide_splat(typing: Any, element: Any, value: Any) -> Any:
    """The number in every lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        return _splat(builder, vector, context.cast(builder, args[1], signature.args[1], vector.real))

    return Wide(element.real)(element, value), code


@intrinsic
def wide_load(typing: Any, base: Any, index: Any, count: Any) -> Any:
    """base[index : index + lanes], or + count with zeros after it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.return_type
        place = _place(builder, element, args[0], args[1], vector.lanes)
        size = _item_bytes(element)
        if count is types.none:
            bits = builder.load(place, align=size)
        else:
            mask = _first(builder, args[2], vector.lanes)
            nothing = ir.Constant(ir.VectorType(element.storage, vector.lanes), None)
            function = _masked(builder, "load", element, vector.lanes)
            bits = builder.call(function, [place, ir.Constant(I32, size), mask, nothing])
        return widen(builder, element.element, bits, vector.lanes)

    element = _elements(base)
    if element is None:
        return None
    last = count if count is types.none else types.int64
    return Wide(element.real)(base, types.int64, last), code


@intrinsic
def wide_store(typing: Any, base: Any, index: Any, value: Any, count: Any) -> Any:
    """base[index : index + lanes] = value, or + count; each rounded once."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.args[2]
        place = _place(builder, element, args[0], args[1], vector.lanes)
        bits = narrow(builder, element.element, args[2], vector.lanes)
        size = _item_bytes(element)
        if count is types.none:
            builder.store(bits, place, align=size)
        else:
            mask = _first(builder, args[3], vector.lanes)
            function = _masked(builder, "store", element, vector.lanes)
            builder.call(function, [bits, place, ir.Constant(I32, size), mask])
        return context.get_dummy_value()

    element = _elements(base)
    if element is None:
        return None
    last = count if count is types.none else types.int64
    return types.void(base, types.int64, Wide(element.real), last), code


@intrinsic
def wide_stream(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """Like wide_store of a whole vector, around the cache; the place must be aligned to a cache line."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.args[2]
        bits = narrow(builder, element.element, args[2], vector.lanes)
        lanes = CACHE_LINE // _item_bytes(element)
        for first in range(0, vector.lanes, lanes):
            line = ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes)))
            at = builder.add(args[1], ir.Constant(I64, first))
            stream_bits(builder, builder.shuffle_vector(bits, bits, line), builder.gep(args[0], [at]), CACHE_LINE)
        return context.get_dummy_value()

    element = _elements(base)
    return None if element is None else (types.void(base, types.int64, Wide(element.real)), code)


@intrinsic
def wide_store_float64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index : index + lanes] = value, as float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.args[2]
        place = _place(builder, signature.args[0].dtype, args[0], args[1], vector.lanes)
        builder.store(_as_float64(builder, vector, args[2]), place, align=8)
        return context.get_dummy_value()

    element = _elements(base)
    if element is None or element.element != "float64":
        return None
    return types.void(base, types.int64, value), code


@intrinsic
def wide_add_float64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index : index + lanes] += value, in float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.args[2]
        place = _place(builder, signature.args[0].dtype, args[0], args[1], vector.lanes)
        total = builder.fadd(builder.load(place, align=8), _as_float64(builder, vector, args[2]))
        builder.store(total, place, align=8)
        return context.get_dummy_value()

    element = _elements(base)
    if element is None or element.element != "float64":
        return None
    return types.void(base, types.int64, value), code


def _as_float64(builder: Any, vector: Wide, value: Any) -> Any:
    if vector.real is types.float64:
        return value
    return builder.fpext(value, ir.VectorType(ir.DoubleType(), vector.lanes))


@intrinsic
def wide_finite(typing: Any, value: Any) -> Any:
    """The lanes that are finite; 0 for the others."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        zero = ir.Constant(vector.llvm, None)
        difference = builder.fsub(args[0], args[0])  # 0, or NaN for Inf and NaN
        return builder.select(builder.fcmp_ordered("ord", difference, difference), args[0], zero)

    return value(value), code


@intrinsic
def wide_where_above(typing: Any, z: Any, a: Any, b: Any) -> Any:
    """a where z > 0, else b (NaN too)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(signature.return_type.llvm, None)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[1], args[2])

    return a(z, a, b), code


@intrinsic
def wide_keep_unless_negative(typing: Any, z: Any, a: Any) -> Any:
    """0 where z <= 0, else a: kept where z is NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(signature.return_type.llvm, None)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return a(z, a), code


@intrinsic
def prefetch(typing: Any, base: Any, index: Any) -> Any:
    """Ask for the lines of base[index : index + lanes] in the second-level cache."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element: ElementType = signature.args[0].dtype
        byte = ir.IntType(8).as_pointer()
        name = "llvm.prefetch.p0"
        known = builder.module.globals.get(name)
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = known if known is not None else ir.Function(builder.module, kind, name)
        start = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        for offset in range(0, Wide(element.real).lanes * _item_bytes(element), CACHE_LINE):
            place = builder.gep(start, [ir.Constant(I64, offset)])
            builder.call(function, [place, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    element = _elements(base)
    return None if element is None else (types.void(base, types.int64), code)


@intrinsic
def fence(typing: Any) -> Any:
    """Streamed stores are visible to other threads before what follows."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


# Channels: vectors of float64, as many as a wide vector of a float64 tensor has, read from and written to any dtype.


@intrinsic
def channels_load(typing: Any, base: Any, index: Any, count: Any) -> Any:
    """base[index : index + count] as float64, with zeros after it."""
    vector = Wide(types.float64)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = signature.args[0].dtype
        place = _place(builder, element, args[0], args[1], vector.lanes)
        mask = _first(builder, args[2], vector.lanes)
        nothing = ir.Constant(ir.VectorType(element.storage, vector.lanes), None)
        function = _masked(builder, "load", element, vector.lanes)
        bits = builder.call(function, [place, ir.Constant(I32, _item_bytes(element)), mask, nothing])
        value = widen(builder, element.element, bits, vector.lanes)
        return value if element.real is types.float64 else builder.fpext(value, vector.llvm)

    return None if _elements(base) is None else (vector(base, types.int64, types.int64), code)


@intrinsic
def channels_store(typing: Any, base: Any, index: Any, value: Any, count: Any) -> Any:
    """base[index : index + count] = value, rounded."""
    vector = Wide(types.float64)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = signature.args[0].dtype
        place = _place(builder, element, args[0], args[1], vector.lanes)
        mask = _first(builder, args[3], vector.lanes)
        value = args[2]
        if element.real is not types.float64:
            value = builder.fptrunc(value, ir.VectorType(ir.FloatType(), vector.lanes))
        bits = narrow(builder, element.element, value, vector.lanes)
        function = _masked(builder, "store", element, vector.lanes)
        builder.call(function, [bits, place, ir.Constant(I32, _item_bytes(element)), mask])
        return context.get_dummy_value()

    return None if _elements(base) is None else (types.void(base, types.int64, vector, types.int64), code)


@intrinsic
def wide_divide(typing: Any, a: Any, b: Any) -> Any:
    """a / b."""
    return a(a, b), lambda context, builder, signature, args: builder.fdiv(args[0], args[1])


@intrinsic
def wide_sqrt(typing: Any, value: Any) -> Any:
    """The square root; NaN of what is negative."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        name = f"llvm.sqrt.v{vector.lanes}{'f64' if vector.real is types.float64 else 'f32'}"
        known = builder.module.globals.get(name)
        kind = ir.FunctionType(vector.llvm, [vector.llvm])
        return builder.call(known if known is not None else ir.Function(builder.module, kind, name), args)

    return value(value), code


@intrinsic
def wide_rounded(typing: Any, element: Any, value: Any) -> Any:
    """A vector of float64 rounded to the float that elements are computed in, and back to float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if element.real is types.float64:
            return args[1]
        vector = signature.return_type
        short = builder.fptrunc(args[1], ir.VectorType(ir.FloatType(), vector.lanes))
        return builder.fpext(short, vector.llvm)

    return value(element, value), code


@intrinsic
def wide_any_above(typing: Any, a: Any, b: Any) -> Any:
    """Whether a > b in any lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.IntType(signature.args[0].lanes)
        found = builder.bitcast(builder.fcmp_ordered(">", args[0], args[1]), bits)
        return builder.icmp_unsigned("!=", found, ir.Constant(bits, 0))

    return types.boolean(a, b), code


@intrinsic
def wide_any_lost(typing: Any, value: Any, given: Any) -> Any:
    """Whether in any lane value is Inf or NaN and given is neither."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.IntType(signature.args[0].lanes)
        zeros = [builder.fsub(a, a) for a in args]  # NaN for Inf and NaN
        lost = builder.fcmp_unordered("uno", zeros[0], zeros[0])
        known = builder.fcmp_ordered("ord", zeros[1], zeros[1])
        found = builder.bitcast(builder.and_(lost, known), bits)
        return builder.icmp_unsigned("!=", found, ir.Constant(bits, 0))

    return types.boolean(value, given), code


@intrinsic
def real_pointer(typing: Any, address: Any, element: Any) -> Any:
    """The address as a pointer to the floats that elements are computed in."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    name = "float64" if element.real is types.float64 else "float32"
    return types.CPointer(ElementType(name))(types.int64, element), code


@intrinsic
def item_bytes(typing: Any, element: Any) -> Any:
    """The size of an element in memory: a constant to the compiler."""
    size = _item_bytes(element)
    return types.int64(element), lambda context, builder, signature, args: ir.Constant(I64, size)


@intrinsic
def byte_at(typing: Any, address: Any) -> Any:
    """The byte at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(place), I64)

    return types.int64(types.int64), code


@intrinsic
def wide_replace(typing: Any, value: Any, lane: Any, by: Any) -> Any:
    """The vector with another number in one lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.insert_element(args[0], args[2], args[1])

    return value(value, types.int64, value.real), code


@intrinsic
def moved(typing: Any, base: Any, steps: Any) -> Any:
    """The pointer, so many elements further on."""
    return base(base, types.int64), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def wide_as_stored(typing: Any, base: Any, value: Any) -> Any:
    """The value rounded to the elements that base points to."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, lanes = base.dtype.element, signature.return_type.lanes
        return widen(builder, name, narrow(builder, name, args[1], lanes), lanes)

    return value(base, value), code
