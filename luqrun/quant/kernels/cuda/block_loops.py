"""The Triton kernels that quantize in blocks: how their programs walk over memory.

A *grid* (outer, rows, between, columns) says how memory is read, a block (A, B) is A rows of B columns: see
luqrun.quant.kernels.blocks. Blocks side by side are a *band*: there are outer * down * between of them, with `across`
blocks each. A tile has BANDS bands of HIGH lines, and of each COUNT blocks of WIDE columns: HIGH, WIDE are A, B rounded
up to powers of two. Its elements are (BANDS * HIGH lines, a run of COUNT * WIDE). INDEX: the integer type of offsets,
int32 where that holds them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luqrun.quant.kernels.blocks import RMS_CLIP
from luqrun.quant.kernels.cuda.block_elements import (
    decoded,
    inverse_of,
    load_scale,
    scale_of,
    store_scale,
    store_values,
    to_e4m3,
    value_in_block,
)
from luqrun.quant.kernels.cuda.elements import (
    FLOAT32_MAX,
    from_field,
    load,
    magnitude_bits,
    side_by_side,
    stream_words,
    to_field,
    with_sign,
    words_of_elements,
    words_of_groups,
)
from luqrun.quant.kernels.cuda.launch import pattern
from luqrun.quant.kernels.philox import SCALE_SAMPLES

BITS_OF_RMS_CLIP = tl.constexpr(pattern(RMS_CLIP))
SECOND_SAMPLE = tl.constexpr(SCALE_SAMPLES)


@triton.jit
def _lines(group, bands, rows, between, down, A: tl.constexpr, BANDS: tl.constexpr, HIGH: tl.constexpr):
    """(number, whether it exists) of the lines of a tile; group: the tile's number among bands."""
    line = tl.arange(0, BANDS * HIGH)
    band = group * BANDS + line // HIGH
    image, row = band // between // down, band // between % down * A + line % HIGH
    inside = (band < bands) & (row < rows)
    if A != HIGH:
        inside = inside & (line % HIGH < A)
    return (image * rows + row) * between + band % between, inside


