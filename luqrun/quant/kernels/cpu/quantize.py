"""The compiled loops (numba) that measure and encode whole tensors: `backend` is the torch side."""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.driver import (
    CHUNK,
    INT8,
    ROW,
    driver,
    fields_row,
    halves,
    int8s,
    int32s,
    load,
    pointer,
    set_float,
    store,
    uint8s,
)
from luqrun.quant.kernels.cpu.encode import encode
from luqrun.quant.kernels.cpu.philox import fill_pixels, fill_words, stream_words, transpose
from luqrun.quant.kernels.cpu.rows import GIVEN, HINDSIGHT, f32, i32, row_loop


@row_loop()
def _measure_task(x, half, start, stop, moments, extremes, sums):
    buffer = np.empty(ROW, np.int32)
    for first in range(start, stop, ROW):
        count = min(stop - first, ROW)
        if half:
            largest, negative = rows.extremes_of_halves(halves(x + 2 * first, count))
        else:
            largest, negative = rows.extremes(int32s(x + 4 * first, count))
        extremes[0], extremes[1] = max(extremes[0], largest), min(extremes[1], negative)
        if moments:
            sum1, sum2 = rows.moments(load(x, half, first, count, buffer).view(np.float32))
            sums[0] += sum1
            sums[1] += sum2


@row_loop()
def _encode_row(row, out, words, codes, kind, first, how, ends, finite):
    """Codes of `row` go to `codes`; by way of out (int32), but for int8, which is all that the GEMMs mostly take."""
    if kind == INT8:
        target = int8s(codes + first, row.size)
        encode(row, target, words, ends[0], ends[1], ends[2], how[0], how[1], how[2], finite)
    else:
        encode(row, out, words, ends[0], ends[1], ends[2], how[0], how[1], how[2], finite)
        store(out, codes, kind, first)


