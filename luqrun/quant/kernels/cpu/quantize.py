"""The compiled loops (numba) that measure and encode whole tensors: `backend` is the torch side."""

from __future__ import annotations

import numpy as np
from numba import carray

from luqrun.quant.kernels.cpu import encode, rows
from luqrun.quant.kernels.cpu.driver import call6, integers, perform, tasks, unthreaded
from luqrun.quant.kernels.cpu.memory import (
    INT8,
    doubles,
    fields_row,
    floats,
    int8s,
    int32s,
    load,
    pointer,
    set_float,
    store,
    uint8s,
    uint32s,
    uint64s,
)
from luqrun.quant.kernels.cpu.philox import fill_pixels, fill_words, stream_words, transpose
from luqrun.quant.kernels.cpu.rows import GIVEN, HINDSIGHT, f32, i32, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK, ROW
from luqrun.quant.kernels.cpu.statistics import MEASURE_BYTES, ends, measure_row, total

# What a task is told, at one address: see `quantize`. coder: the address of what encodes a row; extremes (int32), sums
# (float64), two a task, and largest (int32), one a task: addresses of what tasks find; each: images a task.
_INTEGERS = (
    *("x", "half", "elements", "images", "pixels", "channels", "each", "codes", "fields", "bits", "pair", "kind"),
    *("floating", "rounding", "underflow", "moments", "observe", "finite"),
    *("name", "coder", "extremes", "sums", "largest"),
)
_FLOATS = ("scale", "low", "high")
REQUEST = np.dtype([*((name, np.int64) for name in _INTEGERS), *((name, np.float32) for name in _FLOATS)], align=True)


@row_loop()
def _read(address):
    return carray(pointer(address), (1,), REQUEST)[0]


@unthreaded
def measure(address, number):
    """The extremes, and the moments if asked for, of elements number * CHUNK up."""
    request = _read(address)
    x, half, wants_moments = request.x, request.half, request.moments
    found = request.extremes + 8 * number, request.sums + 16 * number
    room = np.empty(MEASURE_BYTES, np.uint8)  # see encode_flat
    stop = min(request.elements, (number + 1) * CHUNK)
    for first in range(number * CHUNK, stop, ROW):
        measure_row(x, half, first, min(stop - first, ROW), wants_moments, *found, room.ctypes.data)
    room[0] = 0


@unthreaded
def encode_powers(address, row, count, words, out, first):
    """Encode `count` float32 at `row`, elements `first` up of a tensor. Their codes go to request.codes, by way of out
    (int32), but for int8, which is all that the GEMMs mostly take. words: an address, as row and out are."""
    request = _read(address)
    bits, drawn, kind, codes = int32s(row, count), uint32s(words, count), request.kind, request.codes
    scale, high, finite = request.scale, request.high, request.finite != 0
    if kind == INT8:
        target = int8s(codes + first, count)
        encode.powers(bits, target, drawn, scale, high, request.rounding, request.underflow, finite)
    else:
        target = int32s(out, count)
        encode.powers(bits, target, drawn, scale, high, request.rounding, request.underflow, finite)
        store(target, codes, kind, first)


@unthreaded
def encode_floats(address, row, count, words, out, first):
    """See encode_powers."""
    request = _read(address)
    bits, drawn, kind, codes = int32s(row, count), uint32s(words, count), request.kind, request.codes
    scale, high, floating = request.scale, request.high, request.floating
    if kind == INT8:
        encode.floats(bits, int8s(codes + first, count), drawn, scale, high, floating, request.rounding)
    else:
        target = int32s(out, count)
        encode.floats(bits, target, drawn, scale, high, floating, request.rounding)
        store(target, codes, kind, first)


@unthreaded
def encode_integers(address, row, count, words, out, first):
    """See encode_powers."""
    request = _read(address)
    bits, drawn, kind, codes = int32s(row, count), uint32s(words, count), request.kind, request.codes
    scale, low, high, finite = request.scale, request.low, request.high, request.finite != 0
    if kind == INT8:
        encode.integers(bits, int8s(codes + first, count), drawn, scale, low, high, request.rounding, finite)
    else:
        target = int32s(out, count)
        encode.integers(bits, target, drawn, scale, low, high, request.rounding, finite)
        store(target, codes, kind, first)


