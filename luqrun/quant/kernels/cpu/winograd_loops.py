"""The compiled loops (numba) of 3x3 convolutions on int8 codes by Winograd's tiles (`winograd_tiles`)."""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.memory import copy, floats, int16s, int32s, int64s, uint8s
from luqrun.quant.kernels.cpu.rows import row_loop
from luqrun.quant.kernels.cpu.sizes import APART, COLUMNS, LANES, MOST_ROWS
from luqrun.quant.kernels.cpu.tile_loops import NARROW_ROWS, WIDE_ROWS, multiply, panel_width
from luqrun.quant.kernels.cpu.winograd_tiles import (
    POINTS,
    add_products,
    narrow_transform_image,
    outputs_of,
    rest_of_image,
    store_outputs,
    transform_image,
    transform_kernel,
)

NOTE = 16  # bytes of what is known of a number that does not fit


@tasks
def transform_weight(request, number):
    """The right operand of `convolve` <- that of tile_loops.convolve for 3x3 taps: for each panel of columns 16 points
    where that has 9 taps. channels: quads of a tap, in bytes; columns: all panels'.

    At `shifts`, int32 (4, columns of the panel) for each panel: what 128 added to every point of an image adds to four
    times the outputs. wrong: uint8 (panels,), set where a number is not of int8. A task is a panel.
    """
    weight, out, shifts, wrong, channels, columns = integers(request, 0, 6)
    first = number * COLUMNS
    width = panel_width(min(COLUMNS, columns - first))
    far, memory = channels * width, np.empty(4 * POINTS * LANES, np.uint8)
    source, to, sums = weight + first * 9 * channels, out + first * POINTS * channels, memory.ctypes.data
    for lane in range(0, width, LANES):
        by, quads = 4 * lane, channels // 4
        if transform_kernel(source + by, far, 4 * width, quads, to + by, far, sums):
            uint8s(wrong + number, 1)[0] = 1
        outputs_of(sums, 4 * LANES, shifts + 16 * first + by, 4 * width)
    memory[0] = 0  # what only its address was taken of must be in use until here


@row_loop()
def patch_of(a, size, image, line, column, side, to):
    """The square of pixels from (line, column) on, with zeros outside the image."""
    _, height, width, channels = size
    for row in range(side):
        for beside in range(side):
            y, x = line + row, column + beside
            source = a + ((image * height + y) * width + x) * channels
            if y < 0 or y >= height or x < 0 or x >= width:
                source = 0
            copy(to + (side * row + beside) * channels, source, channels)


