"""The compiled loops (numba) over codes and bits: packing, the ReLU's mask, and the patches of a convolution."""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.masks import TAIL_BYTES, apply_row, rectify_row
from luqrun.quant.kernels.cpu.memory import (
    INT8,
    accumulate,
    copy,
    fields_row,
    floats,
    halves,
    int16s,
    int32s,
    is_set,
    product_of,
    store,
    uint8s,
)
from luqrun.quant.kernels.cpu.rows import row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK, ROW
from luqrun.quant.kernels.cpu.statistics import MEASURE_BYTES, measure_row


@tasks
def pack(request, number):
    """int8 or int16 codes to their fields: see `quantize`."""
    elements, codes, fields = integers(request, 0, 3)
    form = integers(request, 3, 4)
    room = np.empty(9 * ROW, np.uint8)  # see quantize.encode_flat
    at = room.ctypes.data
    coded, scratch, split = int32s(at, ROW), floats(at + 4 * ROW, ROW), uint8s(at + 8 * ROW, ROW)
    for first in range(number * CHUNK, min(elements, (number + 1) * CHUNK), ROW):
        count = min(ROW, elements - first)
        if form[2] != INT8:
            rows.copy(int16s(codes + 2 * first, count), coded[:count])
        fields_row(coded[:count], codes, fields, first, form, split, scratch)
    room[0] = 0  # see encode_flat