@unthreaded
def encode_flat(address, number):
    """Encode elements number * CHUNK up; the pattern of their max|x|, if asked for, goes to request.largest.

    Its arrays are pieces of one, which is named after their last use: numba counts the users of each array that it
    makes, at each use, and frees it after the last.
    """
    request = _read(address)
    x, half, codes, fields = request.x, request.half, request.codes, request.fields
    name, form = (
        carray(pointer(request.name), (4,), np.uint64),
        (request.bits, request.pair, request.kind, request.floating),
    )
    draws = request.rounding == rows.STOCHASTIC or request.underflow == rows.STOCHASTIC
    room = np.empty(17 * ROW, np.uint8)
    at = room.ctypes.data
    words, scratch, buffer = uint64s(at, ROW // 2), floats(at + 4 * ROW, ROW), int32s(at + 8 * ROW, ROW)
    coded, split = int32s(at + 12 * ROW, ROW), uint8s(at + 16 * ROW, ROW)
    stop, largest = min(request.elements, (number + 1) * CHUNK), i32(0)
    for first in range(number * CHUNK, stop, ROW):
        count = min(stop - first, ROW)
        if draws:
            fill_words(words, first // 4, (count + 3) // 4, name)
        row = load(x, half, first, count, buffer)
        call6(request.coder, address, row.ctypes.data, count, words.ctypes.data, coded.ctypes.data, first)
        if fields != 0:
            fields_row(coded[:count], codes, fields, first, form, split, scratch)
        if request.observe:
            largest = max(largest, ends(row.ctypes.data, 0, row.size)[0])
    int32s(request.largest + 4 * number, 1)[0] = largest
    room[0] = 0  # what only its address was taken of must be in use until here


@unthreaded
def encode_images(address, number):
    """Encode images number * each up, (pixels, channels) each, of a channels_last tensor, whose elements are numbered
    image by image and channel by channel; see encode_flat."""
    request = _read(address)
    x, half, pixels, channels = request.x, request.half, request.pixels, request.channels
    name = carray(pointer(request.name), (4,), np.uint64)
    # Four neighbouring pixels of a channel share a Philox call, unless such groups straddle channels.
    aligned = pixels % 4 == 0
    block = min(pixels, max(4, ROW // channels // 4 * 4))
    scratch = block // 4 * channels if aligned else (channels * pixels + 7) // 4
    part = (4 * block * channels + 63) // 64 * 64
    room = np.empty(3 * part + 32 * scratch, np.uint8)
    at = room.ctypes.data
    buffer, coded = int32s(at, block * channels), int32s(at + part, block * channels)
    drawn = carray(pointer(at + 2 * part), (block, channels), np.uint32)
    counters = uint64s(at + 3 * part, 2 * scratch)
    words = carray(pointer(at + 3 * part + 16 * scratch), (4, scratch), np.uint32)
    word, largest = counters.view(np.uint32), i32(0)
    for image in range(number * request.each, min(request.images, (number + 1) * request.each)):
        first = image * channels * pixels
        if not aligned:
            fill_words(counters, first // 4, scratch, name)
        for above in range(0, pixels, block):
            count = min(block, pixels - above)
            if aligned:
                fill_pixels(drawn[:count], counters, words, (first + above) // 4, pixels // 4, name)
            else:
                transpose(word[first % 4 + above :], drawn[:count], pixels)
            start, size = first + above * channels, count * channels
            row = load(x, half, start, size, buffer)
            call6(request.coder, address, row.ctypes.data, size, drawn.ctypes.data, coded.ctypes.data, start)
            if request.observe:
                largest = max(largest, ends(row.ctypes.data, 0, row.size)[0])
    int32s(request.largest + 4 * number, 1)[0] = largest
    room[0] = 0  # see encode_flat


@tasks
def quantize(given, number):
    """Measure x, choose a scale, encode: as much of it as is asked for, in as few passes as that needs. One task.

    x, codes (0: measure only), fields (0: none): addresses. half: whether x is bf16. results: the address of float64
    (6,) of scale, signed, max|x|, any x < 0, sum|x|, sum x^2, of which the first two are read where the range is GIVEN;
    or 0. scale (float32), signed (bool), largest (float32): where these go as well, or 0. statistics: the address of
    the last four of results, where they are known, or 0. stream: of the draw's name. images, pixels, channels: of what
    is not in row-major order, or no images. hindsight: the address of the maximum that is expected (float32), or 0.
    how: floating, rounding, underflow, range, moments (for GIVEN: the maximum), pow2_scale, sample. form: bits, whether
    two fields share a byte, what codes are stored as, floating (Format). limits: the largest codes, signed and not.
    sawb: the address of c1 and c2 (float64). functions: addresses of the team (driver.team), measure, encode_flat or
    encode_images, and what encodes a row.
    """
    elements, x, half, codes, fields, results = integers(given, 0, 6)
    outputs, statistics, stream = integers(given, 6, 3), integers(given, 9, 1)[0], integers(given, 10, 1)[0]
    images, pixels, channels, hindsight = integers(given, 11, 4)
    how, form, limits = integers(given, 15, 7), integers(given, 22, 4), integers(given, 26, 2)
    numbers, functions = doubles(integers(given, 28, 1)[0], 2), integers(given, 29, 4)
    expected = floats(hindsight, 1)[0] if hindsight != 0 else f32(0)
    found, told = np.zeros(6, np.float64), np.zeros(1, REQUEST)
    if results != 0:
        found = doubles(results, 6)
    # With an estimate from before, one pass does: the maximum is found while encoding.
    once = how[3] == HINDSIGHT and how[0] == 1 and expected > 0
    tasks = max(1, (elements + CHUNK - 1) // CHUNK)
    request = told[0]
    request.x, request.half, request.elements, request.moments = x, half, elements, how[4]
    if how[3] != GIVEN and not once and statistics != 0:
        found[2:] = doubles(statistics, 4)
    elif how[3] != GIVEN and not once:
        extremes, sums = np.zeros((tasks, 2), np.int32), np.zeros((tasks, 2), np.float64)
        request.extremes, request.sums = extremes.ctypes.data, sums.ctypes.data
        perform(functions[0], elements, tasks, functions[1], told.ctypes.data)
        total(request.extremes, request.sums, tasks, found[2:])
        extremes[0, 0], sums[0, 0] = 0, 0  # see below
    if how[3] != GIVEN:
        signed = how[0] or found[3] > 0
        clip = rows.clip(how[3], found, elements, numbers[0], numbers[1], expected)
        found[0], found[1] = rows.scale(clip, f32(limits[0] if signed else limits[1]), how[5]), signed
        if not once and not np.isfinite(found[2]):
            found[0] = np.nan
    if codes != 0:
        request.scale = f32(found[0])
        if how[0]:
            request.high = f32(limits[0])
        else:
            request.low, request.high = (
                f32(-limits[0] if found[1] > 0 else 0),
                f32(limits[0] if found[1] > 0 else limits[1]),
            )
        name = stream_words(carray(pointer(stream), (6,), np.int64), how[6])
        request.name, request.coder, request.codes, request.fields = name.ctypes.data, functions[3], codes, fields
        request.floating, request.rounding, request.underflow = how[0], how[1], how[2]
        request.bits, request.pair, request.kind = form[0], form[1], form[2]
        # Then the scale is that of these very elements, and in a logarithmic format no element is clipped: but for a
        # scale near the largest float that is rounded down to a power of two.
        request.finite = how[3] != GIVEN and not once and np.isfinite(found[2])
        request.observe = how[4] or once
        groups = tasks
        if images > 0:
            request.each = max(1, CHUNK // 4 // max(1, pixels * channels))
            request.images, request.pixels, request.channels = images, pixels, channels
            groups = (images + request.each - 1) // request.each
        largest = np.zeros(groups, np.int32)
        request.largest = largest.ctypes.data
        perform(functions[0], elements, groups, functions[2], told.ctypes.data)
        name[0] = 0  # see below
        if once or (how[3] == GIVEN and how[4]):
            for number in range(1, groups):
                largest[0] = max(largest[0], largest[number])
            found[2] = rows.as_float(largest[0])
            if once and not np.isfinite(found[2]):
                found[0] = np.nan
    if outputs[0] != 0:
        set_float(outputs[0], found[0])
        uint8s(outputs[1], 1)[0] = found[1] > 0
    if outputs[2] != 0:
        set_float(outputs[2], found[2])
    told[0].x = 0  # what only its address was taken of must be in use until here
