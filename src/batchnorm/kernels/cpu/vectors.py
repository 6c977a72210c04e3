"""Vectors as values in Numba: whole registers of elements, so that a kernel says itself what is kept where.

``vload(p, i)`` reads LANES consecutive elements of any dtype as floats; arithmetic is lane by lane; ``vsum`` adds the
lanes up. The last, incomplete vector of a row is read and written with ``vload_some`` and ``vstore_some``. Written this
way, and not as plain loops, kernels keep their sums in registers over many short rows, need no scalar loop at the end
of each row, and compile in a fraction of the time that LLVM's vectorizer takes.

A vector has 64 bytes where the machine has AVX-512, 32 elsewhere (LLVM cuts them in two where registers are smaller).
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


class Vector(types.Type):  # type: ignore[misc]
    """Numba's type of a vector of floats; for 16-bit elements a vector of float32."""

    def __init__(self, real: Any) -> None:
        super().__init__(name=f"batchnorm.vector[{real}]")
        self.real = real
        self.lanes = VECTOR_BYTES * 8 // real.bitwidth

    @property
    def llvm(self) -> ir.Type:
        """How LLVM sees it."""
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def scalar(self) -> ir.Type:
        """How LLVM sees one lane."""
        return ir.DoubleType() if self.real is types.float64 else ir.FloatType()


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, type_: Vector) -> None:
        super().__init__(manager, type_, type_.llvm)


def _elements(base: Any) -> ElementType | None:
    found = isinstance(base, types.CPointer) and isinstance(base.dtype, ElementType)
    return base.dtype if found else None


@intrinsic
def lanes(typing: Any, element: Any) -> Any:
    """How many elements a vector holds: a constant to the compiler."""
    count = Vector(element.real).lanes
    return types.int64(element), lambda context, builder, signature, args: ir.Constant(I64, count)


@intrinsic
def item_bytes(typing: Any, element: Any) -> Any:
    """How many bytes an element has in memory: a constant to the compiler."""
    count = _item_bytes(element)
    return types.int64(element), lambda context, builder, signature, args: ir.Constant(I64, count)


@intrinsic
def vsplat(typing: Any, element: Any, value: Any) -> Any:
    """The number in every lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        scalar = context.cast(builder, args[1], signature.args[1], vector.real)
        return _splat(builder, vector, scalar)

    return Vector(element.real)(element, value), code


@intrinsic
def vzeros(typing: Any, like: Any) -> Any:
    """0 in every lane of a vector of the same type."""
    return like(like), lambda context, builder, signature, args: ir.Constant(signature.return_type.llvm, None)


def _splat(builder: Any, vector: Vector, scalar: Any) -> Any:
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    everywhere = ir.Constant(ir.VectorType(I32, vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(first, undefined, everywhere)


def _place(builder: Any, element: ElementType, base: Any, index: Any, width: int) -> Any:
    address = builder.gep(base, [index])
    return builder.bitcast(address, ir.VectorType(element.storage, width).as_pointer())


def _item_bytes(element: ElementType) -> int:
    return {"float32": 4, "float64": 8}.get(element.element, 2)


@intrinsic
def address_of(typing: Any, base: Any, index: Any) -> Any:
    """The address of base[index]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), I64)

    return None if _elements(base) is None else (types.int64(base, types.int64), code)


