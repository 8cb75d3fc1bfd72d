"""What the loop that quantizes is told: `quantize.quantize` says what its numbers are."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.kernels.cpu import driver, memory, quantize
from luqrun.quant.kernels.cpu.rows import ABSMAX, GIVEN, HINDSIGHT, MODES, SAWB, STOCHASTIC

KINDS = {
    torch.int8: memory.INT8,
    torch.int16: memory.INT16,
    torch.float32: memory.FLOAT32,
    torch.bfloat16: memory.BF16,
}
HALF = {torch.float32: 0, torch.bfloat16: 1}  # what the loops read
RANGES = {"absmax": ABSMAX, "sawb": SAWB, "hindsight": HINDSIGHT}
IN_ORDER = 0, 0, 0  # images, pixels, channels of what is read as it lies
with torch.inference_mode(False):
    _NO_SAWB = torch.zeros(2, dtype=torch.float64, device="cpu")


@functools.cache
def form_of(form: Format, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The `form` of codes that are stored as `dtype`."""
    return form.bits, int(form.field_bits == 4), KINDS[dtype], form.floating


def of_range(how: Encoding) -> tuple[int, bool, int]:
    """range, moments, and the first sample."""
    return RANGES[how.range], how.range == "sawb", 0


def given(observe: bool, sample: int) -> tuple[int, bool, int]:
    """range, whether the maximum is to be found, and sample, where the scale is known."""
    return GIVEN, observe, sample


def layout_of(pixels: Sequence[int], how: Encoding) -> Sequence[int]:
    """images, pixels, channels of a tensor with these (layout.pixels_of): without draws, the order of its elements does
    not matter."""
    return pixels if STOCHASTIC in (MODES[how.rounding], MODES[how.underflow]) else IN_ORDER


@functools.cache
def _sawb(how: Encoding) -> Tensor:
    """c1 and c2."""
    with torch.inference_mode(False):  # they outlive the caller's mode
        return torch.tensor(how.sawb, dtype=torch.float64, device="cpu")


@functools.cache
def _of_encoding(
    how: Encoding, dtype: torch.dtype, range: int, moments: bool, sample: int, by_images: bool
) -> tuple[tuple[int, ...], tuple[driver.driver, ...]]:
    """The numbers from `how` to `sawb`, and the functions."""
    form, modes = how.form, (MODES[how.rounding], MODES[how.underflow])
    steps = form.floating, *modes, range, int(moments), int(how.pow2_scale), sample
    if form.logarithmic:
        coder = quantize.encode_powers
    else:
        coder = quantize.encode_floats if form.floating else quantize.encode_integers
    encode = quantize.encode_images if by_images else quantize.encode_flat
    numbers = *steps, *form_of(form, dtype), form.limit, form.unsigned_limit, _sawb(how).data_ptr()
    return numbers, (quantize.measure, encode, coder)


def quantizing(
    elements: int,
    x: int,
    x_dtype: torch.dtype,
    codes: int,
    fields: int,
    results: Sequence[int],
    stream: int,
    layout: Sequence[int],
    hindsight: int,
    how: Encoding,
    dtype: torch.dtype,
    range: int,
    moments: bool,
    sample: int,
) -> driver.Loop:
    """quantize.quantize of float32 or bf16 to codes of `dtype`. results: addresses, from `results` to `statistics`."""
    numbers, functions = _of_encoding(how, dtype, range, moments, sample, layout[0] > 0)
    where = x, HALF[x_dtype], codes, fields, *results, stream, *layout, hindsight
    functions = driver.team(elements), *[each.address() for each in functions]
    return quantize.quantize, 1, elements, (elements, *where, *numbers, *functions)


def measuring(elements: int, x: int, x_dtype: torch.dtype, moments: bool, results: int) -> driver.Loop:
    """quantize.quantize that only measures. results: an address."""
    where = x, HALF[x_dtype], 0, 0, results, *(0,) * 9
    how = 0, 0, 0, ABSMAX, int(moments), 0, 0, 0, 0, 0, 0, 1, 1, _NO_SAWB.data_ptr()
    functions = driver.team(elements), quantize.measure.address(), 0, 0
    return quantize.quantize, 1, elements, (elements, *where, *how, *functions)
