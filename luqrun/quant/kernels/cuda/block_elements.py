"""What the Triton kernels do to the scale of a block, and to its elements by that scale: see block_loops.

Scales are float32, and NaN where a block has none. KIND: the name of their format. The other constants are those of
luqrun.quant.encoding.Encoding and of its format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luqrun.quant.kernels.cuda.elements import (
    EXPONENT,
    FLOAT32_MAX,
    HALF_MANTISSA,
    MAGNITUDE,
    MANTISSA,
    rounded,
    to_integer,
    value_as,
)

E4M3_LIMIT = tl.constexpr(448.0)
SMALLEST = tl.constexpr(2.0**-149)
BEYOND = tl.constexpr(2.0**200)  # of float64: whatever it multiplies lies beyond the largest code
BITS_OF_INVERSE = tl.constexpr(0x7F000000)  # bits of 1 / 2^k and of 2^k, both normal, add up to it
E4M3_BIAS = tl.constexpr(127 - 7)


@triton.jit
def quotient(x, y):
    """x / y of float32, rounded once; by way of float64, since Triton's division of float32 is approximate."""
    return (x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)


@triton.jit
def power_of_two(exponent):
    """2^exponent; exponent: int32 from -127 to 127."""
    bits = tl.where(exponent > -127, (exponent + 127) << 23, HALF_MANTISSA)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x, word, ROUNDING: tl.constexpr):
    """x >= 0, not NaN, to e4m3, at most 448: to the nearest, ties to even, or by the random words to a neighbour."""
    x = tl.minimum(x, E4M3_LIMIT)
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    step = tl.minimum(tl.maximum(exponent, -6), 8) - 3
    return to_integer(x * power_of_two(-step), word, ROUNDING).to(tl.float32) * power_of_two(step)


@triton.jit
def scale_of(
    clip, encode_scale, FINER: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The scales of blocks whose ranges end on `clip`. encode_scale: of e4m3. FINER: what wanted scales are multiplied
    by, for four over six. TOP: a number that float32 holds."""
    known = clip <= FLOAT32_MAX
    clip = tl.where(known, clip, 0.0)
    if KIND == "e8m0":
        exponent = ((clip.to(tl.int32, bitcast=True) + CARRY) >> 23) - 127 - SHIFT
        scale = power_of_two(tl.minimum(tl.maximum(exponent, -127), 127))
    else:
        scale = quotient(clip, tl.full((), TOP, tl.float32))
        if KIND == "e4m3":
            scale = scale * encode_scale
            known = known & (scale <= FLOAT32_MAX)
            scale = to_e4m3(tl.where(known, scale, 0.0) * FINER, None, "nearest")
    return tl.where(known, scale, float("nan"))


@triton.jit
def inverse_of(scale, tensor_scale, KIND: tl.constexpr, UNIT: tl.constexpr):
    """What elements are multiplied by before they are rounded (of fp32, float64): 0 where the scale is 0 or NaN."""
    usable = (scale > 0) & (scale <= FLOAT32_MAX)
    if KIND == "e8m0":
        bits = tl.where(usable, scale, 1.0).to(tl.int32, bitcast=True)
        # The smallest scale, 2^-127, and the inverse of the largest are subnormal.
        inverse = tl.where(bits == BITS_OF_INVERSE, HALF_MANTISSA, BITS_OF_INVERSE - (bits & EXPONENT))
        inverse = inverse.to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        product = tl.where(usable, scale, 1.0) * tensor_scale
        inverse = tl.minimum(quotient(tl.full((), 1.0, tl.float32), tl.maximum(product, SMALLEST)), FLOAT32_MAX)
    else:
        divisor = (tl.where(usable, scale, 1.0) * UNIT).to(tl.float64)
        inverse = tl.where(divisor > 0, 1.0 / tl.where(divisor > 0, divisor, 1.0), BEYOND)
    return tl.where(usable, inverse, 0.0)


@triton.jit
def value_in_block(
    number, inverse, word, KIND: tl.constexpr, UNIT: tl.constexpr, LIMIT: tl.constexpr, FLOATING: tl.constexpr,
    ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr,
):  # fmt: skip
    """The values (elements.py) of magnitudes; number: finite float32, inverse: of `inverse_of`."""
    if KIND == "fp32":
        # The IEEE quotient: see elements.encode.
        ratio = (tl.abs(number).to(tl.float64) * inverse).to(tl.float32)
    else:
        ratio = tl.abs(number) * inverse * (1.0 / UNIT)
    return rounded(tl.minimum(ratio, LIMIT), word, FLOATING, ROUNDING, UNDERFLOW)


@triton.jit
def decoded(value, scale, UNIT: tl.constexpr, FLOATING: tl.constexpr):
    """Codes times their scale, float32."""
    return value_as(value, FLOATING, tl.float32) * (scale * UNIT)


@triton.jit
def store_scale(pointer, scale, inside, KIND: tl.constexpr):
    """Scales as scale_formats.to_bytes has them."""
    if KIND == "fp32":
        tl.store(pointer, scale, mask=inside)
    else:
        known = scale <= FLOAT32_MAX
        bits = tl.where(known, scale, 0.0).to(tl.int32, bitcast=True)
        if KIND == "e8m0":
            byte = tl.where(known, bits >> 23, 255)
        else:
            normal = (((bits >> 23) - E4M3_BIAS) << 3) | ((bits & MANTISSA) >> 20)
            small = (tl.where(known, scale, 0.0) * 512.0).to(tl.int32)
            byte = tl.where(known, tl.where(bits >> 23 > E4M3_BIAS, normal, small), 127)
        tl.store(pointer, byte.to(tl.uint8), mask=inside)


@triton.jit
def load_scale(pointer, inside, KIND: tl.constexpr):
    """The inverse of `store_scale`."""
    stored = tl.load(pointer, mask=inside, other=0)
    if KIND == "fp32":
        scale = stored
    elif KIND == "e8m0":
        byte = stored.to(tl.int32)
        scale = tl.where(byte == 255, float("nan"), power_of_two(tl.minimum(byte, 254) - 127))
    else:
        byte = stored.to(tl.int32)
        normal = (((byte >> 3) + E4M3_BIAS) << 23) | ((byte & 7) << 20)
        small = byte.to(tl.float32) * (1.0 / 512)
        scale = tl.where(byte > 7, normal.to(tl.float32, bitcast=True), small)
        scale = tl.where(byte == 127, float("nan"), scale)
    return scale


@triton.jit
def store_values(pointer, values, inside):
    """float32 as the pointer's type, float32 or bf16."""
    if pointer.dtype.scalar.element_ty == tl.bfloat16:
        # By hand, to nearest with ties to even: Triton's interpreter would cut bits off.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where((bits & MAGNITUDE) > EXPONENT, 0x7FC0, nearest)
        tl.store(pointer, nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(pointer, values, mask=inside)
