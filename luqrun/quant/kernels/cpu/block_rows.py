"""Compiled loops (numba) over a panel of blocks, short enough for the second-level cache: `blocks` drives them.

A panel holds `count` blocks of (high, wide) beside each other, row by row: element (r, j, c) of block j is at
(r * count + j) * wide + c. Where sums are rounded they go through a block in its own order, as luqrun.quant.kernels.
blocks has them.
"""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu.encode import bits_of, float_of, integer_of
from luqrun.quant.kernels.cpu.rows import NEAREST, STOCHASTIC, f32, i32, row_loop, u8, u32, u64

MANTISSA, MAGNITUDE = i32(0x7FFFFF), i32(0x7FFFFFFF)
EXPONENT127 = i32(0x7F000000)  # the bits of 2^127, whose inverse is subnormal
FLOAT32_MAX = f32(3.4028234663852886e38)
E8M0, E4M3, FP32 = 0, 1, 2  # scale formats
MSE, MAE = 1, 2  # what four over six compares
SMALLEST = i32(-127)  # the exponent of e8m0's smallest scale


@row_loop()
def _largest(bits, at, count):
    largest = i32(0)
    for c in range(count):
        largest = max(largest, i32(bits[at + c] & MAGNITUDE))
    return largest


@row_loop()
def _fill(out, at, count, value):
    for c in range(count):
        out[at + c] = value


@row_loop()
def maxima(bits, found, high, count, wide):
    """found[j]: the bit pattern of block j's max|x|; NaN comes out above Inf."""
    found[:count] = 0
    for r in range(u64(high)):
        for j in range(u64(count)):
            if wide == 1:
                found[j] = max(found[j], i32(bits[r * u64(count) + j] & MAGNITUDE))
            else:
                at = (r * u64(count) + j) * u64(wide)
                if wide == 16:  # a number of turns that is known makes a vector of them
                    found[j] = max(found[j], _largest(bits, at, u64(16)))
                elif wide == 32:
                    found[j] = max(found[j], _largest(bits, at, u64(32)))
                else:
                    found[j] = max(found[j], _largest(bits, at, u64(wide)))


@row_loop()
def product_terms(x, y, factor, terms, size):
    """The products of a row and another one times a factor, in float64."""
    for j in range(u64(size)):
        terms[j] = np.float64(x[j]) * np.float64(f32(y[j] * factor))


@row_loop()
def error_terms(x, decoded, tensor_scale, terms, size, kind):
    """What decoded values, times the tensor's scale, differ from x by: squared (MSE) or as it is, in float64."""
    if kind == MSE:
        for j in range(u64(size)):
            difference = np.float64(f32(f32(decoded[j] * tensor_scale) - x[j]))
            terms[j] = difference * difference
    else:
        for j in range(u64(size)):
            terms[j] = np.float64(abs(f32(f32(decoded[j] * tensor_scale) - x[j])))


@row_loop()
def add_up(terms, sums, high, count, wide):
    """sums[j]: of block j's terms, one after the other. Four blocks take turns: no addition waits for another."""
    sums[:count] = 0.0
    for r in range(u64(high)):
        if wide == 1:
            for j in range(u64(count)):
                sums[j] += terms[r * u64(count) + j]
        else:
            at, last = r * u64(count) * u64(wide), u64(count) // u64(4) * u64(4)
            for j in range(u64(0), last, u64(4)):
                one, two, three, four = sums[j], sums[j + u64(1)], sums[j + u64(2)], sums[j + u64(3)]
                first = at + j * u64(wide)
                for c in range(u64(wide)):
                    one += terms[first + c]
                    two += terms[first + u64(wide) + c]
                    three += terms[first + u64(2 * wide) + c]
                    four += terms[first + u64(3 * wide) + c]
                sums[j], sums[j + u64(1)], sums[j + u64(2)], sums[j + u64(3)] = one, two, three, four
            for j in range(last, u64(count)):
                for c in range(u64(wide)):
                    sums[j] += terms[at + j * u64(wide) + c]


@row_loop()
def power_of_two(exponent):
    """2^exponent, exponent: int32 from -149 to 127."""
    normal = i32(i32(exponent + i32(127)) << i32(23))
    subnormal = i32(i32(1) << i32(min(max(i32(exponent + i32(149)), i32(0)), i32(22))))
    return float_of(normal if exponent >= i32(-126) else subnormal)


@row_loop()
def e8m0_scales(clips, scales, count, carry, shift):
    """scale_formats.e8m0_exponent's powers of two; NaN for a clip that is not finite."""
    for j in range(count):
        pattern = bits_of(clips[j])
        exponent = i32(i32(i32(i32(pattern + carry) >> i32(23)) - i32(127)) - shift)
        power = power_of_two(min(max(exponent, SMALLEST), i32(127)))
        scales[j] = power if clips[j] <= FLOAT32_MAX else f32(np.nan)


