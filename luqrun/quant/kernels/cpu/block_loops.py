"""The compiled loops (numba) that quantize whole tensors in blocks: `blocks` is the torch side.

A *grid* (outer, rows, between, columns) says how memory is read, a block (a, b) is a rows of b columns: see
luqrun.quant.kernels.blocks.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from luqrun.quant.kernels.cpu import block_rows, block_scales, block_sums, rows
from luqrun.quant.kernels.cpu.block_scales import E4M3, E8M0, FP32
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.encode import float_of
from luqrun.quant.kernels.cpu.memory import doubles, floats, halves, int32s, pointer, uint8s, uint32s
from luqrun.quant.kernels.cpu.philox import fill_pixels, fill_words, stream_words, transpose
from luqrun.quant.kernels.cpu.rows import STOCHASTIC, f32, i32, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK, ROW

PANEL = 8192  # elements that are worked on together


@tasks
def words(request, number):
    """The random words of elements number * CHUNK up, uint32 at `out` in memory order. out has room for a multiple of
    four words."""
    elements, out, stream, sample = integers(request, 0, 4)
    name = stream_words(carray(pointer(stream), (6,), np.int64), sample)
    for first in range(number * CHUNK, min(elements, (number + 1) * CHUNK), ROW):
        count = (min(elements - first, ROW) + 3) // 4
        fill_words(carray(pointer(out + 4 * first), (2 * count,), np.uint64), first // 4, count, name)


@tasks
def words_of_images(request, image):
    """`words` of an image, (pixels, channels), of a channels_last tensor: see quantize.encode_images."""
    out, stream, sample, pixels, channels = integers(request, 0, 5)
    name = stream_words(carray(pointer(stream), (6,), np.int64), sample)
    aligned = pixels % 4 == 0
    block = min(pixels, max(4, ROW // channels // 4 * 4))
    scratch = block // 4 * channels if aligned else (channels * pixels + 7) // 4
    counters, lanes = np.empty(2 * scratch, np.uint64), np.empty((4, scratch), np.uint32)
    word, first = counters.view(np.uint32), image * channels * pixels
    if not aligned:
        fill_words(counters, first // 4, scratch, name)
    for above in range(0, pixels, block):
        count = min(block, pixels - above)
        drawn = carray(pointer(out + 4 * (first + above * channels)), (count, channels), np.uint32)
        if aligned:
            fill_pixels(drawn, counters, lanes, (first + above) // 4, pixels // 4, name)
        else:
            transpose(word[first % 4 + above :], drawn, pixels)


@row_loop()
def _six_floats(patterns):
    a, b, c, d, e, f = patterns
    return float_of(i32(a)), float_of(i32(b)), float_of(i32(c)), float_of(i32(d)), float_of(i32(e)), float_of(i32(f))


@row_loop()
def _load_panel(x, half, start, stride, high, run, elements, panel, raw):
    """`high` runs of memory, a stride apart, into the panel."""
    if half:
        block_rows.gather(halves(x, elements), raw, start, stride, high, run)
        rows.patterns(raw[: high * run], panel.view(np.int32))
    else:
        block_rows.gather(floats(x, elements), panel, start, stride, high, run)


@row_loop()
def _draw_panel(words, spare, start, stride, high, run, name):
    """The random words of `high` runs of memory whose elements are numbered as they lie there."""
    for r in range(high):
        first = start + r * stride
        groups = (first + run + 3) // 4 - first // 4
        fill_words(spare, first // 4, groups, name)
        block_rows.gather(spare.view(np.uint32), words[r * run : (r + 1) * run], first % 4, 0, 1, run)


@row_loop()
def _of_elements(of_blocks, expanded, count, wide):
    """A number of each block for each element of a row of the panel."""
    if wide == 1:
        return of_blocks
    block_rows.expand(of_blocks, expanded, count, wide)
    return expanded


@row_loop()
def _code_panel(panel, scales, words, high, count, wide, codes, values, spare, how, numbers):
    """The codes of a panel by its blocks' scales, and with these scales on them. spare: two numbers a block, and two an
    element of a row."""
    by, units, more, further = spare
    if how[3] == E4M3:
        block_scales.inverses(scales, numbers[5], by, count)
    elif how[3] == E8M0:
        block_scales.inverse_powers(scales, by, count)
    else:
        block_scales.divisors(scales, numbers[1], by, count)
    block_rows.scale_by(scales, numbers[1], units, count)
    by, units = _of_elements(by, more, count, wide), _of_elements(units, further, count, wide)
    block_rows.code_rows(
        panel, by, units, words, codes, values, high, count * wide, f32(1) / numbers[1], numbers[0], how[0],
        how[3] != FP32, how[1],
    )  # fmt: skip


@row_loop()
def _choose_finer(panel, words, high, count, wide, coded, clips, scales, finer, spare, sums, how, numbers):
    """Four over six: the codes, values and scales of the blocks that a finer scale suits better."""
    codes, values, others, finer_values = coded
    block_scales.e4m3_scales(clips, finer, count, numbers[2], numbers[4], f32(1.5))
    _code_panel(panel, finer, words, high, count, wide, others, finer_values, spare, how, numbers)
    better = spare[0]
    block_sums.finer_is_better(panel, clips, values, finer_values, numbers[5], how[6], better, sums, high, count, wide)
    block_rows.take_better(better, finer, scales, 1, count)
    better = _of_elements(better, spare[2], count, wide)
    block_rows.take_better(better, others, codes, high, count * wide)
    block_rows.take_better(better, finer_values, values, high, count * wide)


@row_loop()
def _correct(panel, words, high, count, wide, codes, values, scales, spare, sums, numbers):
    """EDEN: each scale times <x, x> / <x, Q(x)>, drawn, and the values with it."""
    block_sums.gains(panel, values, numbers[5], spare[0], sums, high, count, wide)
    block_scales.correct(spare[0], scales, words, count)
    block_rows.scale_by(scales, numbers[1], spare[1], count)
    block_rows.decode_rows(codes, _of_elements(spare[1], spare[3], count, wide), values, high, count * wide)


@tasks
def encode_blocks(request, task):
    """Codes times scales, fields and scales of a tensor.

    x, values, scales: addresses; fields: of a byte an element, or with `pairs` of half a byte, or 0. half, values_half:
    bf16 or not. drawn: addresses of the elements' words (0: they are numbered as they lie in memory, and drawn here by
    stream, an address, and sample), and of those that the second coding of four over six, or eden, draws; or 0. how:
    mantissa (of integers: too large for any exponent), rounding, whether the range is rms, scale format, carry and
    shift of its exponent, what four over six compares, eden, mantissa and bits of the fields. numbers (float32): the
    largest code, unit, top, headroom, and of e4m3 the encode scale and the tensor's scale. strip: blocks of a panel;
    each: panels a task.
    """
    elements, x, half, stream, sample, values, values_half, fields, scales = integers(request, 0, 9)
    drawn, grid, block = integers(request, 9, 2), integers(request, 11, 4), integers(request, 15, 2)
    how, numbers = integers(request, 17, 10), _six_floats(integers(request, 27, 6))
    strip, each, pairs = integers(request, 33, 3)
    outer, height, between, columns = grid
    down, across = (height + block[0] - 1) // block[0], (columns + block[1] - 1) // block[1]
    stride, strips = between * columns, (across + strip - 1) // strip
    panels, size = outer * down * between * strips, strip * block[0] * block[1]
    draws = how[1] == STOCHASTIC
    name = stream_words(carray(pointer(stream), (6,), np.int64), sample)
    # One piece of memory: to count the users of many would take longer than a pass over a panel.
    part = (4 * size + 127) // 64 * 64
    memory = np.empty(24 * part, np.uint8)
    at = memory.ctypes.data
    codes = floats(at + part, size)
    room = (
        floats(at + 5 * part, strip),
        floats(at + 6 * part, strip),
        floats(at + 7 * part, strip * block[1]),
        floats(at + 8 * part, strip * block[1]),
    )
    chosen, finer, clips = floats(at + 9 * part, strip), floats(at + 10 * part, strip), floats(at + 11 * part, strip)
    patterns = int32s(at + 12 * part, strip)
    words, more = uint32s(at + 13 * part, size), uint32s(at + 14 * part, size)
    raw, coded, joined = halves(at + 15 * part, size), uint8s(at + 16 * part, size), uint8s(at + 17 * part, size)
    spare = carray(pointer(at + 18 * part), (size // 2 + 4,), np.uint64)
    sums = doubles(at + 20 * part, strip), doubles(at + 22 * part, strip)
    for number in range(task * each, min(panels, (task + 1) * each)):
        band, left = number // strips, number % strips * strip
        high_band, middle = band // between, band % between
        image, row = high_band // down, high_band % down
        high = min(block[0], height - row * block[0])
        start_row = ((image * height + row * block[0]) * between + middle) * columns
        end = min(across, left + strip)
        while left < end:
            # A short block at the end is a panel of its own.
            whole = min(end, columns // block[1])
            count = whole - left if left < whole else 1
            wide = block[1] if left < whole else columns - left * block[1]
            start, first, run = start_row + left * block[1], band * across + left, count * wide
            where = (start, stride, high, run)
            panel, decoded = floats(at, size), floats(at + 2 * part, size)
            if high == 1 and not half and numbers[3] == f32(1):
                panel = floats(x + 4 * start, run)  # where it lies
            else:
                _load_panel(x, half, start, stride, high, run, elements, panel, raw)
            if high == 1 and not values_half:
                decoded = floats(values + 4 * start, run)
            block_rows.maxima(panel.view(np.int32), patterns, high, count, wide)
            block_rows.as_floats(patterns, clips, count)
            if how[2]:
                block_sums.rms_clips(panel, clips, sums[0], high, count, wide)
            if numbers[3] != f32(1):
                block_rows.scale_by(panel, numbers[3], panel, high * run)
            if how[3] == E8M0:
                block_scales.e8m0_scales(clips, chosen, count, how[4], how[5])
            elif how[3] == E4M3:
                block_scales.e4m3_scales(clips, chosen, count, numbers[2], numbers[4], f32(1))
            else:
                block_scales.fp32_scales(clips, chosen, count, numbers[2])
            if draws and drawn[0] != 0:
                block_rows.gather(uint32s(drawn[0], elements), words, *where)
            elif draws:
                _draw_panel(words, spare, *where, name)
            _code_panel(panel, chosen, words, high, count, wide, codes, decoded, room, how, numbers)
            if how[6] != 0:
                if draws:
                    block_rows.gather(uint32s(drawn[1], elements), more, *where)
                both = codes, decoded, floats(at + 3 * part, size), floats(at + 4 * part, size)
                errors = floats(at + 20 * part, strip), floats(at + 22 * part, strip)
                _choose_finer(panel, more, high, count, wide, both, clips, chosen, finer, room, errors, how, numbers)
            if how[7]:
                block_rows.gather(uint32s(drawn[1], first + count), more, first, 0, 1, count)
                _correct(panel, more, high, count, wide, codes, decoded, chosen, room, sums, numbers)
            if values_half:
                rows.round_to_bf16(decoded[: high * run].view(np.int32), raw)
                block_rows.scatter(raw, halves(values, elements), *where)
            elif high > 1:
                block_rows.scatter(decoded, floats(values, elements), *where)
            if fields != 0:
                block_rows.to_fields(codes[: high * run], coded, how[8], how[9])
                if pairs:  # an odd run is the only row
                    rows.join(coded[: high * run], joined)
                    target = uint8s(fields, (elements + 1) // 2)
                    block_rows.scatter(joined, target, start // 2, stride // 2, high, (run + 1) // 2)
                else:
                    block_rows.scatter(coded, uint8s(fields, elements), *where)
            kept = scales + (4 if how[3] == FP32 else 1) * first
            block_scales.store_scales(chosen, floats(kept, count), uint8s(kept, count), count, how[3])
            left += count
    memory[0] = 0  # what only its address was taken of must be in use until here


@tasks
def decode_blocks(request, task):
    """The inverse of `encode_blocks`: values from fields, a byte an element, and scales. kind: scale format; table: the
    address of the code, as float32, of each field."""
    fields, scales, values, half, kind, table = integers(request, 0, 6)
    grid, block = integers(request, 6, 4), integers(request, 10, 2)
    pattern, strip, each = integers(request, 12, 3)
    unit = float_of(i32(pattern))
    outer, height, between, columns = grid
    down, across = (height + block[0] - 1) // block[0], (columns + block[1] - 1) // block[1]
    strips = (across + strip - 1) // strip
    panels = outer * height * between * strips
    codes = floats(table, 256)
    by, expanded = np.empty(strip, np.float32), np.empty(strip * block[1], np.float32)
    exact = np.empty(strip * block[1], np.float32)
    for number in range(task * each, min(panels, (task + 1) * each)):
        band, left = number // strips, number % strips * strip
        row_of, middle = band // between, band % between
        image, row = row_of // height, row_of % height
        count = min(across, left + strip) - left
        first = ((image * down + row // block[0]) * between + middle) * across + left
        start = ((image * height + row) * between + middle) * columns + left * block[1]
        run = min(columns, (left + count) * block[1]) - left * block[1]
        kept = scales + (4 if kind == FP32 else 1) * first
        block_scales.load_scales(floats(kept, count), uint8s(kept, count), by, count, kind)
        block_rows.scale_by(by, unit, by, count)
        units = _of_elements(by, expanded, count, block[1])
        source = uint8s(fields + start, run)
        out = exact[:run] if half else floats(values + 4 * start, run)
        for j in range(run):
            out[j] = codes[source[j]] * units[j]
        if half:
            rows.round_to_bf16(exact[:run].view(np.int32), halves(values + 2 * start, run))
