"""What the Triton kernels do to one element or one Philox counter; see luqrun.quant.kernels.cuda.loops.

A code travels through a kernel as an int32 `value`: the code itself, or of a logarithmic format the bit pattern of the
float32 code. FLOATING: see luqrun.quant.formats.Format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luqrun.quant.kernels.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SAMPLE_SLOTS

MULTIPLIER0, MULTIPLIER1 = (tl.constexpr(word) for word in MULTIPLIERS)
INCREMENT0, INCREMENT1 = (tl.constexpr(word) for word in KEY_INCREMENTS)
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
SLOTS = tl.constexpr(SAMPLE_SLOTS)

FLOAT32_MAX = tl.constexpr(2.0**128 - 2.0**104)
BELOW_ONE = tl.constexpr(1 - 2.0**-24)
TWO_23 = tl.constexpr(2.0**23)
TWO_31 = tl.constexpr(2.0**31)
TWO_126 = tl.constexpr(2.0**126)
BITS_OF_ONE = tl.constexpr(0x3F800000)
BITS_OF_SMALLEST_NORMAL = tl.constexpr(0x00800000)
BITS_OF_TWO_23 = tl.constexpr(0x4B000000)
EXPONENT = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x007FFFFF)
HALF_MANTISSA = tl.constexpr(0x00400000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four random words for 4 counter words and 2 key words: uint32 tensors, or scalars where all share one."""
    for _ in tl.static_range(PHILOX_ROUNDS):
        # The low and the high half of a 64-bit product are one instruction.
        product0, product1 = c0.to(tl.uint64) * MULTIPLIER0, c2.to(tl.uint64) * MULTIPLIER1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + INCREMENT0, k1 + INCREMENT1
    return c0, c1, c2, c3