@triton.jit
def _columns(left, columns, B: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """(column, whether it exists) of the run of a tile; left: its first block."""
    run = tl.arange(0, COUNT * WIDE)
    if B == WIDE:
        column = left * B + run
        inside = column < columns
    else:
        column = (left + run // WIDE) * B + run % WIDE
        inside = (column < columns) & (run % WIDE < B)
    return column, inside


@triton.jit
def _bytes(line, line_inside, left, pairs, B: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """(offset, whether it exists) of the bytes of a tile, two fields each; pairs: bytes of a line."""
    byte = left * B // 2 + tl.arange(0, COUNT * WIDE // 2)
    return line[:, None] * pairs + byte[None, :], line_inside[:, None] & (byte < pairs)[None, :]


@triton.jit
def _of_blocks(group, left, bands, across, BANDS: tl.constexpr, COUNT: tl.constexpr):
    """(number, whether it exists) of the blocks of a tile, (BANDS, COUNT)."""
    band, block = group * BANDS + tl.arange(0, BANDS), left + tl.arange(0, COUNT)
    return band[:, None] * across + block[None, :], (band < bands)[:, None] & (block < across)[None, :]


@triton.jit
def _expand(of_blocks, BANDS: tl.constexpr, HIGH: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """A number of each block (BANDS, COUNT) for each element."""
    spread = tl.broadcast_to(of_blocks[:, None, :, None], (BANDS, HIGH, COUNT, WIDE))
    return tl.reshape(spread, (BANDS * HIGH, COUNT * WIDE))


@triton.jit
def _number(offset, pixels, channels, LAST: tl.constexpr):
    """The numbers, int64, of elements in row-major order. LAST: memory is (images, pixels, channels)."""
    if LAST:
        pixel = offset // channels
        offset = (pixel // pixels * channels + offset % channels) * pixels + pixel % pixels
    return offset.to(tl.int64)


@triton.jit
def _words(
    start, first, offset, pixels, channels, stream, sample, LAST: tl.constexpr, GROUPED: tl.constexpr,
    LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The random words of a tile; start: offsets of its lines, first: its first column. GROUPED: the element there, and
    each fourth from there on, is the first of four that share a Philox call."""
    name = stream_words(stream, sample)
    if GROUPED:
        group = start[:, None] + (first + 4 * tl.arange(0, RUN // 4))[None, :]
        words = words_of_groups(tl.reshape(group, (LINES * RUN // 4,)).to(tl.int64), name)
        drawn = tl.reshape(side_by_side(*words), (LINES, RUN))
    else:
        drawn = words_of_elements(_number(offset, pixels, channels, LAST), name)
    return drawn


@triton.jit(do_not_specialize=["sample", "bands", "rows", "between", "down", "across", "strips", "pixels", "channels"])
def encode_blocks(
    x, values, fields, scales, chosen, kept, encode_scale, tensor_scale, stream, sample,
    bands, rows, between, columns, down, across, strips, pairs, pixels, channels,
    KIND: tl.constexpr, TOP: tl.constexpr, CARRY: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
    HEADROOM: tl.constexpr, LIMIT: tl.constexpr, FLOATING: tl.constexpr, ROUNDING: tl.constexpr,
    UNDERFLOW: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr, LAST: tl.constexpr, GROUPED: tl.constexpr,
    REDRAWN: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BANDS: tl.constexpr, HIGH: tl.constexpr,
    COUNT: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Quantize a tile: blocks.encode_blocks.

    x: floating; values: float32 or bf16. fields: uint8, or None; PAIRED: two to a byte, else one to a byte, which
    join_fields joins. scales: uint8 or float32. chosen: what choose_scales found, or None where ranges end on maxima;
    kept: float32, the scales that values get and that are stored, or None where they are those of the codes.
    encode_scale, tensor_scale: float32 () of e4m3, or None. stream: int64 (6,), or None where elements draw nothing.
    REDRAWN: codes by the finer scale of four over six draw other words.
    """
    group, left = tl.cast(tl.program_id(0) // strips, INDEX), tl.cast(tl.program_id(0) % strips, INDEX) * COUNT
    line, line_inside = _lines(group, bands, rows, between, down, A, BANDS, HIGH)
    column, column_inside = _columns(left, columns, B, COUNT, WIDE)
    block, block_inside = _of_blocks(group, left, bands, across, BANDS, COUNT)
    offset, inside = line[:, None] * columns + column[None, :], line_inside[:, None] & column_inside[None, :]
    number = load(x + offset, inside)
    to_scale = tl.load(encode_scale) if encode_scale is not None else None
    on_top = tl.load(tensor_scale) if tensor_scale is not None else None
    if chosen is not None:
        found = tl.load(chosen + block, mask=block_inside, other=0)
        scale = tl.abs(found)
    else:
        bits = tl.max(tl.reshape(magnitude_bits(number), (BANDS, HIGH, COUNT, WIDE)), axis=3)
        clip = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        scale = scale_of(clip, to_scale, 1.0, TOP, KIND, CARRY, SHIFT)
    word = None
    if stream is not None:
        start, first = line * columns, left * B
        word = _words(start, first, offset, pixels, channels, stream, sample, LAST, GROUPED, BANDS * HIGH, COUNT * WIDE)
        if REDRAWN:
            other = _words(
                start, first, offset, pixels, channels, stream, sample + SECOND_SAMPLE, LAST, GROUPED,
                BANDS * HIGH, COUNT * WIDE,
            )  # fmt: skip
            word = tl.where(_expand(found < 0, BANDS, HIGH, COUNT, WIDE), other, word)
    number = tl.where(tl.abs(number) <= FLOAT32_MAX, number, 0.0) * HEADROOM
    inverse = _expand(inverse_of(scale, on_top, KIND, UNIT), BANDS, HIGH, COUNT, WIDE)
    value = value_in_block(number, inverse, word, KIND, UNIT, LIMIT, FLOATING, ROUNDING, UNDERFLOW)
    if kept is not None:
        scale = tl.load(kept + block, mask=block_inside, other=0)
    product = decoded(value, _expand(scale, BANDS, HIGH, COUNT, WIDE), UNIT, FLOATING)
    store_values(values + offset, tl.where((number < 0) & (inverse > 0), -product, product), inside)
    store_scale(scales + block, scale, block_inside, KIND)
    if fields is not None:
        field = to_field(with_sign(value, number, FLOATING), FLOATING, BITS)
        if PAIRED:
            low, high = tl.split(tl.reshape(field, (BANDS * HIGH, COUNT * WIDE // 2, 2)))
            at, bytes_inside = _bytes(line, line_inside, left, pairs, B, COUNT, WIDE)
            tl.store(fields + at, (low | (high << 4)).to(tl.uint8), mask=bytes_inside)
        else:
            tl.store(fields + offset, field.to(tl.uint8), mask=inside)


@triton.jit
def join_fields(coded, fields, numel, size, TILE: tl.constexpr):
    """fields: uint8, size bytes of two fields each, the first one low, of numel fields of a byte each."""
    byte = tl.cast(tl.program_id(0), tl.int64) * TILE + tl.arange(0, TILE)
    low = tl.load(coded + 2 * byte, mask=2 * byte < numel, other=0)
    high = tl.load(coded + 2 * byte + 1, mask=2 * byte + 1 < numel, other=0)
    tl.store(fields + byte, low | (high << 4), mask=byte < size)


@triton.jit(do_not_specialize=["bands", "rows", "between", "down", "across", "strips"])
def decode_blocks(
    fields, scales, values, bands, rows, between, columns, down, across, strips, pairs,
    KIND: tl.constexpr, UNIT: tl.constexpr, FLOATING: tl.constexpr, BITS: tl.constexpr, FIELD_BITS: tl.constexpr,
    PAIRED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BANDS: tl.constexpr, HIGH: tl.constexpr,
    COUNT: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The values of `encode_blocks` again, of a tile."""
    group, left = tl.cast(tl.program_id(0) // strips, INDEX), tl.cast(tl.program_id(0) % strips, INDEX) * COUNT
    line, line_inside = _lines(group, bands, rows, between, down, A, BANDS, HIGH)
    column, column_inside = _columns(left, columns, B, COUNT, WIDE)
    block, block_inside = _of_blocks(group, left, bands, across, BANDS, COUNT)
    offset, inside = line[:, None] * columns + column[None, :], line_inside[:, None] & column_inside[None, :]
    if PAIRED:
        at, bytes_inside = _bytes(line, line_inside, left, pairs, B, COUNT, WIDE)
        byte = tl.load(fields + at, mask=bytes_inside, other=0).to(tl.int32)
        field = tl.reshape(tl.join(byte & 15, byte >> 4), (BANDS * HIGH, COUNT * WIDE))
    elif FIELD_BITS == 4:
        field = tl.load(fields + offset // 2, mask=inside, other=0).to(tl.int32)
        field = (field >> (4 * (offset % 2).to(tl.int32))) & 15
    else:
        field = tl.load(fields + offset, mask=inside, other=0).to(tl.int32)
    scale = _expand(load_scale(scales + block, block_inside, KIND), BANDS, HIGH, COUNT, WIDE)
    store_values(values + offset, decoded(from_field(field, True, FLOATING, BITS), scale, UNIT, FLOATING), inside)


@triton.jit(do_not_specialize=["sample", "bands", "rows", "between", "columns", "down", "across", "pixels", "channels"])
def choose_scales(
    x, chosen, kept, encode_scale, tensor_scale, stream, sample,
    bands, rows, between, columns, down, across, pixels, channels,
    KIND: tl.constexpr, TOP: tl.constexpr, CARRY: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
    HEADROOM: tl.constexpr, LIMIT: tl.constexpr, FLOATING: tl.constexpr, ROUNDING: tl.constexpr,
    UNDERFLOW: tl.constexpr, LAST: tl.constexpr, RMS: tl.constexpr, COMPARED: tl.constexpr, EDEN: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Scales that take sums over a block, in the order of its elements: a thread goes through a block.

    chosen: float32, the scale of each block's codes, negative where the finer one of four over six suits it better.
    kept: the scale that eden makes of it, or None. The rest is as in `encode_blocks`; but of eden, which draws scales
    alone, pixels and channels are theirs.
    """
    block = tl.cast(tl.program_id(0), INDEX) * BLOCKS + tl.arange(0, BLOCKS)
    band, left = block // across, block % across * B
    image, row = band // between // down, band // between % down * A
    start = ((image * rows + row) * between + band % between) * columns + left
    high, wide = tl.where(band < bands, tl.minimum(rows - row, A), 0), tl.minimum(columns - left, B)
    stride = tl.cast(between, INDEX) * columns
    to_scale = tl.load(encode_scale) if encode_scale is not None else None
    on_top = tl.load(tensor_scale) if tensor_scale is not None else None

    largest, squares = tl.zeros((BLOCKS,), tl.int32), tl.zeros((BLOCKS,), tl.float64)
    for r in range(A):
        for c in range(B):
            number = load(x + start + r * stride + c, (r < high) & (c < wide))
            largest = tl.maximum(largest, magnitude_bits(number))
            squares += number.to(tl.float64) * number.to(tl.float64)
    clip = largest.to(tl.float32, bitcast=True)
    if RMS:
        factor = tl.full((), BITS_OF_RMS_CLIP, tl.int64).to(tl.float64, bitcast=True)
        count = tl.maximum(high * wide, 1).to(tl.float64)
        clip = tl.where(clip <= FLOAT32_MAX, (factor * tl.sqrt(squares / count)).to(tl.float32), clip)
    scale = scale_of(clip, to_scale, 1.0, TOP, KIND, CARRY, SHIFT)
    if COMPARED is not None or EDEN:
        finer = scale_of(clip, to_scale, 1.5, TOP, KIND, CARRY, SHIFT)
        inverse, finer_inverse = inverse_of(scale, on_top, KIND, UNIT), inverse_of(finer, on_top, KIND, UNIT)
        name, second_name = None, None
        if stream is not None:
            name, second_name = stream_words(stream, sample), stream_words(stream, sample + SECOND_SAMPLE)
        error, finer_error = tl.zeros((BLOCKS,), tl.float64), tl.zeros((BLOCKS,), tl.float64)
        exact, across_codes = tl.zeros((BLOCKS,), tl.float64), tl.zeros((BLOCKS,), tl.float64)
        for r in range(A):
            for c in range(B):
                offset = start + r * stride + c
                number = tl.abs(load(x + offset, (r < high) & (c < wide)))
                number = tl.where(number <= FLOAT32_MAX, number, 0.0) * HEADROOM
                word, finer_word = None, None
                if stream is not None and not EDEN:
                    element = _number(offset, pixels, channels, LAST)
                    word, finer_word = words_of_elements(element, name), words_of_elements(element, second_name)
                value = value_in_block(number, inverse, word, KIND, UNIT, LIMIT, FLOATING, ROUNDING, UNDERFLOW)
                found = decoded(value, scale, UNIT, FLOATING) * on_top
                if EDEN:
                    exact += number.to(tl.float64) * number.to(tl.float64)
                    across_codes += number.to(tl.float64) * found.to(tl.float64)
                else:
                    value = value_in_block(
                        number, finer_inverse, finer_word, KIND, UNIT, LIMIT, FLOATING, ROUNDING, UNDERFLOW
                    )
                    finer_found = decoded(value, finer, UNIT, FLOATING) * on_top
                    error += _error(found - number, COMPARED)
                    finer_error += _error(finer_found - number, COMPARED)
        if EDEN:
            gain = tl.where(across_codes > 0, exact / tl.where(across_codes > 0, across_codes, 1.0), 1.0)
            known = scale <= FLOAT32_MAX
            wanted = tl.where(known, gain.to(tl.float32) * scale, 0.0)
            word = words_of_elements(_number(block, pixels, channels, LAST), second_name)
            corrected = tl.where(known, to_e4m3(wanted, word, "stochastic"), float("nan"))
            tl.store(kept + block, corrected, mask=band < bands)
        else:
            scale = tl.where(finer_error < error, -finer, scale)
    tl.store(chosen + block, scale, mask=band < bands)


@triton.jit
def _error(difference, COMPARED: tl.constexpr):
    wide = difference.to(tl.float64)
    return wide * wide if COMPARED == "mse" else tl.abs(wide)
