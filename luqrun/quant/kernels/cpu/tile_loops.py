"""The compiled loops (numba) of convolutions on int8 codes by blocks of `dot_tiles`, without patches."""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.dot_tiles import (
    dot_tile,
    interleave,
    narrow_dot_tile,
    narrow_scaled_dot_tile,
    scaled_dot_tile,
    store_scaled,
)
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.loops import pad_line
from luqrun.quant.kernels.cpu.memory import accumulate, floats, int32s, int64s, is_set, product_of, uint8s
from luqrun.quant.kernels.cpu.rows import f32, row_loop
from luqrun.quant.kernels.cpu.sizes import COLUMNS, LANES, MOST_ROWS, ROWS

WIDE_ROWS, NARROW_ROWS = ROWS[2], ROWS[1]
QUADS = 4 * LANES  # bytes of a quad of 16 channels


@row_loop()
def multiply(columns, left, offsets, runs, taps, length, step, right, out):
    """The block for so many columns and the rows at the offsets from an address on; returns how many it has."""
    if columns > LANES:
        dot_tile(left, offsets, runs, taps, length, step, right, out)
        return WIDE_ROWS
    narrow_dot_tile(left, offsets, runs, taps, length, step, right, out)
    return NARROW_ROWS


@row_loop()
def _scaled_tile(columns, left, offsets, runs, taps, length, right, shifts, factor, places, out):
    """As multiply, of whole vectors of columns, to the places of the rows from `out` on."""
    if columns > LANES:
        scaled_dot_tile(left, offsets, runs, taps, length, 4, right, shifts, factor, places, out)
        return WIDE_ROWS
    narrow_scaled_dot_tile(left, offsets, runs, taps, length, 4, right, shifts, factor, places, out)
    return NARROW_ROWS


@row_loop()
def _store_tile(count, lanes, wide, sums, shifts, factor, out, half, places, first):
    """Rows of sums, scaled, to their places (an array of int64) from `out`; wide: how many of their columns there
    are."""
    element = 2 if half else 4
    for row in range(count):
        to = out + places[first + row]
        for lane in range(0, wide, LANES):
            here = sums + 4 * (row * lanes + lane)
            store_scaled(here, shifts + 4 * lane, factor, to + element * lane, half, wide - lane)


@row_loop()
def panel_width(columns):
    return COLUMNS if columns > LANES else LANES


@row_loop()
def up(channels):
    """The next multiple of LANES."""
    return (channels + LANES - 1) // LANES * LANES


