"""The Triton kernels: how their programs walk over memory. What they do to an element is in triton_elements.

All are bound by memory: each element is read and written once. Tiles have two dimensions, the second being what a
thread loads and stores at once: with four elements, those of a Philox counter in contiguous memory, a random word
is drawn by the thread that needs it, and nothing goes through shared memory. Offsets of tiles are int64, those inside
int32. A pointer that is None switches off what would be read or written there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luqrun.quant.kernels.cuda.elements import (
    FLOAT32_MAX,
    encode,
    from_field,
    load,
    magnitude_bits,
    sawb_clip,
    scale_of,
    scaling,
    side_by_side,
    stream_words,
    to_field,
    value_as,
    value_of,
    words_of_elements,
    words_of_groups,
    words_of_span,
)


@triton.jit
def offset_of(tile, SIZE: tl.constexpr):
    """Where the tile of this number (int32 or int64) starts, int64, tiles being of SIZE elements."""
    return tl.cast(tile, tl.int64) * SIZE


@triton.jit
def left_of(total, start, SIZE: tl.constexpr):
    """How many of the SIZE elements from `start` (int64) on exist, of `total` in all: int32, not above 0 for none.

    Nothing else may be done to it: the compiler must still see that 16 divides it, or it loads one by one.
    """
    return tl.minimum(total - start, SIZE).to(tl.int32)


@triton.jit
def _span(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 (ROWS, COLUMNS) of 0, 1, 2, ... in row-major order."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _as_bytes(field, FIELD_BITS: tl.constexpr):
    """int32 fields (ROWS, COLUMNS) as uint8 (ROWS, COLUMNS * FIELD_BITS / 8)."""
    if FIELD_BITS == 4:
        low, high = tl.split(tl.reshape(field, (field.shape[0], field.shape[1] // 2, 2)))
        field = low | (high << 4)
    return field.to(tl.uint8)


@triton.jit
def _encode_tile(
    number, word, scales, codes, inside, fields, bytes_inside,
    FLOATING: tl.constexpr, ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr,
    BITS: tl.constexpr, FIELD_BITS: tl.constexpr,
):  # fmt: skip
    """Encode a tile of float32 numbers and store it; codes, fields: pointers to its elements and bytes."""
    value = encode(number, word, scales, FLOATING, ROUNDING, UNDERFLOW)
    tl.store(codes, value_as(value, FLOATING, codes.dtype.scalar.element_ty), mask=inside)
    if fields is not None:
        tl.store(fields, _as_bytes(to_field(value, FLOATING, BITS), FIELD_BITS), mask=bytes_inside)


@triton.jit(do_not_specialize=["sample", "tiles"])
def encode_flat(
    x, codes, fields, maximum, scale, signed, stream, sample, numel, size, tiles,
    FLOATING: tl.constexpr, ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr,
    BITS: tl.constexpr, FIELD_BITS: tl.constexpr, LIMIT: tl.constexpr, UNSIGNED_LIMIT: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode `tiles` tiles of (ROWS, WIDTH) elements a program, in memory order.

    x: floating, codes: floating or integer, numel elements. fields: uint8, size bytes. maximum: int32 (), raised to
    the bits of max|x|. scale: float32 (). signed: bool (). stream: int64 (6,), or None where nothing is stochastic;
    with it, memory order must be row-major and WIDTH 4.
    """
    BYTES: tl.constexpr = WIDTH * FIELD_BITS // 8
    first = offset_of(tl.program_id(0), 1) * tiles
    local, local_bytes = _span(ROWS, WIDTH), _span(ROWS, BYTES)
    scales = scaling(scale, signed, FLOATING, LIMIT, UNSIGNED_LIMIT)
    largest = tl.zeros((ROWS,), tl.int32)
    if stream is not None:
        name = stream_words(stream, sample)
    for tile in range(tiles):
        start = offset_of(first + tile, ROWS * WIDTH)
        inside = local < left_of(numel, start, ROWS * WIDTH)
        number = load(x + start + local, inside)
        word = words_of_span(offset_of(first + tile, ROWS), name, ROWS) if stream is not None else None
        start_byte = offset_of(first + tile, ROWS * BYTES)
        bytes_inside = local_bytes < left_of(size, start_byte, ROWS * BYTES)
        bytes_at = fields + start_byte + local_bytes if fields is not None else None
        _encode_tile(
            number, word, scales, codes + start + local, inside, bytes_at, bytes_inside,
            FLOATING, ROUNDING, UNDERFLOW, BITS, FIELD_BITS,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(magnitude_bits(number), axis=1))
    if maximum is not None:
        tl.atomic_max(maximum, tl.max(largest), sem="relaxed")


