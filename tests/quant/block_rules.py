"""The rules of block-scaled formats in NumPy, one plain function a rule: what luqrun's quantizers are tested with.

Written from the definitions alone (OCP Microscaling Formats, NVFP4, QuEST, Four Over Six, MS-EDEN), not from luqrun's
code; only the random words come from there. Arithmetic is float32, each operation rounded once, where float64 is not
said. Values are code * scale * tensor scale. Rows are the elements of a block, zeros beyond a short block's end.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from luqrun.quant.kernels.philox import make_stream, random_words

LARGEST_FLOAT = np.finfo(np.float32).max
GAUSSIAN_CLIP = 2.92247856  # clip / std with the least squared error for a Gaussian at four bits (QuEST)
SCALE_SAMPLES = 2**15  # the samples of the draws of scales begin here
ERRORS = {"mse": np.square, "mae": np.abs}


def float_levels(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The magnitudes of a small float in units of its smallest subnormal, ascending: the place of each is its code."""
    subnormal = list(range(2**mantissa_bits))
    normal = [(2**mantissa_bits + j) << k for k in range(2**exponent_bits - 1) for j in range(2**mantissa_bits)]
    return np.array(subnormal + normal, np.float64)


class Form(NamedTuple):
    """A format of elements: its magnitudes in units of `unit`, and its mantissa bits (None: an integer)."""

    levels: np.ndarray
    unit: float
    mantissa_bits: int | None

    @property
    def largest(self) -> np.float32:
        """In value units."""
        return np.float32(self.levels[-1] * self.unit)


def _float_form(exponent_bits: int, mantissa_bits: int) -> Form:
    bias = 2 ** (exponent_bits - 1) - 1
    return Form(float_levels(exponent_bits, mantissa_bits), 2.0 ** (1 - bias - mantissa_bits), mantissa_bits)


FORMS = {
    "e2m1": _float_form(2, 1),
    "e1m2": _float_form(1, 2),
    "e2m2": _float_form(2, 2),
    "int4": Form(np.arange(8.0), 1.0, None),
}
E4M3 = float_levels(4, 3)[:-1]  # the last one is NaN, 448 the largest
E4M3_UNIT = 2.0**-9


# Rounding


def round_to(levels: np.ndarray, magnitude: np.ndarray, words: np.ndarray | None = None) -> np.ndarray:
    """Each magnitude (in the levels' unit, clamped to the last) as one of the levels next to it, float64.

    To the nearest, ties to the even code; with words (below 2^32) upwards with the probability of its place between
    the two, to 31 bits.
    """
    v = np.minimum(magnitude.astype(np.float64), levels[-1])
    place = np.minimum(np.searchsorted(levels, v, side="right") - 1, len(levels) - 2)
    low, high = levels[place], levels[place + 1]
    fraction = (v - low) / (high - low)
    if words is None:
        up = (fraction > 0.5) | ((fraction == 0.5) & (place % 2 == 1))
    else:
        up = (words >> 1) < (fraction * 2**31).astype(np.int64)
    return np.where(up, high, low)


def e4m3(value: np.ndarray, words: np.ndarray | None = None) -> np.ndarray:
    """Float32 values, none negative, as E4M3 in float32: subnormals down to 2^-9, saturating at 448."""
    return np.float32(round_to(E4M3, np.float64(value) / E4M3_UNIT, words) * E4M3_UNIT)


@cache
def words_of(seed: int, sample: int, numel: int) -> np.ndarray:
    """The random words of `numel` elements in row-major order, int64 below 2^32."""
    return random_words(make_stream(seed), sample, numel).numpy()


# Blocks


