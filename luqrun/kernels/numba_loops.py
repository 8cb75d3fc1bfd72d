"""The compiled loops (numba) over codes and bits: packing, the ReLU's mask, and the patches of a convolution."""

from __future__ import annotations

import numpy as np
from numba import prange

from luqrun.kernels import numba_rows as rows
from luqrun.kernels.numba_driver import (
    CHUNK,
    INT8,
    ROW,
    driver,
    fields_row,
    halves,
    int8s,
    int16s,
    int32s,
    int64s,
    store,
    uint8s,
)
from luqrun.kernels.numba_rows import i32, row_loop, u64


@driver
def pack(elements, codes, kind, fields, form):
    """int8 or int16 codes to their fields: see `quantize`."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        coded, split, scratch = np.empty(ROW, np.int32), np.empty(ROW, np.uint8), np.empty(ROW, np.float32)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            if kind == INT8:
                rows.copy(int8s(codes + first, count), coded[:count])
            else:
                rows.copy(int16s(codes + 2 * first, count), coded[:count])
            fields_row(coded[:count], fields, first, form, split, scratch)


@driver
def unpack(elements, fields, codes, signed, form):
    """Fields to codes: the inverse of `pack`; signed: whether an integer format's codes have a sign."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        split, coded = np.empty(ROW, np.uint8), np.empty(ROW, np.int32)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            row = split[:count]
            if form[1]:
                rows.split(uint8s(fields + first // 2, (count + 1) // 2), row)
            else:
                row = uint8s(fields + first, count)
            rows.from_fields(row, coded[:count], signed, form[3], form[0])
            store(coded[:count], codes, form[2], first)


@driver
def rectify(elements, x, half, mask):
    """x <- max(x, 0) in place, and a bit of the mask for each element that is not <= 0."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        keep = np.zeros(ROW, np.uint8)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            bits = uint8s(mask + first // 8, (count + 7) // 8)
            if half:
                rows.rectify(halves(x + 2 * first, count), keep, bits, i32(0x7F80), i32(0x7FFF))
            else:
                rows.rectify(int32s(x + 4 * first, count), keep, bits, i32(0x7F800000), i32(0x7FFFFFFF))


@driver
def apply_mask(elements, grad, half, mask, out):
    """out is grad where the mask has a bit, else 0."""
    for task in prange((elements + CHUNK - 1) // CHUNK):
        keep = np.empty(ROW, np.uint8)
        for first in range(task * CHUNK, min(elements, (task + 1) * CHUNK), ROW):
            count = min(ROW, elements - first)
            bits = uint8s(mask + first // 8, (count + 7) // 8)
            if half:
                rows.apply_mask(halves(grad + 2 * first, count), bits, keep, halves(out + 2 * first, count))
            else:
                rows.apply_mask(int32s(grad + 4 * first, count), bits, keep, int32s(out + 4 * first, count))


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
            target, source = int64s(out + task * line, line // 8), int64s(a, whole // 8)
            unit = channels // 8
            _patch_line(target, source, image, row, height, width, unit, out_size[1], kernel, stride, padding, dilation)
        else:
            target, source = int8s(out + task * line, line), int8s(a, whole)
            _patch_line(
                target, source, image, row, height, width, channels, out_size[1], kernel, stride, padding, dilation
            )