@row_loop()
def _e4m3_step(x):
    exponent = i32(i32(bits_of(x) >> i32(23)) - i32(127))
    return power_of_two(i32(min(max(exponent, i32(-6)), i32(8)) - i32(3)))


@row_loop()
def round_e4m3(x):
    """scale_formats.round_e4m3 of a number that is not NaN."""
    x = min(x, f32(448))
    step = _e4m3_step(x)
    return np.rint(x / step) * step


@row_loop()
def correct(squares, products, scales, words, count):
    """Scales times squares / products, or times 1 where that is not positive; drawn (scale_formats.draw_e4m3), but for
    a NaN."""
    for j in range(count):
        known, whole = scales[j] <= FLOAT32_MAX, products[j] > 0
        gain = f32(squares[j] / (products[j] if whole else 1.0))
        x = f32((gain if whole else f32(1)) * scales[j])
        x = min(x, f32(448)) if known else f32(0)
        step = _e4m3_step(x)
        ratio = x / step
        floor = np.floor(ratio)
        up = i32(words[j] >> u32(1)) < integer_of((ratio - floor) * f32(2147483648))
        drawn = (floor + (f32(1) if up else f32(0))) * step
        scales[j] = drawn if known else scales[j]


@row_loop()
def choose(errors, others, finer, scales, better, count):
    """Scales become the finer ones, and better 1, where errors are less than others; else better is 0."""
    for j in range(count):
        less = errors[j] < others[j]
        scales[j] = finer[j] if less else scales[j]
        better[j] = f32(1) if less else f32(0)


@row_loop()
def take_better(better, found, target, high, run):
    """What was found of `high` rows, where the element of a row is better."""
    for r in range(u64(high)):
        for j in range(u64(run)):
            one, other = found[r * u64(run) + j], target[r * u64(run) + j]
            target[r * u64(run) + j] = one if better[j] != f32(0) else other


@row_loop()
def e4m3_scales(clips, scales, count, top, encode_scale, factor):
    """The scales of FACTS 2.1, `factor` times as large (four over six)."""
    for j in range(count):
        wanted = f32(f32(clips[j] / top) * encode_scale)
        known = wanted <= FLOAT32_MAX
        scales[j] = round_e4m3(f32(wanted * factor) if known else f32(0)) if known else f32(np.nan)


@row_loop()
def inverses(scales, tensor_scale, out, count):
    """What blocks with e4m3 scales are multiplied by."""
    for j in range(count):
        inverse = f32(1) / f32(scales[j] * tensor_scale)
        out[j] = min(inverse, FLOAT32_MAX) if scales[j] > f32(0) else f32(0)


@row_loop()
def expand(of_blocks, out, count, wide):
    """A number of each block for each element of a row of the panel."""
    for j in range(u64(count)):
        at = j * u64(wide)
        if wide == 16:
            _fill(out, at, u64(16), of_blocks[j])
        elif wide == 32:
            _fill(out, at, u64(32), of_blocks[j])
        else:
            _fill(out, at, u64(wide), of_blocks[j])


@row_loop()
def gather(source, out, start, stride, high, run):
    """`high` runs of memory, from `start` on and a stride apart, one after the other."""
    for r in range(u64(high)):
        at, to = u64(start) + r * u64(stride), r * u64(run)
        for j in range(u64(run)):
            out[to + j] = source[at + j]


@row_loop()
def scatter(row, target, start, stride, high, run):
    """The inverse of `gather`."""
    for r in range(u64(high)):
        to, at = u64(start) + r * u64(stride), r * u64(run)
        for j in range(u64(run)):
            target[to + j] = row[at + j]


@row_loop()
def scale_by(x, factor, out, count):
    for j in range(count):
        out[j] = x[j] * factor


@row_loop()
def as_floats(bits, out, count):
    for j in range(count):
        out[j] = float_of(bits[j])


@row_loop()
def fp32_scales(clips, scales, count, top):
    """NaN for a clip that is not finite."""
    for j in range(count):
        scales[j] = f32(clips[j] / top) if clips[j] <= FLOAT32_MAX else f32(np.nan)


@row_loop()
def inverse_powers(scales, out, count):
    """1 / scale of powers of two, which is exact; 0 where the scale is NaN."""
    for j in range(count):
        pattern = bits_of(scales[j])
        normal = i32(i32(0x7F000000) - pattern)
        tiny = i32(0x7F000000)  # of 2^-127, a subnormal
        inverse = float_of(
            tiny if pattern < i32(0x00800000) else (i32(0x00400000) if pattern == EXPONENT127 else normal)
        )
        out[j] = inverse if scales[j] <= FLOAT32_MAX else f32(0)


@row_loop()
def divisors(scales, unit, out, count):
    """What blocks with float32 scales are divided by: NaN for a scale that is not finite or 0."""
    for j in range(count):
        valid = scales[j] > f32(0) and scales[j] <= FLOAT32_MAX
        out[j] = scales[j] * unit if valid else f32(np.nan)