@tasks
def convolve(request, number):
    """out (N, H', W', K), float32 or (half) bf16, at the pixels of `target` <- the integers times the floats at the
    addresses `scales`, of which the second may be 0.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); shift: 128, or 0 where none is negative; signed: where
    that stands (bool), or 0 where shift says it; weight: from `pack_weight`. padding, padded: see `pad`: what is read
    has padded (lines, columns). source: (line, column) there of the first tap of the first pixel, and how far apart
    pixels are; taps: (runs, lines between runs, taps a run). target: (H', W', K), the first (line, column), how far
    apart, how many. group: images a task. parts: into how many of the same size the channels are split, of which each
    of the output sees that of the input alone.
    """
    a, weight, out, half, shift, signed, group, parts = integers(request, 0, 8)
    size, padding, padded = integers(request, 8, 4), integers(request, 12, 2), integers(request, 14, 2)
    source, taps, target = integers(request, 16, 4), integers(request, 20, 3), integers(request, 23, 9)
    factor = product_of(integers(request, 32, 2))
    if signed != 0 and not is_set(signed):
        shift = 0
    images, channels = size[0], size[3]
    out_height, out_width, out_channels, first_line, first_column, down, across, lines, columns = target
    pitch, of_part = padded[1] * channels, out_channels // parts
    runs, in_run, length = (taps[0], taps[1] * pitch), (taps[2], channels), channels // parts
    if parts == 1:  # the taps of a run are neighbours
        in_run, length = (1, 0), taps[2] * channels
    length = (length + 3) // 4
    depth = runs[0] * in_run[0] * length
    image_bytes, begin = padded[0] * pitch, number * group
    count = min(group, images - begin)
    pixels, element = count * lines * columns, 2 if half else 4
    # One piece of memory: numba counts the users of each array that it makes, at each use.
    sizes = 8 * pixels, 4 * (pixels + MOST_ROWS), 4 * MOST_ROWS * COLUMNS, 4 * MOST_ROWS
    memory = np.empty(sizes[0] + sizes[1] + 2 * sizes[2] + sizes[3] + 4 + count * image_bytes + 4, np.uint8)
    start_of = memory.ctypes.data
    places, offsets = int64s(start_of, pixels), int32s(start_of + sizes[0], pixels + MOST_ROWS)
    starts = start_of + sizes[0]
    sums = starts + sizes[1]
    shifts, nowhere = sums + sizes[2], sums + 2 * sizes[2]
    same = nowhere + sizes[3]
    left = same + 4
    rows.clear(uint8s(nowhere, sizes[3]))
    rows.fill(uint8s(same, 4), shift)
    at = 0
    for image in range(count):
        for line in range(lines):
            start = image * image_bytes + (source[0] + line * source[2]) * pitch + source[1] * channels
            place = ((begin + image) * out_height + first_line + line * down) * out_width + first_column
            for column in range(columns):
                offsets[at] = start + column * source[3] * channels
                places[at] = (place + column * across) * out_channels * element
                at += 1
    for row in range(MOST_ROWS):
        offsets[pixels + row] = offsets[pixels - 1]  # the last one once more
    for line in range(count * padded[0]):
        image, row = begin + line // padded[0], line % padded[0]
        pad_line(left + line * pitch, a, shift, size, image, row, padding[0], padding[1], padded[1])
    for part in range(parts):
        start, weights = left + part * (channels // parts), weight + part * up(of_part) * depth * 4
        for first in range(0, of_part, COLUMNS):
            wide = min(COLUMNS, of_part - first)
            lanes = panel_width(wide)
            right, to = weights + first * depth * 4, out + (part * of_part + first) * element
            multiply(wide, same, nowhere, (runs[0], 0), (in_run[0], 0), length, 0, right, shifts)
            whole, at = not half and wide == lanes, 0
            most = NARROW_ROWS if lanes == LANES else WIDE_ROWS
            while at < pixels:
                offsets_here = starts + 4 * at
                if whole and at + most <= pixels:
                    where = start_of + 8 * at, to
                    at += _scaled_tile(wide, start, offsets_here, runs, in_run, length, right, shifts, factor, *where)
                    continue
                done = multiply(wide, start, offsets_here, runs, in_run, length, 4, right, sums)
                _store_tile(min(done, pixels - at), lanes, wide, sums, shifts, factor, to, half, places, at)
                at += done
    memory[0] = 0  # what only its address was taken of must be in use until here


@row_loop()
def _pixel(a, nowhere, size, image, line, column):
    """The address of a pixel's channels, or nowhere's outside the image."""
    _, height, width, channels = size
    if line < 0 or line >= height or column < 0 or column >= width:
        return nowhere
    return a + ((image * height + line) * width + column) * channels


@row_loop()
def _make_quads(out, far, step, places, a, nowhere, size, which, flip, begin, channels):
    """Quads of pixels, `step` bytes each, of `channels` of their channels from `begin` on; far: from 16 channels to the
    next, in bytes. which: image, first (column, line), how many pixels: at (line, column), (line, column + across), ...
    and after `wide` of them `down` lines below. places: of four int64, to work in."""
    image, first, line, pixels, wide, down, across = which
    row, column = line, 0
    for quad in range((pixels + 3) // 4):
        for i in range(4):
            places[i] = nowhere
            if 4 * quad + i < pixels:
                places[i] = _pixel(a + begin, nowhere, size, image, row, first + column * across)
                column += 1
                if column == wide:
                    column, row = 0, row + down
        for part in range((channels + LANES - 1) // LANES):
            to, by = out + part * far + quad * step, part * LANES
            one, two, three, four = places[0] + by, places[1] + by, places[2] + by, places[3] + by
            interleave(to, one, two, three, four, min(LANES, channels - by), flip)


@tasks
def convolve_for_weight(request, number):
    """int32 (tasks, parts, R * S * C + 1, K, rounded up to LANES) at `sums` <- (+= if more) for each tap and input
    channel the products with each output channel, over the pixels of each task's images; in the last row what `shift`
    adds to each. C, K: the channels of a part, see `convolve`.

    a, g: the addresses of int8 images in channels_last memory, with the sizes (N, H, W, channels); shift: 128, what is
    added to a.
    by_lines: whether a line of a is made into quads once for all lines of the kernel, which needs a stride of 1 between
    lines; else images are, for each tap. limit: bytes of quads at a time, where an image has no more.
    """
    a, g, sums, shift, by_lines, tasks, limit, more, parts = integers(request, 0, 9)
    size, g_size, kernel = integers(request, 9, 4), integers(request, 13, 4), integers(request, 17, 2)
    stride, padding, dilation = integers(request, 19, 2), integers(request, 21, 2), integers(request, 23, 2)
    images, channels = size[0], size[3] // parts
    _, out_height, out_width, out_channels = g_size[0], g_size[1], g_size[2], g_size[3] // parts
    padded_channels = up(out_channels)
    rows_of_sums = kernel[0] * kernel[1] * channels + 1
    if by_lines:
        copies, lines, g_lines = kernel[1], out_height + (kernel[0] - 1) * dilation[0], out_height
        pixels = out_width
    else:
        copies, lines, g_lines, pixels = kernel[0] * kernel[1], 1, 1, out_height * out_width
    quads = (pixels + 3) // 4
    # Of an image: 16 of its channels, made into quads; one of g's.
    image_bytes, g_bytes = lines * quads * QUADS, g_lines * quads * 4
    vectors = (channels + LANES - 1) // LANES
    group = max(1, limit // (copies * vectors * image_bytes + g_bytes * COLUMNS))
    begin, end = images * number // tasks, images * (number + 1) // tasks
    # See convolve.
    most, sums_bytes = max(channels, COLUMNS) + LANES, 4 * MOST_ROWS * COLUMNS
    small = 4 * 8 + 4 * (rows_of_sums + MOST_ROWS) + sums_bytes + 4 * MOST_ROWS + 4 + most
    memory = np.empty(small + copies * vectors * group * image_bytes + group * g_bytes * COLUMNS, np.uint8)
    place = memory.ctypes.data
    places, starts = int64s(place, 4), place + 4 * 8
    offsets = int32s(starts, rows_of_sums + MOST_ROWS)
    found = starts + 4 * (rows_of_sums + MOST_ROWS)
    nowhere = found + sums_bytes
    same = nowhere + 4 * MOST_ROWS
    zero = same + 4
    to = zero + most
    g_to = to + copies * vectors * group * image_bytes
    rows.clear(uint8s(nowhere, 4 * MOST_ROWS))
    rows.fill(uint8s(same, 4), shift)
    rows.clear(uint8s(zero, most))
    rows.clear(uint8s(starts, 4 * (rows_of_sums + MOST_ROWS)))
    part_sums = rows_of_sums * padded_channels
    if not more:
        rows.clear(int32s(sums + 4 * number * parts * part_sums, parts * part_sums))
    for part in range(parts):
        target, begin_of_g = sums + 4 * (number * parts + part) * part_sums, part * out_channels
        for first in range(begin, end, group):
            count = min(group, end - first)
            vector_bytes, at = count * image_bytes, 0
            for r in range(kernel[0]):
                for s in range(kernel[1]):
                    start = s * vectors * vector_bytes + r * dilation[0] * quads * QUADS
                    if not by_lines:
                        start = (r * kernel[1] + s) * vectors * vector_bytes
                    for channel in range(channels):
                        offsets[at] = start + channel // LANES * vector_bytes + channel % LANES * 4
                        at += 1
            for copied in range(copies):
                r, s = (0, copied) if by_lines else (copied // kernel[1], copied % kernel[1])
                column = s * dilation[1] - padding[1]
                for image in range(count):
                    for line in range(lines):
                        row = line + r * dilation[0] - padding[0]
                        place = to + copied * vectors * vector_bytes + image * image_bytes + line * quads * QUADS
                        which = first + image, column, row, pixels, out_width, stride[0], stride[1]
                        _make_quads(
                            place, vector_bytes, QUADS, places, a, zero, size, which, shift, part * channels, channels
                        )
            for panel in range((out_channels + COLUMNS - 1) // COLUMNS):
                wide = min(COLUMNS, out_channels - panel * COLUMNS)
                lanes = panel_width(wide)
                if wide < lanes:
                    rows.clear(uint8s(g_to, count * g_bytes * lanes))
                for image in range(count):
                    for line in range(g_lines):
                        place = g_to + (image * g_lines + line) * quads * lanes * 4
                        which, by = (first + image, 0, line, pixels, out_width, 1, 1), begin_of_g + panel * COLUMNS
                        _make_quads(place, QUADS, lanes * 4, places, g, zero, g_size, which, 0, by, wide)
                length = g_lines * quads
                multiply(wide, same, nowhere, (count, 0), (1, 0), length, 0, g_to, found)
                last = target + 4 * ((rows_of_sums - 1) * padded_channels + panel * COLUMNS)
                accumulate(last, found, lanes)
                at = 0
                while at < rows_of_sums - 1:
                    done = multiply(wide, to, starts + 4 * at, (count, image_bytes), (1, 0), length, QUADS, g_to, found)
                    for row in range(min(done, rows_of_sums - 1 - at)):
                        place = target + 4 * ((at + row) * padded_channels + panel * COLUMNS)
                        accumulate(place, found + 4 * row * lanes, lanes)
                    at += done
    memory[0] = 0  # what only its address was taken of must be in use until here


@tasks
def add_tasks(request, number):
    """float32 (K, R * S * C) at `out` <- the exact sums over the tasks of `convolve_for_weight`, rounded once, times
    the floats at the addresses `scales`, which may be 0. parts: see there; groups, inputs, outputs: of a part, and of
    one of its groups; taps: R * S. A task is LANES of a part's output channels."""
    sums, tasks, parts, groups, inputs, outputs, taps, out = integers(request, 0, 8)
    factor = product_of(integers(request, 8, 2))
    channels, rows_of_sums = groups * outputs, taps * groups * inputs + 1
    lanes = (channels + LANES - 1) // LANES
    part, first = number // lanes, number % lanes * LANES
    total, wide = np.empty(LANES, np.int64), min(LANES, channels - first)
    last = np.zeros(LANES, np.int64)
    for row in range(rows_of_sums - 1, -1, -1):
        for lane in range(LANES):
            total[lane] = -last[lane]
        for task in range(tasks):
            place = ((task * parts + part) * rows_of_sums + row) * lanes * LANES + first
            found = int32s(sums + 4 * place, LANES)
            for lane in range(LANES):
                total[lane] += found[lane]
        if row == rows_of_sums - 1:
            for lane in range(LANES):
                last[lane] = total[lane]
            continue
        tap, group, channel = row // (groups * inputs), row // inputs % groups, row % inputs
        low, high = max(0, group * outputs - first), min(wide, (group + 1) * outputs - first)
        for lane in range(low, high):
            to = ((part * channels + first + lane) * taps + tap) * inputs + channel
            floats(out + 4 * to, 1)[0] = f32(total[lane]) * factor