@triton.jit(do_not_specialize=["sample", "tiles", "chunks", "pixels"])
def encode_channels_last(
    x, codes, fields, maximum, scale, signed, stream, sample, pixels, channel_units, tiles, chunks, channel_blocks,
    FLOATING: tl.constexpr, ROUNDING: tl.constexpr, UNDERFLOW: tl.constexpr,
    BITS: tl.constexpr, FIELD_BITS: tl.constexpr, LIMIT: tl.constexpr, UNSIGNED_LIMIT: tl.constexpr,
    UNIT: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Encode x of (images, pixels, channels) in memory, whose elements are numbered as (images, channels, pixels).

    A program takes up to `tiles` tiles of ROWS * PIXELS pixels and 4 QUADS channels, of one image. With PIXELS = 4,
    which must divide pixels, four neighbouring pixels of a channel share a Philox call; with 1, each has its own.
    channel_units * UNIT channels (the product tells the compiler how memory is aligned); even if FIELD_BITS is 4.
    chunks: programs for an image and channel block. The rest is as in encode_flat.
    """
    BYTES: tl.constexpr = 4 * FIELD_BITS // 8
    channels = channel_units * UNIT
    pid = tl.program_id(0)
    block, chunk = pid % channel_blocks, pid // channel_blocks % chunks
    image = offset_of(pid // channel_blocks // chunks, 1)
    row = tl.arange(0, ROWS * QUADS)
    quad = block * QUADS + row[:, None] % QUADS
    channel, byte = quad * 4 + tl.arange(0, 4)[None, :], quad * BYTES + tl.arange(0, BYTES)[None, :]
    bytes_of_pixel = channels * FIELD_BITS // 8
    # Of the first channel of each quad.
    channel_start = (image * channels + (block * QUADS + row % QUADS) * 4) * pixels
    scales = scaling(scale, signed, FLOATING, LIMIT, UNSIGNED_LIMIT)
    name = stream_words(stream, sample)
    largest = tl.zeros((ROWS * QUADS,), tl.int32)
    stop = tl.minimum((chunk + 1) * tiles, tl.cdiv(pixels, PIXELS * ROWS))
    for tile in range(chunk * tiles, stop):
        pixel = (tile * ROWS + row[:, None] // QUADS) * PIXELS
        inside, bytes_inside = (pixel < pixels) & (channel < channels), (pixel < pixels) & (byte < bytes_of_pixel)
        at = image * pixels + pixel
        offsets = at * channels + channel
        number0 = load(x + offsets, inside)
        element = channel_start + (tile * ROWS + row // QUADS) * PIXELS
        if PIXELS == 4:
            numbers = (
                number0,
                load(x + offsets + channels, inside),
                load(x + offsets + channels * 2, inside),
                load(x + offsets + channels * 3, inside),
            )
            a = words_of_groups(element, name)
            b = words_of_groups(element + pixels, name)
            c = words_of_groups(element + pixels * 2, name)
            d = words_of_groups(element + pixels * 3, name)
        else:
            numbers = (number0,)
            a = (words_of_elements(element, name),)
            b = (words_of_elements(element + pixels, name),)
            c = (words_of_elements(element + pixels * 2, name),)
            d = (words_of_elements(element + pixels * 3, name),)
        for j in tl.static_range(PIXELS):
            bytes_at = fields + (at + j) * bytes_of_pixel + byte if fields is not None else None
            word = side_by_side(a[j], b[j], c[j], d[j])
            _encode_tile(
                numbers[j], word, scales, codes + offsets + channels * j, inside, bytes_at, bytes_inside,
                FLOATING, ROUNDING, UNDERFLOW, BITS, FIELD_BITS,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(magnitude_bits(numbers[j]), axis=1))
    if maximum is not None:
        tl.atomic_max(maximum, tl.max(largest), sem="relaxed")


@triton.jit
def pack(
    codes, fields, numel, size, FLOATING: tl.constexpr, BITS: tl.constexpr, FIELD_BITS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """fields: uint8, size bytes, of numel codes (floating or integer), in memory order."""
    BYTES: tl.constexpr = WIDTH * FIELD_BITS // 8
    pid = tl.program_id(0)
    local, local_bytes = _span(ROWS, WIDTH), _span(ROWS, BYTES)
    start, start_byte = offset_of(pid, ROWS * WIDTH), offset_of(pid, ROWS * BYTES)
    code = tl.load(codes + start + local, mask=local < left_of(numel, start, ROWS * WIDTH), other=0)
    field = to_field(value_of(code, FLOATING), FLOATING, BITS)
    inside = local_bytes < left_of(size, start_byte, ROWS * BYTES)
    tl.store(fields + start_byte + local_bytes, _as_bytes(field, FIELD_BITS), mask=inside)


@triton.jit
def unpack(
    fields, codes, signed, numel, size, FLOATING: tl.constexpr, BITS: tl.constexpr, FIELD_BITS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inverse of `pack`; signed: bool ()."""
    BYTES: tl.constexpr = WIDTH * FIELD_BITS // 8
    pid = tl.program_id(0)
    local, local_bytes = _span(ROWS, WIDTH), _span(ROWS, BYTES)
    start, start_byte = offset_of(pid, ROWS * WIDTH), offset_of(pid, ROWS * BYTES)
    inside = local_bytes < left_of(size, start_byte, ROWS * BYTES)
    field = tl.load(fields + start_byte + local_bytes, mask=inside, other=0).to(tl.int32)
    if FIELD_BITS == 4:
        field = tl.reshape(tl.join(field & 15, field >> 4), (ROWS, WIDTH))
    value = from_field(field, tl.load(signed) != 0, FLOATING, BITS)
    code = value_as(value, FLOATING, codes.dtype.element_ty)
    tl.store(codes + start + local, code, mask=local < left_of(numel, start, ROWS * WIDTH))


@triton.jit
def statistics(x, unless, partials, numel, MOMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partials: float64 (programs, 4), reference.statistics of every programs-th tile of (ROWS, COLUMNS) elements.

    unless: float (), where it is positive nothing is read and zeros are stored; or None.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(numel, ROWS * COLUMNS)
    if unless is not None:
        tiles = tl.where(tl.load(unless) > 0, 0, tiles)
    local = _span(ROWS, COLUMNS)
    largest, lowest = tl.zeros((COLUMNS,), tl.int32), tl.zeros((COLUMNS,), tl.float32)
    sum1, sum2 = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    for tile in range(pid, tiles, programs):
        start = offset_of(tile, ROWS * COLUMNS)
        number = load(x + start + local, local < left_of(numel, start, ROWS * COLUMNS))
        # The rows of a column are one thread's.
        largest = tl.maximum(largest, tl.max(magnitude_bits(number), axis=0))
        lowest = tl.minimum(lowest, tl.min(number, axis=0))
        if MOMENTS:
            wide = number.to(tl.float64)
            sum1 += tl.sum(tl.abs(wide), axis=0)
            sum2 += tl.sum(wide * wide, axis=0)
    maximum = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    row = partials + pid * 4
    tl.store(row, maximum.to(tl.float64))
    tl.store(row + 1, (tl.min(lowest, axis=0) < 0).to(tl.float64))
    tl.store(row + 2, tl.sum(sum1, axis=0))
    tl.store(row + 3, tl.sum(sum2, axis=0))


@triton.jit
def _combined(partials, programs, BLOCK: tl.constexpr):
    """(bits of the maximum int32, any negative, and the two sums float64) of `partials` (programs, 4): scalars."""
    row = tl.arange(0, BLOCK)
    inside = row < programs
    bits = tl.max(magnitude_bits(load(partials + row * 4, inside)), axis=0)
    negative = tl.max(tl.load(partials + row * 4 + 1, mask=inside, other=0), axis=0)
    sum1 = tl.sum(tl.load(partials + row * 4 + 2, mask=inside, other=0), axis=0)
    sum2 = tl.sum(tl.load(partials + row * 4 + 3, mask=inside, other=0), axis=0)
    return bits, negative, sum1, sum2


@triton.jit
def combine_statistics(partials, total, programs, BLOCK: tl.constexpr):
    """total: float64 (4,), the statistics of what `partials` (programs, 4) are the statistics of; one program."""
    bits, negative, sum1, sum2 = _combined(partials, programs, BLOCK)
    tl.store(total, bits.to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(total + 1, negative)
    tl.store(total + 2, sum1)
    tl.store(total + 3, sum2)


@triton.jit(do_not_specialize=["programs", "count"])
def choose_scale(
    partials, estimate, scale, signed, maximum, programs, count,
    FLOATING: tl.constexpr, LIMIT: tl.constexpr, UNSIGNED_LIMIT: tl.constexpr,
    SAWB: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, POW2: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantizer.measure from `partials` (programs, 4), the statistics of parts of count elements: one program.

    scale: float32 (), signed: bool (), maximum: float32 (). estimate: float (), taken as the clip where positive; or
    None. C1, C2: SAWB's coefficients as bit patterns of float64. CHECKED: a maximum that is not finite makes the
    scale NaN.
    """
    bits, negative, sum1, sum2 = _combined(partials, programs, BLOCK)
    largest = bits.to(tl.float32, bitcast=True)
    clip = largest
    if SAWB:
        value = sawb_clip(sum1, sum2, count, C1, C2)
        clip = tl.where(value > 0, tl.minimum(value, largest), largest)
    if estimate is not None:
        given = tl.load(estimate).to(tl.float32)
        clip = tl.where(given > 0, given, largest)
    both = tl.full((), True, tl.int1) if FLOATING else negative > 0
    value = scale_of(clip, tl.where(both, LIMIT, UNSIGNED_LIMIT).to(tl.float64), POW2)
    if CHECKED:
        value = tl.where(tl.abs(largest) <= FLOAT32_MAX, value, float("nan"))
    tl.store(scale, value)
    tl.store(signed, both)
    tl.store(maximum, largest)


@triton.jit
def relu(x, mask, numel, size, MOST: tl.constexpr, ROWS: tl.constexpr):
    """x <- max(x, 0) in place, for numel floating elements; mask (uint8, size bytes), MOST: see reference.relu_."""
    pid = tl.program_id(0)
    start, start_byte = offset_of(pid, ROWS * 8), offset_of(pid, ROWS)
    local, row = _span(ROWS, 8), tl.arange(0, ROWS)
    inside = local < left_of(numel, start, ROWS * 8)
    number = tl.load(x + start + local, mask=inside, other=0)
    # Not x > 0, which a NaN is not.
    wide = number if number.dtype == tl.float64 else number.to(tl.float32)
    keep = ~(wide <= 0)
    value = tl.where(keep, wide, 0)
    if MOST is not None:
        below = ~(wide >= MOST)
        value, keep = tl.where(below, value, MOST), keep & below
    tl.store(x + start + local, value.to(number.dtype), mask=inside)
    byte = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask + start_byte + row, byte.to(tl.uint8), mask=row < left_of(size, start_byte, ROWS))


@triton.jit
def relu_backward(grad, mask, out, numel, size, ROWS: tl.constexpr):
    """out: grad where the mask has a bit, else 0; all in the memory order of the mask."""
    pid = tl.program_id(0)
    start, start_byte = offset_of(pid, ROWS * 8), offset_of(pid, ROWS)
    local, row = _span(ROWS, 8), tl.arange(0, ROWS)
    inside = local < left_of(numel, start, ROWS * 8)
    number = tl.load(grad + start + local, mask=inside, other=0)
    byte = tl.load(mask + start_byte + row, mask=row < left_of(size, start_byte, ROWS), other=0).to(tl.int32)
    keep = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    tl.store(out + start + local, tl.where(keep, number, 0), mask=inside)
