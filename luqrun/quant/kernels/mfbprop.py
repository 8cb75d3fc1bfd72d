"""Backpropagation without multiplications (LUQ, section 7 and appendix A.8): INT4 x FP4 [1,3,0] by a table, an addition
of exponents and an XOR of signs, bit for bit as hardware would have it.

An FP4 code is a sign and an exponent e: 0, or 2^(e - 1) for e = 1..7. An INT4 code of magnitude m is written as a sign,
a power k and fraction bits f, m = 2^k (1 + f): a lookup of few bits, the transform. The product has the sign that is
the XOR of both, the exponent e + k and the fraction f. So it is exact without rounding or normalisation, in
FP7 [1,4,2] for signed INT4 (m <= 7: two fraction bits). Unsigned activations (m <= 15) do not fit the paper's FP7: 28
of the 63 magnitudes of their products (those of 9, 11, 13, 15) need a third fraction bit, and get it in [1,4,3].

As a backend (LUQRUN_KERNELS=mfbprop) these are the reference's kernels, and dgrad and wgrad of INT4 and E3M0 run here.
Slow: it is an emulation, of one product at a time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from luqrun.quant.formats import Format, get_format
from luqrun.quant.kernels.reference import (  # noqa: F401
    batch_norm,
    batch_norm_backward,
    encode,
    pack,
    relu_,
    relu_backward,
    statistics,
    unpack,
)

INTEGER, LOGARITHMIC = "int4", "e3m0"
EXPONENT_BITS = 4
FRACTION_BITS = {True: 2, False: 3}  # by whether the integers have a sign
# What stands for zero in an exponent, before the addition: above all sums of two others, with room for two of it.
ZERO = 16
CHUNK = 1 << 22  # products at a time


@functools.cache
def transform(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(sign, k, f) of each 4-bit field of an integer, int16 (16,) each; k is ZERO for 0. f: FRACTION_BITS[signed] bits.

    Signed fields are two's complement; -8, which is no code of ours, is 2^3 and needs no more bits.
    """
    codes = get_format(INTEGER).from_fields(torch.arange(16), torch.tensor(signed)).tolist()
    magnitudes = [abs(code) for code in codes]
    powers = [magnitude.bit_length() - 1 if magnitude else ZERO for magnitude in magnitudes]
    bits = FRACTION_BITS[signed]
    fractions = [
        ((magnitude << bits) >> power) - (1 << bits) if magnitude else 0
        for magnitude, power in zip(magnitudes, powers, strict=True)
    ]
    return tuple(torch.tensor(each, dtype=torch.int16) for each in ([int(c < 0) for c in codes], powers, fractions))


@functools.cache
def logarithm() -> tuple[Tensor, Tensor]:
    """(sign, e) of each FP4 field, int16 (16,): its own bits, but for e = 0, which becomes ZERO."""
    fields = torch.arange(16, dtype=torch.int16)
    exponents = fields & 7
    return fields >> 3, torch.where(exponents == 0, ZERO, exponents).to(torch.int16)


def products(integers: Tensor, logarithms: Tensor, signed: bool) -> Tensor:
    """The products of 4-bit fields that broadcast, as fields of FP7 [1,4,2] or, unsigned, [1,4,3]: int16.

    A table for each operand, one addition, one XOR. Exponent field 0 is zero, field n means 2^(n - 1).
    """
    words = _words(*_looked_up(integers, logarithms, signed), signed)
    return _cleared(signed)[words.long()]


def _looked_up(integers: Tensor, logarithms: Tensor, signed: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    of_integer = tuple(table.to(integers.device)[integers.long()] for table in transform(signed))
    of_logarithm = tuple(table.to(logarithms.device)[logarithms.long()] for table in logarithm())
    return of_integer, of_logarithm


def _words(integer: tuple[Tensor, ...], other: tuple[Tensor, ...], signed: bool) -> Tensor:
    """Sign, sum of exponents (6 bits, as ZERO may be in it twice) and fraction, side by side."""
    (sign, power, fraction), (other_sign, exponent) = integer, other
    bits = FRACTION_BITS[signed]
    return (sign ^ other_sign) << (6 + bits) | (power + exponent) << bits | fraction


@functools.cache
def _cleared(signed: bool) -> Tensor:
    """Words to fields of the product's format: those with a ZERO in them become 0."""
    bits = FRACTION_BITS[signed]
    words = torch.arange(1 << (7 + bits), dtype=torch.int16)
    exponents, fractions = words >> bits & 63, words & (1 << bits) - 1
    fields = (words >> (6 + bits)) << (EXPONENT_BITS + bits) | exponents << bits | fractions
    return torch.where(exponents >= ZERO, 0, fields).to(torch.int16)


@functools.cache
def values(signed: bool) -> Tensor:
    """The integer that each field of the product's format is: int32 (2^(1 + 4 + fraction bits),).

    What stands before an integer accumulator: a shift, written as a table.
    """
    bits = FRACTION_BITS[signed]
    fields = torch.arange(1 << (1 + EXPONENT_BITS + bits))
    exponents, fractions = fields >> bits & 15, fields & (1 << bits) - 1
    shifted = ((1 << bits) + fractions) << exponents.clamp(min=1) - 1
    magnitudes = torch.where(exponents > 0, shifted >> bits, 0)
    return torch.where(fields >> (EXPONENT_BITS + bits) > 0, -magnitudes, magnitudes).int()


def gemm(integers: Tensor, logarithms: Tensor, signed: bool) -> Tensor:
    """The product of codes (M, K) of int4 and (K, N) of e3m0, int64 (M, N): tables, additions and XOR alone.

    signed: as of the quantized tensor; unsigned codes are 0..15. The sums are exact.
    """
    first = get_format(INTEGER).to_fields(integers)
    second = get_format(LOGARITHMIC).to_fields(logarithms)
    rows, inner = first.shape
    columns = second.shape[1]
    total = torch.zeros(rows, columns, dtype=torch.int64, device=first.device)
    size = max(1, CHUNK // max(1, rows * columns))
    integer, other = _looked_up(first, second, signed)
    read = values(signed)[_cleared(signed).long()].to(first.device)  # both tables as one
    for start in range(0, inner, size):
        part = slice(start, start + size)
        words = _words(
            tuple(each[:, part, None] for each in integer), tuple(each[None, part] for each in other), signed
        )
        total += read[words.int()].sum(1, dtype=torch.int64)
    return total


def accepts(gradient: Format, other: Format) -> bool:
    """Whether operands of these formats are multiplied here."""
    return (gradient.name, other.name) == (LOGARITHMIC, INTEGER)


def describe() -> str:
    """What run.json records."""
    return (
        f"mfbprop (torch {torch.__version__} operations; {INTEGER} x {LOGARITHMIC} of dgrad and wgrad by table, "
        "addition and XOR: an emulation, very slow)"
    )