@row_loop()
def note_rest(rest, tile, channel, notes, most, count):
    """How many notes there are with the numbers of `rest` (int16 (16, 16), of a tile's channels) that are not 0, as
    int32 (point, tile, channel, number) each; -1 for more than most."""
    for point in range(POINTS):
        here = rest + 2 * LANES * point
        words = int64s(here, LANES // 4)
        if words[0] | words[1] | words[2] | words[3] == 0:
            continue
        numbers = int16s(here, LANES)
        for lane in range(LANES):
            if numbers[lane] != 0:
                if count == most:
                    return -1
                note = int32s(notes + NOTE * count, 4)
                note[0], note[1], note[2], note[3] = point, tile, channel + lane, numbers[lane]
                count += 1
    return count


@tasks
def convolve(request, number):
    """out (N, H', W', K), float32 or (half) bf16 <- the integers times the float at `scale`.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); weight, shifts: from `transform_weight`. padding: above
    and beside, at most 2; target: (H', W', K). group: images a task; most: tiles that are transformed at a time.
    """
    a, weight, shifts, out, half, scale, group, most = integers(request, 0, 8)
    size, padding, target = integers(request, 8, 4), integers(request, 12, 2), integers(request, 14, 3)
    images, height, width, channels = size
    out_height, out_width, columns = target
    factor, element = floats(scale, 1)[0], 2 if half else 4
    begin = number * group
    count = min(group, images - begin)
    down, across = (out_height + 1) // 2, (out_width + 1) // 2
    tiles = count * down * across
    most = min(most, tiles)
    far = most * channels + APART
    # One piece of memory, see tile_loops.convolve; what the notes do not need of theirs is never touched.
    sizes = 32 * most, 4 * (most + MOST_ROWS), POINTS * 4 * MOST_ROWS * COLUMNS, 4 * COLUMNS, POINTS * channels
    memory = np.empty(sum(sizes) + POINTS * far + 2 * POINTS * LANES + NOTE * POINTS * far, np.uint8)
    places = memory.ctypes.data
    offsets = places + sizes[0]
    sums = offsets + sizes[1]
    nowhere = sums + sizes[2]
    patch = nowhere + sizes[3]
    points = patch + sizes[4]
    rest = points + POINTS * far
    notes = rest + 2 * POINTS * LANES
    for first in range(0, tiles, most):
        here, count_of_notes = min(most, tiles - first), 0
        for tile in range(here):
            index = first + tile
            image, at = begin + index // (down * across), index % (down * across)
            line, column = 2 * (at // across), 2 * (at % across)
            int32s(offsets + 4 * tile, 1)[0] = tile * channels
            place = int64s(places + 32 * tile, 4)
            for pixel in range(4):
                y, x = line + pixel // 2, column + pixel % 2
                inside = y < out_height and x < out_width
                to = ((image * out_height + y) * out_width + x) * columns * element
                place[pixel] = to if inside else -1
            y, x = line - padding[0], column - padding[1]
            if y >= 0 and x >= 0 and y + 4 <= height and x + 4 <= width:
                source, pitch = a + ((image * height + y) * width + x) * channels, width * channels
            else:
                patch_of(a, size, image, y, x, 4, patch)
                source, pitch = patch, 4 * channels
            channel = 0
            while channel < channels:
                to = points + tile * channels + channel
                if channel + 2 * LANES <= channels:
                    wide = 2 * LANES
                    over = transform_image(source + channel, pitch, channels, to, far)
                else:
                    wide = LANES
                    over = narrow_transform_image(source + channel, pitch, channels, to, far)
                if over:
                    for lane in range(channel, channel + wide, LANES):
                        rest_of_image(source + lane, pitch, channels, rest)
                        count_of_notes = note_rest(rest, tile, lane, notes, POINTS * far, count_of_notes)
                channel += wide
        for row in range(MOST_ROWS):
            int32s(offsets + 4 * (here + row), 1)[0] = (here - 1) * channels  # the last one once more
        for panel in range(0, columns, COLUMNS):
            wide = panel_width(min(COLUMNS, columns - panel))
            right, pitch = weight + panel * POINTS * channels, 4 * wide
            step = WIDE_ROWS if wide > LANES else NARROW_ROWS
            note = 0
            for tile in range(0, here, step):
                for point in range(POINTS):
                    left, to = points + point * far, sums + point * step * pitch
                    once = 1, 0
                    by = right + point * channels * wide
                    multiply(wide, left, offsets + 4 * tile, once, once, channels // 4, 4, by, to)
                while note < count_of_notes:
                    one = int32s(notes + NOTE * note, 4)
                    if one[1] >= tile + step:
                        break
                    to = sums + (one[0] * step + one[1] - tile) * pitch
                    by = right + (one[0] * channels + one[2] // 4 * 4) * wide
                    for lane in range(0, pitch, 4 * LANES):
                        add_products(to + lane, by + lane, one[2] % 4, one[3])
                    note += 1
                for row in range(min(step, here - tile)):
                    for lane in range(0, wide, LANES):
                        from_, by = sums + row * pitch + 4 * lane, shifts + 16 * panel + 4 * lane
                        to, where = out + (panel + lane) * element, places + 32 * (tile + row)
                        store_outputs(from_, step * pitch, by, pitch, factor, half, where, nowhere, to)
    memory[0] = 0  # what only its address was taken of must be in use until here
