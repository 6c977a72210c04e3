"""Vectors of channels in float64, for the arithmetic between the sweeps: as many channels as a wide vector of a
float64 tensor holds, read from and written to vectors of any dtype, and what ``vectors`` has no need of.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batchnorm.kernels.cpu.inside_wide import Wide
from batchnorm.kernels.cpu.scalars import I32, narrow, widen
from batchnorm.kernels.cpu.vectors import _elements, _first, _item_bytes, _masked, _place


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
def wide_replace(typing: Any, value: Any, lane: Any, by: Any) -> Any:
    """The vector with another number in one lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.insert_element(args[0], args[2], args[1])

    return value(value, types.int64, value.real), code