@row_loop()
def _code(x, by, per_unit, high, word, mantissa, multiplies, rounding):
    """See code_blocks."""
    magnitude = f32(abs(x) * by) * per_unit if multiplies else abs(x) / by
    magnitude = high if magnitude > high else magnitude
    magnitude = (
        magnitude if magnitude > f32(0) else f32(0)
    )  # NaN: of a scale that is NaN, or so small that its unit is 0
    exponent = i32(i32(bits_of(magnitude) >> i32(23)) - i32(127))
    shift = max(i32(exponent - mantissa), i32(0))
    steps = magnitude * float_of(i32(i32(i32(127) - shift) << i32(23)))
    if rounding == STOCHASTIC:
        floor = np.floor(steps)
        up = i32(word >> u32(1)) < integer_of((steps - floor) * f32(2147483648))
        steps = floor + (f32(1) if up else f32(0))
    else:
        steps = np.rint(steps)
    code = steps * float_of(i32(i32(i32(127) + shift) << i32(23)))
    return -code if x < f32(0) else code


@row_loop()
def _code_rows(x, by, units, words, codes, values, high, run, per_unit, top, mantissa, multiplies, rounding):
    for r in range(u64(high)):
        row = r * u64(run)
        for j in range(u64(run)):
            code = _code(x[row + j], by[j], per_unit, top, words[row + j], mantissa, multiplies, rounding)
            codes[row + j], values[row + j] = code, code * units[j]


@row_loop()
def code_rows(x, by, units, words, codes, values, high, run, per_unit, top, mantissa, multiplies, rounding):
    """Codes (float32) of `high` rows of `run` elements and, times the units, values.

    by, units: of each element of a row. by: what it is multiplied by before per_unit, 0 where the scale is 0 or NaN; or
    what it is divided by (NaN). top: the largest code. mantissa: of the format; one too large for any exponent gives
    integers.
    """
    how = high, run, per_unit, top, mantissa
    if rounding == STOCHASTIC:
        if multiplies:
            _code_rows(x, by, units, words, codes, values, *how, True, STOCHASTIC)
        else:
            _code_rows(x, by, units, words, codes, values, *how, False, STOCHASTIC)
    elif multiplies:
        _code_rows(x, by, units, words, codes, values, *how, True, NEAREST)
    else:
        _code_rows(x, by, units, words, codes, values, *how, False, NEAREST)


@row_loop()
def decode_rows(codes, units, values, high, run):
    """Codes of `high` rows times the units of each."""
    for r in range(u64(high)):
        for j in range(u64(run)):
            values[r * u64(run) + j] = codes[r * u64(run) + j] * units[j]


@row_loop()
def to_fields(codes, fields, mantissa, bits):
    """Format.to_fields of codes (float32). mantissa 0: an integer format."""
    sign, every = i32(i32(1) << i32(bits - 1)), i32(i32(i32(1) << i32(bits)) - i32(1))
    if mantissa > i32(0):
        for j in range(codes.size):
            magnitude = abs(codes[j])
            exponent = i32(i32(bits_of(magnitude) >> i32(23)) - i32(127))
            shift = max(i32(exponent - mantissa), i32(0))
            steps = integer_of(magnitude * float_of(i32(i32(i32(127) - shift) << i32(23))))
            index = i32(i32(shift << mantissa) + steps)
            fields[j] = u8(i32(index | (sign if codes[j] < f32(0) else i32(0))))
    else:
        for j in range(codes.size):
            fields[j] = u8(i32(integer_of(codes[j]) & every))


@row_loop()
def store_scales(scales, out, bytes_out, count, kind):
    """Scales as scale_formats.to_bytes has them, or as float32."""
    for j in range(count):
        known = scales[j] <= FLOAT32_MAX
        pattern = bits_of(scales[j])
        exponent = i32(pattern >> i32(23))
        if kind == E8M0:
            bytes_out[j] = u8(exponent) if known else u8(255)
        elif kind == E4M3:
            normal = i32(i32(exponent - i32(120)) << i32(3)) | i32(i32(pattern & MANTISSA) >> i32(20))
            small = integer_of((scales[j] if known else f32(0)) * f32(512))
            byte = normal if exponent >= i32(121) else small
            bytes_out[j] = u8(byte) if known else u8(127)
        else:
            out[j] = scales[j]


@row_loop()
def load_scales(stored, bytes_in, scales, count, kind):
    """The inverse of `store_scales`."""
    for j in range(count):
        if kind == FP32:
            scales[j] = stored[j]
        elif kind == E8M0:
            byte = i32(bytes_in[j])
            scales[j] = f32(np.nan) if byte == i32(255) else power_of_two(i32(byte - i32(127)))
        else:
            byte = i32(bytes_in[j])
            exponent, mantissa = i32(byte >> i32(3)), i32(byte & i32(7))
            normal = float_of(i32(i32(i32(exponent + i32(120)) << i32(23)) | i32(mantissa << i32(20))))
            value = normal if exponent > i32(0) else f32(mantissa) * f32(1 / 512)
            scales[j] = f32(np.nan) if byte == i32(127) else value