def blocks_of(shape: tuple[int, ...], block: int | list[int], axis: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """(row-major places of the elements of each block, -1 beyond a short block's end, a row a block; scale's shape)."""
    place = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    if isinstance(block, int):
        place = _padded(np.moveaxis(place, axis, -1), -1, block)
        *others, length = place.shape
        place = place.reshape(*others, length // block, block)
        place = np.moveaxis(place, -2, axis % len(shape))
    else:
        down, across = block
        place = _padded(_padded(place, -2, down), -1, across)
        *others, height, width = place.shape
        place = place.reshape(*others, height // down, down, width // across, across).swapaxes(-3, -2)
        place = place.reshape(*others, height // down, width // across, down * across)
    *scale_shape, size = place.shape
    return place.reshape(np.prod(scale_shape, dtype=np.int64), size), tuple(scale_shape)


def _padded(place, axis, size):
    ends = [(0, 0)] * place.ndim
    ends[axis] = (0, -place.shape[axis] % size)
    return np.pad(place, ends, constant_values=-1)


def in_order(terms: np.ndarray) -> np.ndarray:
    """The float64 sum of each row, one term after the other."""
    total = np.zeros(len(terms))
    for column in np.float64(terms).T:
        total = total + column
    return total


# What a block is clipped at


def absmax_clip(x: np.ndarray) -> np.ndarray:
    """The largest magnitude of each row."""
    return np.abs(x).max(axis=1, initial=0)


def rms_clip(x: np.ndarray, count: np.ndarray) -> np.ndarray:
    """2.92 root mean squares of each row of `count` elements, in float64 before it becomes float32."""
    return np.float32(GAUSSIAN_CLIP * np.sqrt(in_order(np.float64(x) ** 2) / np.maximum(count, 1)))


# The exponent of a power-of-two scale (E8M0)


def _split(value) -> tuple[np.ndarray, np.ndarray]:
    """value = significand * 2^exponent with 1 <= significand < 2, exact for subnormals too."""
    mantissa, exponent = np.frexp(np.float64(value))
    return mantissa * 2, exponent - 1


def e8m0_floor(clip, largest, mantissa_bits):
    """OCP: the difference of the exponents."""
    return _split(clip)[1] - _split(largest)[1]


def e8m0_ceil(clip, largest, mantissa_bits):
    """As floor, but the clip's exponent is that of the next power of two."""
    significand, exponent = _split(clip)
    return exponent + (significand > 1) - _split(largest)[1]


def e8m0_even(clip, largest, mantissa_bits):
    """As floor, of the clip rounded to the mantissa bits of an element, halves up."""
    significand, exponent = _split(clip)
    return exponent + (significand >= 2 - 2.0 ** -(mantissa_bits + 1)) - _split(largest)[1]


def e8m0_rceil(clip, largest, mantissa_bits):
    """ceil(log2(clip / largest)) of the exact quotient: nothing is clipped."""
    (significand, exponent), (limit, limit_exponent) = _split(clip), _split(largest)
    return exponent - limit_exponent + (significand > limit)


def e8m0_down(clip, largest, mantissa_bits):
    """floor(log2(clip / largest)) of the exact quotient."""
    (significand, exponent), (limit, limit_exponent) = _split(clip), _split(largest)
    return exponent - limit_exponent - (significand < limit)


E8M0 = {"floor": e8m0_floor, "rceil": e8m0_rceil, "ceil": e8m0_ceil, "even": e8m0_even, "down": e8m0_down}


def e8m0_exponent(rule: str, clip: np.ndarray, largest: np.float32, mantissa_bits: int | None) -> np.ndarray:
    """Exponent of each block's scale: -127 .. 127, and -127 for a block of zeros."""
    assert np.isfinite(clip).all()
    exponent = E8M0[rule](clip, largest, mantissa_bits)
    return np.where(clip > 0, np.clip(exponent, -127, 127), -127)


# Codes of blocks, by the format of their scale. Magnitudes are in value units until the last line of each.


def _signed(x, levels):
    return np.where(x < 0, -levels, levels).astype(np.int64)


def code_e8m0(x, exponent, form, words):
    """Codes of each row for the scale 2^exponent."""
    values = np.abs(x) * np.ldexp(np.float32(1), -exponent)[:, None]
    return _signed(x, round_to(form.levels, np.float64(values) / form.unit, words))


def code_fp32(x, scale, form, words):
    """Codes of each row for a float32 scale, by which is divided."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.where(scale[:, None] > 0, np.abs(x) / scale[:, None], np.float32(0))
    return _signed(x, round_to(form.levels, np.float64(values) / form.unit, words))


def code_e4m3(x, stored, decode, form, words):
    """Codes of each row for an E4M3 scale and the tensor's decode scale; a stored scale of 0 codes zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.minimum(np.float32(1) / (stored * decode), LARGEST_FLOAT)
        values = np.abs(x) * factor[:, None]
    codes = round_to(form.levels, np.float64(values) / form.unit, words)
    return _signed(x, np.where(stored[:, None] > 0, codes, 0))


def encode_scale(amax: np.float32, largest: np.float32, bound: int) -> np.float32:
    """Of NVFP4's tensor scale: the float32 that takes the largest block scale of a tensor to `bound`."""
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        return np.minimum(largest * np.float32(bound) / amax, LARGEST_FLOAT)


def decoded(codes, stored, decode, form):
    """Values of E4M3 blocks; code * unit * stored is exact."""
    with np.errstate(over="ignore"):  # of the candidate that is not taken
        return np.float32(codes * form.unit * stored[:, None]) * decode


def four_or_six(x, target, decode, form, error, words=None, words_of_four=None):
    """(codes, stored scales): of the scale that puts the maximum on 6 and the one that puts it on 4, each block takes
    what errs less, and at a tie the first. Each is drawn with words of its own."""
    six, four = e4m3(target), e4m3(np.float32(1.5) * target)
    codes_six = code_e4m3(x, six, decode, form, words)
    codes_four = code_e4m3(x, four, decode, form, words_of_four)
    error_six, error_four = (
        in_order(ERRORS[error](np.float64(decoded(codes, stored, decode, form) - x)))
        for codes, stored in ((codes_six, six), (codes_four, four))
    )
    better = error_four < error_six
    return np.where(better[:, None], codes_four, codes_six), np.where(better, four, six)


def eden_correction(x, codes, stored, decode, form):
    """<x, x> / <x, Q(x)> of each block, in float64 before it becomes float32; 1 where that is no positive number."""
    values = np.float64(decoded(codes, stored, decode, form))
    above, below = in_order(np.float64(x) ** 2), in_order(np.float64(x) * values)
    return np.where(below > 0, np.float32(above / np.where(below > 0, below, 1)), np.float32(1))


# All together


class Quantized(NamedTuple):
    """codes int8; scale, tensor_scale and values float32; scale_bytes uint8 of scale's shape, None for fp32."""

    codes: np.ndarray
    scale: np.ndarray
    tensor_scale: np.float32
    scale_bytes: np.ndarray | None
    values: np.ndarray


def quantize(
    x: np.ndarray,
    *,
    format: str = "e2m1",
    block: int | list[int] = 32,
    axis: int = -1,
    scale_format: str = "e8m0",
    scale_rounding: str = "rceil",
    rounding: str = "nearest",
    largest: float | None = None,
    range: str = "absmax",
    four_over_six: str | None = None,
    headroom: float = 1.0,
    eden: bool = False,
    seed: int = 0,
    sample: int = 0,
) -> Quantized:
    """Quantize float32 x, with the keys of luqrun.quantizer and of its quantize.

    A NaN or Inf: codes of 0 and a scale of NaN for its block, with e4m3 a tensor scale of NaN and codes of 0 for all.
    """
    form = FORMS[format]
    places, scale_shape = blocks_of(x.shape, block, axis)
    inside = places >= 0
    rows = np.append(x.reshape(-1), np.float32(0))[places]
    bad = ~np.isfinite(rows).all(axis=1)
    all_bad = scale_format == "e4m3" and bad.any()  # its tensor scale is of all blocks
    rows = np.where(all_bad | bad[:, None], np.float32(0), rows)
    words = np.append(words_of(seed, sample, x.size), 0)[places] if rounding == "stochastic" else None

    # The scale is of x itself: headroom makes the elements smaller than what the scale was chosen for.
    clip = absmax_clip(rows) if range == "absmax" else rms_clip(rows, inside.sum(axis=1))
    amax = absmax_clip(rows).max(initial=0)
    limit = form.largest if largest is None else np.float32(largest)
    headroom = np.float32(headroom)
    rows = rows * headroom

    scale_bytes, decode = None, np.float32(1)
    if scale_format == "e8m0":
        exponent = e8m0_exponent(scale_rounding, clip, limit, form.mantissa_bits)
        codes = code_e8m0(rows, exponent, form, words)
        scale = np.float32(np.ldexp(form.unit, exponent))
        scale_bytes = np.uint8(np.where(bad, 255, exponent + 127))
    elif scale_format == "fp32":
        scale_of_values = clip / limit
        codes = code_fp32(rows, scale_of_values, form, words)
        scale = np.float32(form.unit) * scale_of_values
    else:
        encode = encode_scale(amax, limit, 256 if four_over_six or eden else 448)
        decode = np.float32(1) / encode
        target = clip / limit * encode
        if four_over_six:
            more = None if words is None else np.append(words_of(seed, SCALE_SAMPLES + sample, x.size), 0)[places]
            codes, stored = four_or_six(rows, target, decode, form, four_over_six, words, more)
        else:
            stored = e4m3(target)
            codes = code_e4m3(rows, stored, decode, form, words)
        if eden:
            correction = eden_correction(rows, codes, stored, decode, form)
            stored = e4m3(correction * stored, words_of(seed, SCALE_SAMPLES + sample, len(stored)))
        scale = np.float32(form.unit) * stored
        scale_bytes = np.uint8(np.where(bad, 0x7F, np.searchsorted(E4M3, stored / E4M3_UNIT)))
    scale = np.where(bad, np.float32(np.nan), scale)
    tensor_scale = np.float32(np.nan) if all_bad else decode / headroom
    with np.errstate(over="ignore", invalid="ignore"):  # the first product is exact but for fp32
        values = np.float32(codes) * scale[:, None] * tensor_scale

    def in_place(of_rows, dtype):
        flat = np.zeros(x.size, dtype)
        flat[places[inside]] = of_rows[inside]
        return flat.reshape(x.shape)

    return Quantized(
        in_place(codes, np.int8),
        scale.reshape(scale_shape),
        tensor_scale,
        None if scale_bytes is None else scale_bytes.reshape(scale_shape),
        in_place(values, np.float32),
    )


def nibbles(codes: np.ndarray, format: str) -> np.ndarray:
    """Codes in row-major order as bytes of two, the even one in the low half: sign and place among the levels, or two's
    complement for integers."""
    form, flat = FORMS[format], np.int64(codes).reshape(-1)
    place = np.searchsorted(form.levels, np.abs(flat))
    fields = flat % 16 if form.mantissa_bits is None else 8 * (flat < 0) + place
    fields = np.append(fields, [0] * (len(fields) % 2)).astype(np.uint8)
    return fields[::2] + 16 * fields[1::2]
