"""float16 to float32 and back by integer arithmetic, for machines without instructions for it.

Every value is exact, subnormal numbers too; rounding is to nearest, ties to even; Inf stays Inf, and NaN stays NaN with
its sign and the upper bits of its payload, as the instructions have it. ``lanes`` = 0 means one value.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

I16 = ir.IntType(16)
I32 = ir.IntType(32)
FLOAT = ir.FloatType()

BIAS = (127 - 15) << 23  # between the exponents of float16 and float32
LEAST = 0x38800000  # 2**-14, the least normal float16
BEYOND = 0x47800000  # 2**16: from here on Inf
HALF = 0x3F000000  # 0.5, whose last bit is worth 2**-24, as that of a subnormal float16 is


def shaped(scalar: ir.Type, lanes: int) -> ir.Type:
    """The scalar type, or a vector of it."""
    return ir.VectorType(scalar, lanes) if lanes else scalar


def splat(scalar: ir.Type, value: float, lanes: int) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(shaped(scalar, lanes), [value] * lanes if lanes else value)


def half_to_float(builder: Any, value: Any, lanes: int) -> Any:
    """float32 from the 16 bits of float16."""

    def number(n: int) -> ir.Constant:
        return splat(I32, n, lanes)

    bits = builder.zext(value, shaped(I32, lanes))
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    size = builder.and_(bits, number(0x7FFF))
    shifted = builder.shl(size, number(13))
    normal = builder.add(shifted, number(BIAS))
    subnormal = builder.fmul(builder.sitofp(size, shaped(FLOAT, lanes)), splat(FLOAT, 2.0**-24, lanes))
    found = builder.select(
        builder.icmp_unsigned("<", size, number(0x400)), builder.bitcast(subnormal, bits.type), normal
    )
    found = builder.select(
        builder.icmp_unsigned(">=", size, number(0x7C00)), builder.or_(shifted, number(0x7F800000)), found
    )
    quiet = builder.or_(found, number(0x400000))
    found = builder.select(builder.icmp_unsigned(">", size, number(0x7C00)), quiet, found)
    return builder.bitcast(builder.or_(found, sign), shaped(FLOAT, lanes))


def float_to_half(builder: Any, value: Any, lanes: int) -> Any:
    """The 16 bits of float16 from float32."""

    def number(n: int) -> ir.Constant:
        return splat(I32, n, lanes)

    bits = builder.bitcast(value, shaped(I32, lanes))
    sign = builder.lshr(builder.and_(bits, number(0x80000000)), number(16))
    size = builder.and_(bits, number(0x7FFFFFFF))
    upper = builder.lshr(size, number(13))
    odd = builder.and_(upper, number(1))
    nearest = builder.add(builder.sub(size, number(BIAS)), builder.add(odd, number(0xFFF)))
    normal = builder.lshr(nearest, number(13))  # a carry from the largest numbers gives Inf
    shifted = builder.fadd(builder.bitcast(size, shaped(FLOAT, lanes)), splat(FLOAT, 0.5, lanes))
    subnormal = builder.sub(builder.bitcast(shifted, bits.type), number(HALF))
    found = builder.select(builder.icmp_unsigned("<", size, number(LEAST)), subnormal, normal)
    found = builder.select(builder.icmp_unsigned(">=", size, number(BEYOND)), number(0x7C00), found)
    nan = builder.or_(builder.and_(upper, number(0x3FF)), number(0x7E00))
    found = builder.select(builder.icmp_unsigned(">", size, number(0x7F800000)), nan, found)
    return builder.trunc(builder.or_(found, sign), shaped(I16, lanes))