@tasks
def unpack(request, number):
    """Fields to codes: the inverse of `pack`; signed: where it stands (bool) whether an integer format's codes have a
    sign, or 0 for none."""
    elements, fields, codes = integers(request, 0, 3)
    signed, form = is_set(integers(request, 3, 1)[0]), integers(request, 4, 4)
    room = np.empty(5 * ROW, np.uint8)  # see quantize.encode_flat
    at = room.ctypes.data
    coded, split = int32s(at, ROW), uint8s(at + 4 * ROW, ROW)
    for first in range(number * CHUNK, min(elements, (number + 1) * CHUNK), ROW):
        count = min(ROW, elements - first)
        row = split[:count]
        if form[1]:
            rows.split(uint8s(fields + first // 2, (count + 1) // 2), row)
        else:
            row = uint8s(fields + first, count)
        if form[2] == INT8 and not form[3]:
            rows.extend_signs(row, uint8s(codes + first, count), signed, form[0])
        else:
            rows.from_fields(row, coded[:count], signed, form[3], form[0])
            store(coded[:count], codes, form[2], first)
    room[0] = 0  # see encode_flat


@tasks
def rectify(request, number):
    """x <- min(max(x, 0), most) in place, and a bit of the mask for each element between. most: its bit pattern, or one
    above infinity's. measures, extremes, sums: see statistics.measuring."""
    elements, x, half, mask, most, measures, extremes, sums = integers(request, 0, 8)
    size, found = 2 if half else 4, (extremes + 8 * number, sums + 16 * number)
    room = np.empty(TAIL_BYTES + MEASURE_BYTES, np.uint8)  # see quantize.encode_flat
    at, stop = room.ctypes.data, min(elements, (number + 1) * CHUNK)
    for first in range(number * CHUNK, stop, ROW):
        count = min(ROW, stop - first)
        rectify_row(x + size * first, half, count, mask + first // 8, most, at)
        if measures:
            measure_row(x, half, first, count, measures == 2, *found, at + TAIL_BYTES)
    room[0] = 0  # see encode_flat


@tasks
def apply_mask(request, number):
    """out is grad where the mask has a bit, else 0."""
    elements, grad, half, mask, out = integers(request, 0, 5)
    size, first = 2 if half else 4, number * CHUNK
    room = np.empty(TAIL_BYTES, np.uint8)  # see quantize.encode_flat
    at = size * first
    apply_row(grad + at, half, min(CHUNK, elements - first), mask + first // 8, out + at, room.ctypes.data)
    room[0] = 0  # see encode_flat


@row_loop()
def _patch_line(out, a, image, row, height, width, channels, out_width, kernel, stride, padding, dilation):
    """im2col of one output row: see `patches`."""
    segment = kernel[1] * channels
    to = out
    for column in range(out_width):
        w = column * stride[1] - padding[1]
        for r in range(kernel[0]):
            h = row * stride[0] - padding[0] + r * dilation[0]
            line = a + (image * height + h) * width * channels
            if h < 0 or h >= height:
                copy(to, 0, segment)
            elif dilation[1] == 1 and w >= 0 and w + kernel[1] <= width:
                copy(to, line + w * channels, segment)
            else:
                for s in range(kernel[1]):
                    column_in = w + s * dilation[1]
                    inside = column_in >= 0 and column_in < width
                    copy(to + s * channels, line + column_in * channels if inside else 0, channels)
            to += segment


@tasks
def patches(request, number):
    """im2col: the output rows first, first + 1, ... of all images together, as int8 (rows * W', R * S * C) at `out`.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); out_size: (H', W'). A task is an output row.
    """
    out, a, first = integers(request, 0, 3)
    size, out_size, kernel = integers(request, 3, 4), integers(request, 7, 2), integers(request, 9, 2)
    stride, padding, dilation = integers(request, 11, 2), integers(request, 13, 2), integers(request, 15, 2)
    _, height, width, channels = size
    line = out_size[1] * kernel[0] * kernel[1] * channels
    image, row = (first + number) // out_size[0], (first + number) % out_size[0]
    target = out + number * line
    _patch_line(target, a, image, row, height, width, channels, out_size[1], kernel, stride, padding, dilation)


@tasks
def fold(request, number):
    """col2im: each of `size` (N, H, W, C) int32 at `sums` is the sum of the `products` that `patches` took from it.

    products: the address of int32 (N * H' * W', R * S * C); out_size: (H', W'). A task is a row of an image.
    """
    sums, products = integers(request, 0, 2)
    out_size, size, kernel = integers(request, 2, 2), integers(request, 4, 4), integers(request, 8, 2)
    stride, padding, dilation = integers(request, 10, 2), integers(request, 12, 2), integers(request, 14, 2)
    _, height, width, channels = size
    depth = kernel[0] * kernel[1] * channels
    image, row = number // height, number % height
    target = sums + 4 * number * width * channels
    copy(target, 0, 4 * width * channels)
    for r in range(kernel[0]):
        steps = row + padding[0] - r * dilation[0]
        line = steps // stride[0]
        if steps % stride[0] != 0 or line < 0 or line >= out_size[0]:
            continue
        source = products + 4 * ((image * out_size[0] + line) * out_size[1] * depth + r * kernel[1] * channels)
        for column in range(out_size[1]):
            for s in range(kernel[1]):
                w = column * stride[1] - padding[1] + s * dilation[1]
                if w >= 0 and w < width:
                    accumulate(target + 4 * w * channels, source + 4 * (column * depth + s * channels), channels)


@tasks
def rescale(request, number):
    """out, float32 or (half) bf16, is int32 `sums` times the float32 at the addresses `scales`, of which the second may
    be 0."""
    elements, sums, out, half = integers(request, 0, 4)
    factor = product_of(integers(request, 4, 2))
    exact = np.empty(ROW, np.float32)
    for first in range(number * CHUNK, min(elements, (number + 1) * CHUNK), ROW):
        count = min(ROW, elements - first)
        source = int32s(sums + 4 * first, count)
        if half:
            rows.rescale(source, factor, exact[:count])
            rows.round_to_bf16(exact[:count].view(np.int32), halves(out + 2 * first, count))
        else:
            rows.rescale(source, factor, floats(out + 4 * first, count))


@row_loop()
def _shift(target, source, count, shift):
    """So many uint8: int8 codes plus 0 or 128, and that alone for source 0."""
    out = uint8s(target, count)
    if source == 0:
        for j in range(count):
            out[j] = np.uint8(shift)
    else:
        codes = uint8s(source, count)
        for j in range(count):
            out[j] = codes[j] ^ np.uint8(shift)


@row_loop()
def pad_line(target, a, shift, size, image, row, above, beside, out_width):
    """Line `row` of an image as `pad` says it. above, beside: the padding."""
    _, height, width, channels = size
    left = min(max(beside, 0), out_width)
    cut = max(-beside, 0)
    inside = max(min(width - cut, out_width - left), 0)
    h = row - above
    if h < 0 or h >= height:
        _shift(target, 0, out_width * channels, shift)
    else:
        _shift(target, 0, left * channels, shift)
        source = a + ((image * height + h) * width + cut) * channels
        _shift(target + left * channels, source, inside * channels, shift)
        _shift(target + (left + inside) * channels, 0, (out_width - left - inside) * channels, shift)


@tasks
def pad(request, number):
    """The uint8 (N, H', W', C) at `out` <- the int8 at `a` of size (N, H, W, C) plus shift, 0 or 128, and shift around
    it. padding: above and beside, where it starts in `out`, below 0 what is cut off; out_size: (H', W')."""
    out, a, shift = integers(request, 0, 3)
    size, padding, out_size = integers(request, 3, 4), integers(request, 7, 2), integers(request, 9, 2)
    channels = size[3]
    target = out + number * out_size[1] * channels
    image, row = number // out_size[0], number % out_size[0]
    pad_line(target, a, shift, size, image, row, padding[0], padding[1], out_size[1])


@row_loop()
def _rescale_shifted(values, shifts, factor, out):
    for j in range(values.size):
        out[j] = (values[j] - shifts[j]) * factor


@tasks
def rescale_shifted(request, number):
    """out, float32 or (half) bf16, is float32 (pixels, channels) `values` less the float32 `shifts` of their channels,
    times the float32 at `scale`."""
    elements, values, shifts, channels, out, half, scale = integers(request, 0, 7)
    factor, by_channel = floats(scale, 1)[0], floats(shifts, channels)
    pixels, step = elements // channels, max(CHUNK // channels, 1)
    exact = np.empty(channels, np.float32)
    for first in range(number * step * channels, min(pixels, (number + 1) * step) * channels, channels):
        source = floats(values + 4 * first, channels)
        if half:
            _rescale_shifted(source, by_channel, factor, exact)
            rows.round_to_bf16(exact.view(np.int32), halves(out + 2 * first, channels))
        else:
            _rescale_shifted(source, by_channel, factor, floats(out + 4 * first, channels))
