"""The formats of the blocks' scales: e8m0 (powers of two), e4m3 and fp32.

Bytes of scales: e8m0 is exponent + 127, 255 for NaN; e4m3 is that of torch.float8_e4m3fn. FACTS 1.1 to 1.3, 2.1.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

SCALE_FORMATS = ("e8m0", "e4m3", "fp32")
SCALE_ROUNDINGS = ("floor", "rceil", "ceil", "even", "down")
MANTISSA = 0x7FFFFF
SMALLEST_E8M0 = -127  # its exponent; there is no zero
E4M3_LIMIT = 448.0
E4M3_SMALLEST = 2.0**-9


def float_bits(x: float) -> int:
    """The bit pattern of a float32."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


def float32(x: float) -> float:
    """The nearest float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def exponent_rule(rounding: str, top: float, mantissa_bits: int) -> tuple[int, int]:
    """(carry, shift): the exponent of a block's e8m0 scale is that of the float32 whose bits are clip's + carry, less
    shift, and so never a float logarithm's.

    top: the value on which the range ends. floor: floor(log2 clip) - floor(log2 top), as OCP's MX has it, which clips
    the top of some blocks. ceil: the same with ceil(log2 clip). even: floor of clip rounded to the element's mantissa.
    rceil: ceil(log2(clip / top)), which never clips. down: floor(log2(clip / top)).
    """
    bits = float_bits(top)
    mantissa, shift = bits & MANTISSA, (bits >> 23) - 127
    carry = {
        "floor": 0,
        "ceil": MANTISSA,
        "even": 1 << (22 - mantissa_bits),
        "rceil": MANTISSA - mantissa,
        "down": -mantissa,
    }
    return carry[rounding], shift


def e8m0_exponent(clip: Tensor, rule: tuple[int, int]) -> Tensor:
    """Exponents of e8m0, int32 from -127 to 127, of finite clips >= 0 (float32, any shape)."""
    carry, shift = rule
    return (((clip.view(torch.int32) + carry) >> 23) - 127 - shift).clamp(SMALLEST_E8M0, 127)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exponent: int32 from -149 to 127."""
    normal = (exponent + 127).clamp(min=0) << 23
    subnormal = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent >= -126, normal, subnormal).view(torch.float32)


def round_e4m3(x: Tensor) -> Tensor:
    """Float32 x >= 0 to the nearest e4m3, ties to even, at most 448; NaN stays."""
    return x.clamp(max=E4M3_LIMIT).to(torch.float8_e4m3fn).float()


def draw_e4m3(x: Tensor, words: Tensor) -> Tensor:
    """Float32 x >= 0 to one of its two e4m3 neighbours, by the random words (int64, see kernels.philox): unbiased."""
    x = x.clamp(max=E4M3_LIMIT)
    exponent = ((x.contiguous().view(torch.int32) >> 23) - 127).clamp(min=-6, max=8)
    step = power_of_two(exponent - 3)
    ratio = torch.where(x.isnan(), 0.0, x / step)
    floor = ratio.floor()
    up = (words >> 1) < ((ratio - floor) * 2.0**31).to(torch.int64)
    return torch.where(x.isnan(), torch.nan, (floor + up) * step)


def dtype_of(scale_format: str) -> torch.dtype:
    """What scales are kept as."""
    return torch.float32 if scale_format == "fp32" else torch.uint8


def to_bytes(scale: Tensor, scale_format: str) -> Tensor:
    """Scales (float32, of e8m0 or e4m3) as uint8; of fp32, themselves."""
    if scale_format == "fp32":
        return scale
    if scale_format == "e4m3":
        return scale.to(torch.float8_e4m3fn).view(torch.uint8)
    bits = scale.contiguous().view(torch.int32)
    return torch.where(scale.isnan(), 255, bits >> 23).to(torch.uint8)  # 2^-127 is subnormal: its field is 0


def from_bytes(stored: Tensor, scale_format: str) -> Tensor:
    """The inverse of to_bytes, float32."""
    if scale_format == "fp32":
        return stored
    if scale_format == "e4m3":
        return stored.view(torch.float8_e4m3fn).float()
    power = power_of_two(stored.to(torch.int32) - 127)
    return torch.where(stored == 255, torch.nan, power)