@row_loop()
def _flat_task(x, half, start, stop, codes, fields, how, form, name, ends, finite, observe):
    """Encode elements start .. stop - 1, a multiple of ROW from the first; returns the pattern of their max|x|."""
    words, scratch, buffer = np.empty(ROW // 2, np.uint64), np.empty(ROW, np.float32), np.empty(ROW, np.int32)
    drawn, coded, split = words.view(np.uint32), np.empty(ROW, np.int32), np.empty(ROW, np.uint8)
    largest = i32(0)
    for first in range(start, stop, ROW):
        count = min(stop - first, ROW)
        if how[1] == rows.STOCHASTIC or how[2] == rows.STOCHASTIC:
            fill_words(words, first // 4, (count + 3) // 4, name)
        row, out = load(x, half, first, count, buffer), coded[:count]
        _encode_row(row, out, drawn, codes, form[2], first, how, ends, finite)
        if fields != 0:
            fields_row(out, codes, fields, first, form, split, scratch)
        if observe:
            largest = max(largest, rows.extremes(row)[0])
    return largest


@row_loop()
def _images_task(x, half, start, stop, pixels, channels, codes, how, form, name, ends, finite, observe):
    """Encode images start .. stop - 1, (pixels, channels) each, of a channels_last tensor, whose elements are numbered
    image by image and channel by channel; returns the pattern of their max|x|."""
    # Four neighbouring pixels of a channel share a Philox call, unless such groups straddle channels.
    aligned = pixels % 4 == 0
    block = min(pixels, max(4, ROW // channels // 4 * 4))
    buffer = np.empty(block * channels, np.int32)
    drawn, coded = np.empty((block, channels), np.uint32), np.empty(block * channels, np.int32)
    scratch = block // 4 * channels if aligned else (channels * pixels + 7) // 4
    counters, words = np.empty(2 * scratch, np.uint64), np.empty((4, scratch), np.uint32)
    word, largest = counters.view(np.uint32), i32(0)
    for image in range(start, stop):
        first = image * channels * pixels
        if not aligned:
            fill_words(counters, first // 4, scratch, name)
        for above in range(0, pixels, block):
            count = min(block, pixels - above)
            if aligned:
                fill_pixels(drawn[:count], counters, words, (first + above) // 4, pixels // 4, name)
            else:
                transpose(word[first % 4 + above :], drawn[:count], pixels)
            row = load(x, half, first + above * channels, count * channels, buffer)
            out = coded[: count * channels]
            _encode_row(row, out, drawn.reshape(-1), codes, form[2], first + above * channels, how, ends, finite)
            if observe:
                largest = max(largest, rows.extremes(row)[0])
    return largest


@driver
def quantize(elements, x, codes, fields, results, outputs, stream, layout, how, form, limits, numbers):
    """Measure x, choose a scale, encode: as much of it as is asked for, in as few passes as that needs.

    x, codes (0: measure only), fields (0: none), results, stream: addresses. results: float64 (6,) of scale, signed,
    max|x|, any x < 0, sum|x|, sum x^2; the first two are read where the range is GIVEN. layout: bf16 or not, images,
    pixels, channels (no images: memory order is row-major). how: floating, rounding, underflow, range, moments (for
    GIVEN: the maximum), pow2_scale, sample. form: bits, whether two fields share a byte, what codes are stored as,
    floating (Format). outputs: where scale (float32), signed (bool) and max|x| (float32) go as well, or 0. limits: the
    largest codes, signed and not. numbers: SAWB's c1 and c2, and the hindsight maximum.
    """
    half, images, pixels, channels = layout
    ends, found = np.empty(3, np.float32), np.zeros(6, np.float64)
    if results != 0:
        found = carray(pointer(results), (6,), np.float64)
    # With an estimate from before, one pass does: the maximum is found while encoding.
    once = how[3] == HINDSIGHT and how[0] == 1 and numbers[2] > 0
    tasks = max(1, (elements + CHUNK - 1) // CHUNK)
    if how[3] != GIVEN and not once:
        extremes, sums = np.zeros((tasks, 2), np.int32), np.zeros((tasks, 2), np.float64)
        for task in prange(tasks):
            stop = min(elements, (task + 1) * CHUNK)
            _measure_task(x, half, task * CHUNK, stop, how[4], extremes[task], sums[task])
        found[2], found[3] = rows.as_float(extremes[:, 0].max()), extremes[:, 1].min() < 0
        found[4], found[5] = sums[:, 0].sum(), sums[:, 1].sum()
    if how[3] != GIVEN:
        signed = how[0] or found[3] > 0
        clip = rows.clip(how[3], found, elements, numbers[0], numbers[1], numbers[2])
        found[0], found[1] = rows.scale(clip, f32(limits[0] if signed else limits[1]), how[5]), signed
        if not once and not np.isfinite(found[2]):
            found[0] = np.nan
    if codes != 0:
        ends[0] = f32(found[0])
        if how[0]:
            ends[1], ends[2] = 0, limits[0]
        else:
            ends[1], ends[2] = (-limits[0], limits[0]) if found[1] > 0 else (0, limits[1])
        name = stream_words(carray(pointer(stream), (6,), np.int64), how[6])
        draws = how[1] == rows.STOCHASTIC or how[2] == rows.STOCHASTIC
        coding = (how[0], how[1], how[2])
        # Then the scale is that of these very elements, and in a logarithmic format no element is clipped: but for a
        # scale near the largest float that is rounded down to a power of two.
        finite = how[3] != GIVEN and not once and np.isfinite(found[2])
        by_image = images > 0 and draws  # without draws the order of the elements does not matter
        each = max(1, CHUNK // 4 // max(1, pixels * channels))  # images a task
        groups = (images + each - 1) // each
        largest = np.zeros(groups if by_image else tasks, np.int32)
        if by_image:
            for group in prange(groups):
                stop = min(images, (group + 1) * each)
                largest[group] = _images_task(
                    x, half, group * each, stop, pixels, channels, codes, coding, form, name, ends, finite,
                    how[4] or once,
                )  # fmt: skip
        else:
            for task in prange(tasks):
                stop = min(elements, (task + 1) * CHUNK)
                largest[task] = _flat_task(
                    x, half, task * CHUNK, stop, codes, fields, coding, form, name, ends, finite, how[4] or once
                )
        if once or (how[3] == GIVEN and how[4]):
            found[2] = rows.as_float(largest.max())
            if once and not np.isfinite(found[2]):
                found[0] = np.nan
    if outputs[0] != 0:
        set_float(outputs[0], found[0])
        uint8s(outputs[1], 1)[0] = found[1] > 0
    if outputs[2] != 0:
        set_float(outputs[2], found[2])
