"""Compiled loops (numba) that encode one row of a tensor, short enough for the first-level cache.

`bits` are int32, the bit patterns of float32.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from luqrun.quant.kernels.cpu.rows import HAS_FMA, NEAREST, STOCHASTIC, f32, i32, row_loop, u32

ONE = i32(0x3F800000)  # the pattern of 1


@intrinsic
def bits_of(typingctx, x):
    """The bit pattern of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):
    """The float32 of a bit pattern: the way back of bits_of."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def fma(typingctx, x, y, z):
    """x y + z of float32, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _unsigned(typingctx, x):
    """A float32 that is 0 .. 2^32 - 1, truncated to uint32: numba itself goes by way of 64 bits."""

    def codegen(context, builder, signature, args):
        return builder.fptoui(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@intrinsic
def integer_of(typingctx, x):
    """A float32 of less than 2^31, truncated to int32: see `_unsigned`."""

    def codegen(context, builder, signature, args):
        return builder.fptosi(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@row_loop()
def quotient(x, scale, inverse):
    """x / scale, rounded as IEEE's division and faster; inverse: 1 / scale, rounded.

    The guess is off by 2^-23 of itself at most, and what the last rounding gets by 2^-46: enough, since of the pairs
    of floats whose quotient is so near to the middle between two (tests/quant/test_encode.py tries all) none is rounded
    the other way. Nothing may overflow or underflow: this holds for a scale that `is_swift` and quotients from 2^-60
    to 2^60. Smaller ones come out below 2^-50.
    """
    guess = x * inverse
    return fma(fma(-scale, guess, x), inverse, guess)


@row_loop()
def is_swift(scale):
    """Whether `quotient` may divide by this scale."""
    return HAS_FMA and scale >= f32(2.0**-40) and scale <= f32(2.0**40)


@row_loop()
def _encode_powers(bits, out, words, scale, high, rounding, underflow, finite, swift):
    x, inverse, bound = bits.view(np.float32), f32(1) / scale, f32(2) * high * scale
    for j in range(x.size):
        if not swift:
            ratio = min(abs(x[j]) / scale, high)
        elif finite:
            ratio = quotient(abs(x[j]), scale, inverse)
        else:
            ratio = min(quotient(min(abs(x[j]), bound), scale, inverse), high)
        # Patterns of floats >= 0 are in their order, and integers' units have time. A carry out of the mantissa is the
        # step to the next power. Below 1 there is none: the power is 1.
        pattern = bits_of(ratio)
        carry = i32(words[j] & u32(0x7FFFFF)) if rounding == STOCHASTIC else i32(0x400000)
        power = i32(i32(max(pattern, ONE) + carry) & i32(0x7F800000))
        if underflow == STOCHASTIC:  # 31 bits of a word against min(ratio, 1) * 2^31
            kept = u32(words[j] >> u32(1)) < _unsigned(float_of(i32(min(pattern, ONE) + i32(31 << 23))))
        elif underflow == NEAREST:
            kept = ratio >= f32(0.5)
        else:
            kept = ratio >= f32(1)
        code = i32(float_of(i32(power | i32(bits[j] & i32(-2147483648))))) if kept else i32(0)
        out[j] = code if finite or i32(bits[j] & i32(0x7FFFFFFF)) < i32(0x7F800000) else i32(0)


@row_loop()
def _encode_integers(bits, out, words, scale, low, high, rounding, swift):
    # swift: to nearest, of finite elements, and by a scale that `is_swift`.
    x, inverse, least, most = bits.view(np.float32), f32(1) / scale, low * scale, high * scale
    for j in range(x.size):
        # To nearest, clipping before is clipping after: what is beyond has a quotient that rounds to the end.
        clipped = min(max(x[j], least), most)
        value = quotient(clipped, scale, inverse) if swift else min(max(x[j] / scale, low), high)
        if rounding == NEAREST:
            code = i32(np.rint(value))
        else:
            # Of the magnitude: there the fraction is exact, also for a tiny negative value.
            floor = np.floor(abs(value))
            code = i32(floor) + i32(i32(words[j] >> u32(1)) < i32((abs(value) - floor) * f32(2147483648)))
            code = -code if bits[j] < i32(0) else code
        out[j] = code if swift or i32(bits[j] & i32(0x7FFFFFFF)) < i32(0x7F800000) else i32(0)


@row_loop()
def _encode_floats(bits, out, words, scale, high, mantissa, rounding, swift):
    x, inverse, bound = bits.view(np.float32), f32(1) / scale, f32(2) * high * scale
    for j in range(x.size):
        ratio = quotient(min(abs(x[j]), bound), scale, inverse) if swift else abs(x[j]) / scale
        ratio = min(ratio, high)
        # Codes from 2^mantissa on are multiples of a power of two.
        shift = max(i32(i32(i32(bits_of(ratio) >> i32(23)) - i32(127)) - mantissa), i32(0))
        steps = ratio * float_of(i32(i32(i32(127) - shift) << i32(23)))
        if rounding == NEAREST:
            steps = np.rint(steps)
        else:
            floor = np.floor(steps)
            up = i32(words[j] >> u32(1)) < integer_of((steps - floor) * f32(2147483648))
            steps = floor + (f32(1) if up else f32(0))
        code = i32(integer_of(steps) << shift)
        code = i32(-code) if bits[j] < i32(0) else code
        out[j] = code if i32(bits[j] & i32(0x7FFFFFFF)) < i32(0x7F800000) else i32(0)


@row_loop()
def powers(bits, out, words, scale, high, rounding, underflow, finite):
    """Encode one row in a logarithmic format, all 1-D; words may be longer. finite: no element is Inf or NaN, whose
    codes are 0, nor, where the scale `is_swift`, beyond high * scale.

    What LUQ uses gets loops of its own, with scales that are neither tiny nor huge: LLVM keeps tests of several flags
    in a loop. So it is in the other formats.
    """
    if not scale > f32(0):
        out[:] = 0
    elif rounding == STOCHASTIC and underflow == STOCHASTIC and is_swift(scale):
        if finite:
            _encode_powers(bits, out, words, scale, high, STOCHASTIC, STOCHASTIC, True, True)
        else:
            _encode_powers(bits, out, words, scale, high, STOCHASTIC, STOCHASTIC, False, True)
    else:
        _encode_powers(bits, out, words, scale, high, rounding, underflow, False, False)


@row_loop()
def floats(bits, out, words, scale, high, floating, rounding):
    """Encode one row in a format with a mantissa. floating: see Format."""
    mantissa = i32(floating - 1)
    if not scale > f32(0):
        out[:] = 0
    elif not is_swift(scale):
        _encode_floats(bits, out, words, scale, high, mantissa, rounding, False)
    elif rounding == NEAREST:
        _encode_floats(bits, out, words, scale, high, mantissa, NEAREST, True)
    else:
        _encode_floats(bits, out, words, scale, high, mantissa, STOCHASTIC, True)


@row_loop()
def integers(bits, out, words, scale, low, high, rounding, finite):
    """Encode one row in an integer format. finite: no element is Inf or NaN, whose codes are 0."""
    if not scale > f32(0):
        out[:] = 0
    elif rounding == NEAREST and finite and is_swift(scale):
        _encode_integers(bits, out, words, scale, low, high, NEAREST, True)
    else:
        _encode_integers(bits, out, words, scale, low, high, rounding, False)