@intrinsic
def vload(typing: Any, base: Any, index: Any) -> Any:
    """base[index : index + LANES]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.return_type
        place = _place(builder, element, args[0], args[1], vector.lanes)
        return widen(builder, element.element, builder.load(place, align=_item_bytes(element)), vector.lanes)

    element = _elements(base)
    return None if element is None else (Vector(element.real)(base, types.int64), code)


@intrinsic
def vstore(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index : index + LANES] = value, each rounded once."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.args[2]
        place = _place(builder, element, args[0], args[1], vector.lanes)
        bits = narrow(builder, element.element, args[2], vector.lanes)
        builder.store(bits, place, align=_item_bytes(element))
        return context.get_dummy_value()

    element = _elements(base)
    return None if element is None else (types.void(base, types.int64, Vector(element.real)), code)


def stream_bits(builder: Any, bits: Any, place: Any, size: int) -> None:
    """Store so many bytes around the cache, in whole lines where they are whole lines."""
    # As numbers of 64 bits, and so that LLVM cannot see what they are: it forgets the hint for some types.
    numbers = ir.VectorType(I64, size // 8)
    same = ir.InlineAsm(ir.FunctionType(ir.VectorType(I64, 8), [ir.VectorType(I64, 8)]), "", "=v,0")
    value = builder.bitcast(bits, numbers)
    if size == 64 and VECTOR_BYTES == 64:
        value = builder.call(same, [value])
    instruction = builder.store(value, builder.bitcast(place, numbers.as_pointer()), align=size)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


@intrinsic
def vstream_two(typing: Any, base: Any, index: Any, first: Any, second: Any) -> Any:
    """Like vstore of two vectors that follow one another, around the cache, in whole lines also where elements have 16
    bits; the place must be aligned to a cache line.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.args[2]
        place = _place(builder, element, args[0], args[1], vector.lanes)
        size = _item_bytes(element) * vector.lanes
        both = [narrow(builder, element.element, value, vector.lanes) for value in args[2:]]
        if size >= VECTOR_BYTES:
            stream_bits(builder, both[0], place, size)
            next_place = builder.gep(args[0], [builder.add(args[1], ir.Constant(I64, vector.lanes))])
            stream_bits(builder, both[1], next_place, size)
        else:
            everything = ir.Constant(ir.VectorType(I32, 2 * vector.lanes), list(range(2 * vector.lanes)))
            stream_bits(builder, builder.shuffle_vector(*both, everything), place, 2 * size)
        return context.get_dummy_value()

    element = _elements(base)
    if element is None:
        return None
    vector = Vector(element.real)
    return types.void(base, types.int64, vector, vector), code


@intrinsic(prefer_literal=True)
def prefetch(typing: Any, base: Any, index: Any, write: Any) -> Any:
    """Ask for the cache line of base[index] into the second-level cache, to be read (write = 0) or written (1).

    Any index is allowed: nothing happens where there is no memory.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.gep(args[0], [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [address.type, I32, I32, I32])
        known = builder.module.globals.get("llvm.prefetch.p0")
        function = known if known is not None else ir.Function(builder.module, kind, "llvm.prefetch.p0")
        rw = ir.Constant(I32, signature.args[2].literal_value)
        builder.call(
            function, [builder.bitcast(address, function.args[0].type), rw, ir.Constant(I32, 2), ir.Constant(I32, 1)]
        )
        return context.get_dummy_value()

    return types.void(base, types.int64, write), code


def _first(builder: Any, count: Any, width: int) -> Any:
    """A mask of the first `count` lanes."""
    numbers = ir.Constant(ir.VectorType(I32, width), list(range(width)))
    limit = builder.trunc(count, I32)
    undefined = ir.Constant(numbers.type, ir.Undefined)
    limits = builder.shuffle_vector(
        builder.insert_element(undefined, limit, ir.Constant(I32, 0)), undefined, ir.Constant(numbers.type, [0] * width)
    )
    return builder.icmp_signed("<", numbers, limits)


def _masked(builder: Any, operation: str, element: ElementType, width: int) -> Any:
    """LLVM's masked load or store of this many elements."""
    data = ir.VectorType(element.storage, width)
    address = ir.VectorType(element.storage, width).as_pointer()
    mask = ir.VectorType(ir.IntType(1), width)
    short = {"float32": "f32", "float64": "f64"}.get(element.element, "i16")
    name = f"llvm.masked.{operation}.v{width}{short}.p0"
    if operation == "load":
        kind = ir.FunctionType(data, [address, I32, mask, data])
    else:
        kind = ir.FunctionType(ir.VoidType(), [data, address, I32, mask])
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)


@intrinsic
def vload_some(typing: Any, base: Any, index: Any, count: Any) -> Any:
    """base[index : index + count] in the first lanes, 0 in the others; nothing beyond is read."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.return_type
        place = _place(builder, element, args[0], args[1], vector.lanes)
        mask = _first(builder, args[2], vector.lanes)
        function = _masked(builder, "load", element, vector.lanes)
        zero = ir.Constant(ir.VectorType(element.storage, vector.lanes), None)
        bits = builder.call(function, [place, ir.Constant(I32, _item_bytes(element)), mask, zero])
        return widen(builder, element.element, bits, vector.lanes)

    element = _elements(base)
    return None if element is None else (Vector(element.real)(base, types.int64, types.int64), code)


@intrinsic
def vstore_some(typing: Any, base: Any, index: Any, value: Any, count: Any) -> Any:
    """base[index : index + count] = the first lanes of value; nothing beyond is written."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = signature.args[0].dtype, signature.args[2]
        place = _place(builder, element, args[0], args[1], vector.lanes)
        mask = _first(builder, args[3], vector.lanes)
        bits = narrow(builder, element.element, args[2], vector.lanes)
        function = _masked(builder, "store", element, vector.lanes)
        builder.call(function, [bits, place, ir.Constant(I32, _item_bytes(element)), mask])
        return context.get_dummy_value()

    element = _elements(base)
    if element is None:
        return None
    return types.void(base, types.int64, Vector(element.real), types.int64), code


