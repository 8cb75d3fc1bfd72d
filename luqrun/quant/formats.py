"""Formats: what the codes of a quantized tensor mean, and how they pack into b bits.

A quantized tensor is small integers and scales: value = code * scale. The codes of a logarithmic format are signed
powers of two (or four), those of a floating-point format multiples of its smallest number. Nothing here rounds: see
luqrun.quant.kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luqrun.errors import UserError

# By width of an integer format, (c1, c2) of SAWB's range: clip = c1 sqrt(E[x^2]) - c2 E|x|.
SAWB = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.1, 12.2), 5: (17.74, 18.64), 8: (31.76, 35.04)}


@dataclass(frozen=True)
class Format:
    """A family of at most 2^bits codes.

    Integer formats hold -limit..limit, or 0..unsigned_limit for a tensor with no negative value (-limit..limit always
    where blocks have scales of their own). Logarithmic formats hold 0 and +-radix^e for 0 <= e <= max_exponent, so
    limit = radix^max_exponent. Floating-point formats (mantissa_bits m > 0) hold the integers below 2^m, and (2^m + j)
    2^k for all j < 2^m and each of the other exponents, with both signs; no Inf, no NaN. unit: what code 1 stands for
    in the field's own numbers, 0.5 for e2m1.
    """

    name: str
    bits: int
    logarithmic: bool
    limit: int
    unsigned_limit: int
    radix: int = 2  # or 4
    mantissa_bits: int = 0
    unit: float = 1.0

    @property
    def max_exponent(self) -> int:
        assert self.logarithmic
        return (self.limit.bit_length() - 1) // self._step

    @property
    def _step(self) -> int:
        """Powers of two from one level to the next."""
        return self.radix.bit_length() - 1

    @property
    def floating(self) -> int:
        """0 for integers, else 1 + mantissa_bits: what tells the families apart where a kernel is chosen."""
        return 1 + self.mantissa_bits if self.logarithmic or self.mantissa_bits else 0

    @property
    def code_dtype(self) -> torch.dtype:
        """int8 where every code fits (all formats up to 4 bits), else int16."""
        return torch.int8 if max(self.limit, self.unsigned_limit) <= 127 else torch.int16

    @property
    def significant_bits(self) -> int:
        """Of the code that has most of them, from its highest to its lowest bit that is set."""
        return 1 if self.logarithmic else self.mantissa_bits + 1 if self.mantissa_bits else self.limit.bit_length()

    @property
    def field_bits(self) -> int:
        """Bits a code takes where it is kept for the backward pass: half a byte up to 4 bits, else a byte."""
        return 4 if self.bits <= 4 else 8

    def field_bytes(self, count: int) -> int:
        """Bytes that the fields of `count` codes take."""
        return (count * self.field_bits + 7) // 8

    def levels(self, signed: bool = True) -> list[int]:
        """All codes in ascending order."""
        if self.mantissa_bits:
            magnitudes = self.from_fields(torch.arange(1, 2 ** (self.bits - 1)), torch.tensor(True)).tolist()
        elif self.logarithmic:
            magnitudes = [self.radix**exponent for exponent in range(self.max_exponent + 1)]
        else:
            return list(range(-self.limit, self.limit + 1)) if signed else list(range(self.unsigned_limit + 1))
        return [-magnitude for magnitude in reversed(magnitudes)] + [0, *magnitudes]

    def to_fields(self, codes: Tensor) -> Tensor:
        """Codes (any shape) as `bits`-bit fields, int32: two's complement; or sign bit and exponent (0 means zero); or
        sign bit, exponent and mantissa."""
        codes = codes.to(torch.int32)
        if self.mantissa_bits:
            magnitude = codes.abs()
            shift = self._shifts(magnitude)
            index = (shift << self.mantissa_bits) + (magnitude >> shift)
            return index | ((codes < 0).to(torch.int32) << (self.bits - 1))
        if not self.logarithmic:
            return codes & (2**self.bits - 1)
        # The float32 exponent of a power of two is its position; zero (exponent field 0) clamps to 0.
        exponent = ((codes.abs().float().view(torch.int32) >> 23) - 127) // self._step + 1
        return exponent.clamp(min=0) | ((codes < 0).to(torch.int32) << (self.bits - 1))

    def from_fields(self, fields: Tensor, signed: Tensor) -> Tensor:
        """The inverse of to_fields; `signed` is the 0-dim bool that the quantizer decided for the tensor."""
        fields = fields.to(torch.int32)
        sign_bit = fields >> (self.bits - 1)
        if self.mantissa_bits:
            index = fields & (2 ** (self.bits - 1) - 1)
            shift = ((index >> self.mantissa_bits) - 1).clamp(min=0)
            magnitude = (index - (shift << self.mantissa_bits)) << shift
            return torch.where(sign_bit > 0, -magnitude, magnitude).to(self.code_dtype)
        if not self.logarithmic:
            return (fields - ((sign_bit & signed.to(torch.int32)) << self.bits)).to(self.code_dtype)
        exponent = fields & (2 ** (self.bits - 1) - 1)
        magnitude = torch.where(exponent > 0, 1 << (self._step * (exponent - 1).clamp(min=0)), 0)
        return torch.where(sign_bit > 0, -magnitude, magnitude).to(self.code_dtype)

    def _shifts(self, magnitude: Tensor) -> Tensor:
        """Of a floating-point format: the power of two of each code's spacing, int32."""
        exponent = (magnitude.float().view(torch.int32) >> 23) - 127
        return (exponent - self.mantissa_bits).clamp(min=0)


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", bits, False, 2 ** (bits - 1) - 1, 2**bits - 1)


