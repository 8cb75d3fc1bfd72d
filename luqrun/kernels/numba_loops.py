"""The compiled loops of the CPU kernels (numba) over whole tensors: luqrun.kernels.cpu is the torch side.

They take addresses (Tensor.data_ptr()) of dense memory and plain numbers: views and small tensors made on the way
would cost more than the work itself where layers are small.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import types
from pathlib import Path

import numba
import numpy as np
import torch
from numba import carray, prange
from numba.core import cgutils
from numba.core import types as nb
from numba.extending import intrinsic

from luqrun.kernels import numba_rows as rows
from luqrun.kernels.numba_rows import GIVEN, HINDSIGHT, f32, i32, row_loop, u64

ROW = 1024  # elements: their words, patterns, ratios and codes take 16 KB
CHUNK = 1 << 16  # elements a task; fixed, so that sums do not depend on the number of threads
INT8, INT16, FLOAT32, BF16 = 0, 1, 2, 3  # what the codes are stored as


def _openmp_found() -> bool:
    # torch brings an OpenMP library of its own. With its symbols global, numba's threads are torch's, and need not be
    # woken (50 to 300 us a call) when work passes from one to the other.
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


# numba's own workqueue aborts when two Python threads enter it and sleeps between tasks: OpenMP, or one thread.
THREADED = _openmp_found()
if THREADED:
    numba.config.THREADING_LAYER = "omp"

# Only the loops written as prange: any other array expression would be a round of waking threads of its own.
_ELSE_SERIAL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
_parallel = functools.partial(row_loop, parallel={"prange": True, **dict.fromkeys(_ELSE_SERIAL, False)})
_home = os.getpid()  # OpenMP's threads do not survive a fork: a DataLoader's worker works alone


class driver:
    """A loop over tasks, compiled for torch's threads and for one. The first argument says how many elements it has."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.serial = row_loop()(function)
        # A name of its own: numba's cache does not tell parallel code from serial code.
        twin = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_parallel")
        twin.__module__, twin.__qualname__ = function.__module__, twin.__name__
        self.parallel = _parallel()(twin) if THREADED else self.serial

    def __call__(self, elements, *rest):
        threads = threads_for(elements)
        if threads == 1:
            return self.serial(elements, *rest)
        numba.set_num_threads(threads)
        return self.parallel(elements, *rest)


def threads_for(elements: int) -> int:
    """Threads that a loop over so many elements gets: torch's, where it has work for two."""
    if not THREADED or elements <= CHUNK or os.getpid() != _home:
        return 1
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return nb.voidptr(address), codegen


@row_loop()
def _bytes(address, count):
    return carray(_pointer(address), (count,), np.uint8)


@row_loop()
def _int8s(address, count):
    return carray(_pointer(address), (count,), np.int8)


@row_loop()
def _int16s(address, count):
    return carray(_pointer(address), (count,), np.int16)


@row_loop()
def _halves(address, count):
    return carray(_pointer(address), (count,), np.uint16)


@row_loop()
def _int32s(address, count):
    return carray(_pointer(address), (count,), np.int32)


@row_loop()
def _int64s(address, count):
    return carray(_pointer(address), (count,), np.int64)


@row_loop()
def _set_float(address, value):
    carray(_pointer(address), (1,), np.float32)[0] = f32(value)


@row_loop()
def _floats(address, count):
    return carray(_pointer(address), (count,), np.float32)


@row_loop()
def _load(x, half, start, count, buffer):
    """The float32 bit patterns of `count` elements: of bf16, the upper halves."""
    if half:
        return rows.patterns(_halves(x + 2 * start, count), buffer)
    return _int32s(x + 4 * start, count)


@row_loop()
def _store(codes, target, kind, start):
    """Codes (int32) as int8, int16, float32 or bf16."""
    count = codes.size
    if kind == INT8:
        rows.copy(codes, _int8s(target + start, count))
    elif kind == INT16:
        rows.copy(codes, _int16s(target + 2 * start, count))
    elif kind == FLOAT32:
        rows.copy(codes, _floats(target + 4 * start, count))
    else:
        rows.to_bf16(codes, _halves(target + 2 * start, count))


@row_loop()
def _measure_task(x, half, start, stop, moments, extremes, sums):
    buffer = np.empty(ROW, np.int32)
    for first in range(start, stop, ROW):
        row = _load(x, half, first, min(stop - first, ROW), buffer)
        largest, negative = rows.extremes(row)
        extremes[0], extremes[1] = max(extremes[0], largest), min(extremes[1], negative)
        if moments:
            sum1, sum2 = rows.moments(row.view(np.float32))
            sums[0] += sum1
            sums[1] += sum2