@intrinsic
def vfirst(typing: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes of value, 0 in the others (whatever stood there, NaN too)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        return builder.select(_first(builder, args[1], vector.lanes), args[0], ir.Constant(vector.llvm, None))

    return value(value, types.int64), code


@intrinsic
def vadd(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(args[0], args[1])


@intrinsic
def vsub(typing: Any, a: Any, b: Any) -> Any:
    """a - b."""
    return a(a, b), lambda context, builder, signature, args: builder.fsub(args[0], args[1])


@intrinsic
def vmul(typing: Any, a: Any, b: Any) -> Any:
    """a * b."""
    return a(a, b), lambda context, builder, signature, args: builder.fmul(args[0], args[1])


@intrinsic
def vfma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one operation where the machine has it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.return_type
        name = f"llvm.fmuladd.v{vector.lanes}{'f64' if vector.real is types.float64 else 'f32'}"
        kind = ir.FunctionType(vector.llvm, [vector.llvm] * 3)
        known = builder.module.globals.get(name)
        return builder.call(known if known is not None else ir.Function(builder.module, kind, name), args)

    return a(a, b, c), code


@intrinsic
def vwhere_positive(typing: Any, z: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where z > 0 or z is NaN, else b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(signature.return_type.llvm, None)
        return builder.select(builder.fcmp_unordered(">", args[0], zero), args[1], args[2])

    return a(z, a, b), code


@intrinsic
def vwhere_above(typing: Any, z: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where z > 0, else b (where z is NaN too)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(signature.return_type.llvm, None)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[1], args[2])

    return a(z, a, b), code


@intrinsic
def vsum(typing: Any, value: Any) -> Any:
    """The sum of the lanes, in float64 from 8 lanes down."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = signature.args[0]
        count, total = vector.lanes, args[0]
        while count > 1:
            if count <= 8 and total.type.element == ir.FloatType():
                total = builder.fpext(total, ir.VectorType(ir.DoubleType(), count))
            half = count // 2
            low = ir.Constant(ir.VectorType(I32, half), list(range(half)))
            high = ir.Constant(ir.VectorType(I32, half), list(range(half, count)))
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
            count = half
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float64(value), code


@intrinsic(prefer_literal=True)
def workspace(typing: Any, element: Any, count: Any) -> Any:
    """`count` (a literal) floats of the element's computing type on the stack, aligned to a cache line."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = signature.return_type.dtype.storage
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(item, signature.args[1].literal_value))
        place.align = 64
        return builder.bitcast(place, item.as_pointer())

    if not isinstance(count, types.IntegerLiteral):
        return None
    name = "float64" if element.real is types.float64 else "float32"
    return types.CPointer(ElementType(name))(element, count), code


@njit(forceinline=True, **INTERNAL)
def vtake(base, index, size, stop):  # type: ignore[no-untyped-def]
    """vload where size == stop (the number of lanes), vload_some else."""
    if size == stop:
        return vload(base, index)
    return vload_some(base, index, size)


@njit(forceinline=True, **INTERNAL)
def vput(base, index, value, size, stop):  # type: ignore[no-untyped-def]
    """vstore where size == stop (the number of lanes), vstore_some else."""
    if size == stop:
        vstore(base, index, value)
    else:
        vstore_some(base, index, value, size)


@njit(forceinline=True, **INTERNAL)
def prefetch_four(base, index, step, write, element):  # type: ignore[no-untyped-def]
    """Prefetch the cache lines of four vectors that follow one another."""
    prefetch(base, index, write)
    prefetch(base, index + 2 * step, write)
    if step * item_bytes(element) >= 64:
        prefetch(base, index + step, write)
        prefetch(base, index + 3 * step, write)


@njit(forceinline=True, **INTERNAL)
def new_line(i, step, element):  # type: ignore[no-untyped-def]
    """Whether the i-th element begins a vector whose cache line is not that of the vector before it."""
    return step * item_bytes(element) >= 64 or i % (2 * step) == 0