def _logarithmic(exponent_bits: int) -> Format:
    # One exponent code stands for zero, which leaves 2^exponent_bits - 1 magnitudes: 1, 2, ..., 2^(that - 1).
    limit = 2 ** (2**exponent_bits - 2)
    return Format(f"e{exponent_bits}m0", 1 + exponent_bits, True, limit, limit)


def _float(exponent_bits: int, mantissa_bits: int) -> Format:
    # As in IEEE 754, but for Inf and NaN: 2^exponent_bits - 1 spacings, the smallest one twice.
    limit = (2 ** (mantissa_bits + 1) - 1) << (2**exponent_bits - 2)
    bias = 2 ** (exponent_bits - 1) - 1
    unit = 2.0 ** (1 - bias - mantissa_bits)
    name, bits = f"e{exponent_bits}m{mantissa_bits}", 1 + exponent_bits + mantissa_bits
    return Format(name, bits, False, limit, limit, mantissa_bits=mantissa_bits, unit=unit)


# The reference code's grid of 8 magnitudes and zero (divisor 2^7): 17 signed values, which need five bits.
_REFERENCE_E3M0 = Format("e3m0_div128", 5, True, 2**7, 2**7)
# The grid of the code of Xi et al. (2023): half the smallest level of 2^-8 of the maximum, and ten magnitudes.
XI = "e3m0_xi"
_XI = Format(XI, 5, True, 2**9, 2**9)
# Radix 4, as in Ultra-low (Sun et al., 2020): 1, 4, ..., 4^6.
_RADIX4_E3M0 = Format("e3m0_radix4", 4, True, 4**6, 4**6, radix=4)

FORMATS = {
    form.name: form
    for form in [
        *[_integer(bits) for bits in range(2, 9)],
        *[_logarithmic(exponent_bits) for exponent_bits in range(1, 5)],
        *[_float(*widths) for widths in [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (3, 2), (2, 3)]],
        _REFERENCE_E3M0,
        _RADIX4_E3M0,
        _XI,
    ]
}


def get_format(name: str, key: str = "format") -> Format:
    """The format called `name`; UserError naming `key` and the known formats otherwise."""
    if name not in FORMATS:
        raise UserError(f"{key}={name} is not known; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def pack(fields: Tensor, bits: int) -> Tensor:
    """Fields (any shape, values below 2^bits) as a flat uint8 tensor of ceil(numel * bits / 8) bytes.

    Field i takes the bits i * bits and up of a little-endian bit string: at 4 bits, the even element of a pair
    is the low half of its byte.
    """
    bit = torch.arange(bits, dtype=torch.int32, device=fields.device)
    string = ((fields.reshape(-1, 1).to(torch.int32) >> bit) & 1).flatten()
    string = torch.nn.functional.pad(string, (0, -string.numel() % 8)).view(-1, 8)
    weight = 1 << torch.arange(8, dtype=torch.int32, device=fields.device)
    return (string * weight).sum(1, dtype=torch.int32).to(torch.uint8)


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse of `pack`: numel int32 fields from the packed bytes."""
    bit = torch.arange(8, dtype=torch.int32, device=packed.device)
    string = (packed.view(-1, 1).to(torch.int32) >> bit).flatten() & 1
    weight = 1 << torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (string[: numel * bits].view(numel, bits) * weight).sum(1, dtype=torch.int32)