@triton.jit
def stream_words(stream, sample):
    """philox.stream_words, read from the int64 (6,) stream by every program: the host never sees it."""
    seed = tl.load(stream)
    c0 = (tl.load(stream + 1) * 4 + tl.load(stream + 2)).to(tl.uint32)
    c3 = (tl.load(stream + 5) * SLOTS + sample).to(tl.uint32)
    steps = tl.load(stream + 3).to(tl.uint32), tl.load(stream + 4).to(tl.uint32)
    return philox(c0, steps[0], steps[1], c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def side_by_side(a, b, c, d):
    """(rows, 4) of four tensors (rows,): the elements of a row stay in the registers of one thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def words_of_span(first, name, GROUPS: tl.constexpr):
    """Random words of the elements 4 first .. 4 (first + GROUPS) - 1, in order: uint32 (GROUPS, 4).

    first: scalar int64 and a multiple of GROUPS, a power of two, so that the low word cannot carry.
    """
    k0, k1, c2, c3 = name
    low = first.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
    w0, w1, w2, w3 = philox(low, (first >> 32).to(tl.uint32), c2, c3, k0, k1)
    return side_by_side(w0, w1, w2, w3)


@triton.jit
def words_of_groups(element, name):
    """The four random words, uint32, of each element, a multiple of 4, and the three after it; int64, any shape."""
    k0, k1, c2, c3 = name
    group = element >> 2
    return philox(group.to(tl.uint32), (group >> 32).to(tl.uint32), c2, c3, k0, k1)


@triton.jit
def words_of_elements(element, name):
    """The random word, uint32, of each element (int64, any shape): a Philox call each, of which it keeps a word."""
    w0, w1, w2, w3 = words_of_groups(element, name)
    odd, upper = (element & 1) != 0, (element & 2) != 0
    return tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def sawb_clip(sum1, sum2, count, C1: tl.constexpr, C2: tl.constexpr):
    """c1 sqrt(E[x^2]) - c2 E|x| of count elements, float32. C1, C2: bit patterns, since float64 literals lose bits."""
    c1 = tl.full((), C1, tl.int64).to(tl.float64, bitcast=True)
    c2 = tl.full((), C2, tl.int64).to(tl.float64, bitcast=True)
    count = tl.maximum(count, 1).to(tl.float64)
    return (c1 * tl.sqrt(sum2 / count) - c2 * (sum1 / count)).to(tl.float32)


@triton.jit
def scale_of(clip, limit, POW2: tl.constexpr):
    """Quantizer._scale, bit for bit; clip: float32 (), limit: float64 ().

    The quotient goes by way of float64, since Triton's division of float32 is approximate: see `encode`.
    """
    wide = clip.to(tl.float64)
    value = (wide / limit).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    # Among subnormals the next number is one bit more.
    bits += ((value.to(tl.float64) * limit < wide) & (bits < BITS_OF_SMALLEST_NORMAL)).to(tl.int32)
    if POW2:
        power = (bits + MANTISSA) & EXPONENT
        fits = power.to(tl.float32, bitcast=True).to(tl.float64) * limit <= FLOAT32_MAX
        finite = tl.abs(clip) <= FLOAT32_MAX
        bits = tl.where(fits | ~finite, power, bits & EXPONENT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scaling(scale, signed, FLOATING: tl.constexpr, LIMIT: tl.constexpr, UNSIGNED_LIMIT: tl.constexpr):
    """(float64 1 / scale, or 0 for a scale of 0 or NaN; the largest |code| of negative elements; of positive ones)."""
    divisor = tl.load(scale).to(tl.float64)
    usable = divisor > 0
    inverse = tl.where(usable, 1.0 / tl.where(usable, divisor, 1.0), 0.0)
    if FLOATING:
        lower, upper = tl.full((), LIMIT, tl.float32), tl.full((), LIMIT, tl.float32)
    else:
        both = tl.load(signed) != 0
        lower = tl.where(both, LIMIT, 0).to(tl.float32)
        upper = tl.where(both, LIMIT, UNSIGNED_LIMIT).to(tl.float32)
    return inverse, lower, upper


@triton.jit
def shift_of(magnitude, FLOATING: tl.constexpr):
    """Of a floating-point format: the codes next to a magnitude (float32 >= 0) are multiples of 2^this, int32."""
    exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(exponent - (FLOATING - 1), 0)


@triton.jit
def to_integer(magnitude, word, ROUNDING: tl.constexpr):
    """0 <= magnitude < 2^22, float32, to an integer, int32: ties to even, or by the random words."""
    if ROUNDING == "nearest":
        # Where a unit is the last place, the addition rounds, ties to even, and the mantissa is the integer.
        value = (magnitude + TWO_23).to(tl.int32, bitcast=True) - BITS_OF_TWO_23
    else:
        floor = magnitude.to(tl.int32)
        threshold = ((magnitude - floor.to(tl.float32)) * TWO_31).to(tl.int32)
        value = floor + ((word >> 1).to(tl.int32) < threshold).to(tl.int32)
    return value


@triton.jit
def rounded(ratio, word, FLOATING: tl.constexpr, ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr):
    """The values of ratios from 0 to the largest code, float32; the random words being uint32 like them, or None."""
    if FLOATING == 1:
        bits = ratio.to(tl.int32, bitcast=True)
        # 23 random bits (or one half) added to the mantissa carry into the exponent as often as they should.
        if ROUNDING == "stochastic":
            power = (bits + (word & MANTISSA).to(tl.int32)) & EXPONENT
        else:
            power = (bits + HALF_MANTISSA) & EXPONENT
        if UNDERFLOW == "stochastic":
            # Only for ratios below 1, but the conversion must be defined for all.
            up = (word >> 1).to(tl.int32) < (tl.minimum(ratio, BELOW_ONE) * TWO_31).to(tl.int32)
            below = tl.where(up, BITS_OF_ONE, 0)
        elif UNDERFLOW == "nearest":
            below = tl.where(ratio >= 0.5, BITS_OF_ONE, 0)
        else:
            below = tl.zeros_like(bits)
        value = tl.where(ratio >= 1, power, below)
    elif FLOATING > 1:
        shift = shift_of(ratio, FLOATING)
        steps = ratio * ((127 - shift) << 23).to(tl.float32, bitcast=True)  # exact: a power of two
        value = to_integer(steps, word, ROUNDING) << shift
    else:
        value = to_integer(ratio, word, ROUNDING)
    return value


@triton.jit
def encode(x, word, scales, FLOATING: tl.constexpr, ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr):
    """The values of x (float32), the random words being uint32 like x, or None; scales: from `scaling`.

    |x| * (1 / scale) rounded to float32 is the IEEE quotient, for much less than a division (whose slow path a zero
    takes): a quotient of two float32 is at least 2^-49 of itself away from where float32 rounds the other way, and
    the float64 product at most 2^-52 from the quotient. Below 2^-126 this fails; there all codes are 0 anyway.
    """
    inverse, lower, upper = scales
    x = tl.where(tl.abs(x) <= FLOAT32_MAX, x, 0.0)
    ratio = (tl.abs(x.to(tl.float64)) * inverse).to(tl.float32)
    limit = upper if FLOATING else tl.where(x < 0, lower, upper)
    return with_sign(rounded(tl.minimum(ratio, limit), word, FLOATING, ROUNDING, UNDERFLOW), x, FLOATING)


@triton.jit
def with_sign(value, x, FLOATING: tl.constexpr):
    """Values of magnitudes with the signs of x (float32); never -0."""
    if FLOATING == 1:
        # The addition turns -0 into 0.
        signed = (value | (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True) + 0.0
        value = signed.to(tl.int32, bitcast=True)
    else:
        value = tl.where(x < 0, -value, value)
    return value


@triton.jit
def value_as(value, FLOATING: tl.constexpr, dtype: tl.constexpr):
    """The codes that `value` stands for, as dtype."""
    if FLOATING == 1:
        number = value.to(tl.float32, bitcast=True)
        codes = number.to(dtype) if dtype.is_floating() else number.to(tl.int32).to(dtype)
    else:
        codes = value.to(tl.float32).to(dtype) if dtype.is_floating() else value.to(dtype)
    return codes


@triton.jit
def value_of(codes, FLOATING: tl.constexpr):
    """The inverse of `value_as`, for codes of any dtype."""
    number = codes.to(tl.float32)
    return number.to(tl.int32, bitcast=True) if FLOATING == 1 else number.to(tl.int32)


@triton.jit
def to_field(value, FLOATING: tl.constexpr, BITS: tl.constexpr):
    """Format.to_fields, int32."""
    if FLOATING == 1:
        # The exponent field of 4 * code ends in 1 for code 1, and is 0 for code 0.
        bits = (value.to(tl.float32, bitcast=True) * 4.0).to(tl.uint32, bitcast=True)
        exponent, sign = bits >> 23, (bits >> 31) << (BITS - 1)
        field = ((exponent & ((1 << (BITS - 1)) - 1)) | sign).to(tl.int32)
    elif FLOATING > 1:
        magnitude = tl.abs(value)
        shift = shift_of(magnitude.to(tl.float32), FLOATING)
        field = ((shift << (FLOATING - 1)) + (magnitude >> shift)) | (tl.where(value < 0, 1, 0) << (BITS - 1))
    else:
        field = value & ((1 << BITS) - 1)
    return field


@triton.jit
def from_field(field, signed, FLOATING: tl.constexpr, BITS: tl.constexpr):
    """Format.from_fields: the values of int32 fields; signed: scalar bool, for integer formats."""
    sign, index = field >> (BITS - 1), field & ((1 << (BITS - 1)) - 1)
    if FLOATING == 1:
        # The exponent 1 of the field 1, and of 2^-126, becomes that of code 1; 0 stays 0.
        number = ((index << 23) | (sign << 31)).to(tl.float32, bitcast=True) * TWO_126
        value = number.to(tl.int32, bitcast=True)
    elif FLOATING > 1:
        shift = tl.maximum((index >> (FLOATING - 1)) - 1, 0)
        magnitude = (index - (shift << (FLOATING - 1))) << shift
        value = tl.where(sign != 0, -magnitude, magnitude)
    else:
        value = field - (tl.where(signed, sign, 0) << BITS)
    return value


@triton.jit
def magnitude_bits(x):
    """Bit patterns of |x| (float32), int32: they order as the numbers do, and NaN comes out above Inf."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def load(pointer, inside):
    """float32 elements, 0 where not inside."""
    x = tl.load(pointer, mask=inside, other=0)
    if x.dtype == tl.bfloat16:
        # By hand: its sign bit then stays where it is of use.
        number = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        number = x.to(tl.float32)
    return number
