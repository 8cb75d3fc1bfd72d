"""Compiled loops (numba) over the scales of a panel of blocks: made from what the blocks' ranges end on, kept, read."""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu.encode import bits_of, float_of, integer_of
from luqrun.quant.kernels.cpu.rows import f32, i32, row_loop, u8, u32

MANTISSA = i32(0x7FFFFF)
EXPONENT127 = i32(0x7F000000)  # the bits of 2^127, whose inverse is subnormal
FLOAT32_MAX = f32(3.4028234663852886e38)
E8M0, E4M3, FP32 = 0, 1, 2  # scale formats
SMALLEST = i32(-127)  # the exponent of e8m0's smallest scale


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
def correct(gains, scales, words, count):
    """Scales times gains, drawn (scale_formats.draw_e4m3), but for a NaN."""
    for j in range(count):
        known = scales[j] <= FLOAT32_MAX
        x = min(f32(gains[j] * scales[j]), f32(448)) if known else f32(0)
        step = _e4m3_step(x)
        ratio = x / step
        floor = np.floor(ratio)
        up = i32(words[j] >> u32(1)) < integer_of((ratio - floor) * f32(2147483648))
        drawn = (floor + (f32(1) if up else f32(0))) * step
        scales[j] = drawn if known else scales[j]


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
