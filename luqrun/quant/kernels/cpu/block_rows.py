"""Compiled loops (numba) over a panel of blocks, short enough for the second-level cache: `blocks` drives them.

A panel holds `count` blocks of (high, wide) beside each other, row by row: element (r, j, c) of block j is at
(r * count + j) * wide + c. `block_sums` adds up blocks.
"""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu.encode import bits_of, float_of, integer_of
from luqrun.quant.kernels.cpu.rows import NEAREST, STOCHASTIC, f32, i32, row_loop, u8, u32, u64

MAGNITUDE = i32(0x7FFFFFFF)


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
def take_better(better, found, target, high, run):
    """What was found of `high` rows, where the element of a row is better."""
    for r in range(u64(high)):
        for j in range(u64(run)):
            one, other = found[r * u64(run) + j], target[r * u64(run) + j]
            target[r * u64(run) + j] = one if better[j] != f32(0) else other


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
def _code(x, by, per_unit, high, word, mantissa, multiplies, rounding):
    """See code_rows."""
    magnitude = f32(abs(x) * by) * per_unit if multiplies else abs(x) / by
    magnitude = high if magnitude > high else magnitude
    # NaN: of a scale that is NaN, or so small that its unit is 0.
    magnitude = magnitude if magnitude > f32(0) else f32(0)
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