@row_loop()
def _flat_task(x, half, start, stop, codes, fields, how, form, name, ends, observe):
    """Encode elements start .. stop - 1, a multiple of ROW from the first; returns the pattern of their max|x|."""
    words, ratio, buffer = np.empty(ROW // 2, np.uint64), np.empty(ROW, np.float32), np.empty(ROW, np.int32)
    drawn, coded, split = words.view(np.uint32), np.empty(ROW, np.int32), np.empty(ROW, np.uint8)
    largest = i32(0)
    for first in range(start, stop, ROW):
        count = min(stop - first, ROW)
        if how[1] == rows.STOCHASTIC or how[2] == rows.STOCHASTIC:
            rows.fill_words(words, first // 4, (count + 3) // 4, name)
        row, out = _load(x, half, first, count, buffer), coded[:count]
        rows.encode(row, out, drawn, ratio, ends[0], ends[1], ends[2], how[0], how[1], how[2])
        _store(out, codes, form[2], first)
        if fields != 0:
            _fields_row(out, fields, first, form, split, ratio)
        if observe:
            largest = max(largest, rows.extremes(row)[0])
    return largest


@row_loop()
def _fields_row(codes, fields, first, form, split, scratch):
    count = codes.size
    if form[1]:
        rows.to_fields(codes, split[:count], scratch, form[3], form[0])
        rows.join(split[:count], _bytes(fields + first // 2, (count + 1) // 2))
    else:
        rows.to_fields(codes, _bytes(fields + first, count), scratch, form[3], form[0])


@row_loop()
def _image_task(x, half, image, pixels, channels, codes, how, form, name, ends, observe):
    """Encode one (pixels, channels) image of a channels_last tensor, whose elements are numbered channel by channel."""
    # Four neighbouring pixels of a channel share a Philox call, unless such groups straddle channels.
    aligned = pixels % 4 == 0
    block = min(pixels, max(4, ROW // channels // 4 * 4))
    first = image * channels * pixels
    buffer, ratio = np.empty(block * channels, np.int32), np.empty(block * channels, np.float32)
    drawn, coded = np.empty((block, channels), np.uint32), np.empty(block * channels, np.int32)
    scratch = block // 4 * channels if aligned else (channels * pixels + 7) // 4
    counters, words = np.empty(2 * scratch, np.uint64), np.empty((4, scratch), np.uint32)
    if not aligned:
        rows.fill_words(counters, first // 4, scratch, name)
    word = counters.view(np.uint32)
    largest = i32(0)
    for start in range(0, pixels, block):
        count = min(block, pixels - start)
        if aligned:
            rows.fill_pixels(drawn[:count], counters, words, (first + start) // 4, pixels // 4, name)
        else:
            rows.transpose(word[first % 4 + start :], drawn[:count], pixels)
        row = _load(x, half, first + start * channels, count * channels, buffer)
        out = coded[: count * channels]
        rows.encode(row, out, drawn.reshape(-1), ratio, ends[0], ends[1], ends[2], how[0], how[1], how[2])
        _store(out, codes, form[2], first + start * channels)
        if observe:
            largest = max(largest, rows.extremes(row)[0])
    return largest


@driver
def quantize(elements, x, codes, fields, results, outputs, stream, layout, how, form, limits, numbers):
    """Measure x, choose a scale, encode: as much of it as is asked for, in as few passes as that needs.

    x, codes (0: measure only), fields (0: none), results, stream: addresses. results: float64 (6,) of scale, signed,
    max|x|, any x < 0, sum|x|, sum x^2; the first two are read where the range is GIVEN. layout: bf16 or not, images,
    pixels, channels (no images: memory order is row-major). how: logarithmic, rounding, underflow, range, moments (for
    GIVEN: the maximum), pow2_scale, sample. form: bits, whether two fields share a byte, what codes are stored as,
    logarithmic. outputs: where scale (float32), signed (bool) and max|x| (float32) go as well, or 0. limits: the
    largest codes, signed and not. numbers: SAWB's c1 and c2, and the hindsight maximum.
    """
    half, images, pixels, channels = layout
    ends, found = np.empty(3, np.float32), carray(_pointer(results), (6,), np.float64)
    # With an estimate from before, one pass does: the maximum is found while encoding.
    once = how[3] == HINDSIGHT and how[0] and numbers[2] > 0
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
        name = rows.stream_words(carray(_pointer(stream), (6,), np.int64), how[6])
        draws = how[1] == rows.STOCHASTIC or how[2] == rows.STOCHASTIC
        coding = (how[0], how[1], how[2])
        by_image = images > 0 and draws  # without draws the order of the elements does not matter
        largest = np.zeros(images if by_image else tasks, np.int32)
        if by_image:
            for image in prange(images):
                largest[image] = _image_task(
                    x, half, image, pixels, channels, codes, coding, form, name, ends, how[4] or once
                )
        else:
            for task in prange(tasks):
                stop = min(elements, (task + 1) * CHUNK)
                largest[task] = _flat_task(
                    x, half, task * CHUNK, stop, codes, fields, coding, form, name, ends, how[4] or once
                )
        if once or (how[3] == GIVEN and how[4]):
            found[2] = rows.as_float(largest.max())
            if once and not np.isfinite(found[2]):
                found[0] = np.nan
    if outputs[0] != 0:
        _set_float(outputs[0], found[0])
        _bytes(outputs[1], 1)[0] = found[1] > 0
        _set_float(outputs[2], found[2])


@driver
def pack(elements, codes, kind, fields, form):
    """int8 or int16 codes to their fields: see `quantize`."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        coded, split, scratch = np.empty(ROW, np.int32), np.empty(ROW, np.uint8), np.empty(ROW, np.float32)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            if kind == INT8:
                rows.copy(_int8s(codes + first, count), coded[:count])
            else:
                rows.copy(_int16s(codes + 2 * first, count), coded[:count])
            _fields_row(coded[:count], fields, first, form, split, scratch)


@driver
def unpack(elements, fields, codes, signed, form):
    """Fields to codes: the inverse of `pack`; signed: whether an integer format's codes have a sign."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        split, coded = np.empty(ROW, np.uint8), np.empty(ROW, np.int32)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            row = split[:count]
            if form[1]:
                rows.split(_bytes(fields + first // 2, (count + 1) // 2), row)
            else:
                row = _bytes(fields + first, count)
            rows.from_fields(row, coded[:count], signed, form[3], form[0])
            _store(coded[:count], codes, form[2], first)


@driver
def rectify(elements, x, half, mask):
    """x <- max(x, 0) in place, and a bit of the mask for each element that is not <= 0."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        keep = np.zeros(ROW, np.uint8)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            bits = _bytes(mask + first // 8, (count + 7) // 8)
            if half:
                rows.rectify(_halves(x + 2 * first, count), keep, bits, i32(0x7F80), i32(0x7FFF))
            else:
                rows.rectify(_int32s(x + 4 * first, count), keep, bits, i32(0x7F800000), i32(0x7FFFFFFF))


@driver
def apply_mask(elements, grad, half, mask, out):
    """out is grad where the mask has a bit, else 0."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        keep = np.empty(ROW, np.uint8)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            bits = _bytes(mask + first // 8, (count + 7) // 8)
            if half:
                rows.apply_mask(_halves(grad + 2 * first, count), bits, keep, _halves(out + 2 * first, count))
            else:
                rows.apply_mask(_int32s(grad + 4 * first, count), bits, keep, _int32s(out + 4 * first, count))


@row_loop()
def _patch_line(out, a, image, row, height, width, channels, out_width, kernel, stride, padding, dilation):
    """im2col of one output row: see `patches`."""
    segment = u64(kernel[1] * channels)
    to = u64(0)
    for column in range(out_width):
        w = column * stride[1] - padding[1]
        for r in range(kernel[0]):
            h = row * stride[0] - padding[0] + r * dilation[0]
            line = (image * height + h) * width
            if h < 0 or h >= height:
                for j in range(segment):
                    out[to + j] = 0
            elif dilation[1] == 1 and w >= 0 and w + kernel[1] <= width:
                at = u64(line + w) * u64(channels)
                for j in range(segment):
                    out[to + j] = a[at + j]
            else:
                for s in range(kernel[1]):
                    column_in = w + s * dilation[1]
                    inside = column_in >= 0 and column_in < width
                    at, piece = u64(line + column_in) * u64(channels), to + u64(s * channels)
                    for j in range(u64(channels)):
                        out[piece + j] = a[at + j] if inside else 0
            to += segment


@driver
def patches(elements, out, a, first, size, out_size, kernel, stride, padding, dilation):
    """im2col: the output rows first, first + 1, ... of all images together, as int8 (rows * W', R * S * C) at `out`.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); elements: of out; out_size: (H', W').
    """
    images, height, width, channels = size
    depth = kernel[0] * kernel[1] * channels
    line = out_size[1] * depth
    whole = images * height * width * channels
    for task in prange(elements // line):
        image, row = (first + task) // out_size[0], (first + task) % out_size[0]
        if channels % 8 == 0:
            target, source = _int64s(out + task * line, line // 8), _int64s(a, whole // 8)
            unit = channels // 8
            _patch_line(target, source, image, row, height, width, unit, out_size[1], kernel, stride, padding, dilation)
        else:
            target, source = _int8s(out + task * line, line), _int8s(a, whole)
            _patch_line(
                target, source, image, row, height, width, channels, out_size[1], kernel, stride, padding, dilation
            )
