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
    narrow_transform_gradient,
    narrow_transform_image,
    outputs_of,
    rest_of_gradient,
    rest_of_image,
    store_outputs,
    transform_gradient,
    transform_image,
    transform_kernel,
)

NOTE = 16  # bytes of what is known of a number that does not fit


@tasks
def transform_weight(request, number):
    """The right operand of `convolve_points` <- that of tile_loops.convolve for 3x3 taps: for each panel of columns 16
    points where that has 9 taps. channels: of the input, a multiple of 4; columns: all panels'.

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
def square_of(x, size, tile, tiled, side, padding, patch):
    """(address, bytes between lines) of the square of `side` pixels of a tile, which are copied to `patch`, with zeros
    for those outside the image, where there are some. tiled: (lines, columns) of tiles of an image."""
    _, height, width, channels = size
    image, at = tile // (tiled[0] * tiled[1]), tile % (tiled[0] * tiled[1])
    top, left = 2 * (at // tiled[1]) - padding[0], 2 * (at % tiled[1]) - padding[1]
    if top >= 0 and left >= 0 and top + side <= height and left + side <= width:
        return x + ((image * height + top) * width + left) * channels, width * channels
    for pixel in range(side * side):
        line, column = top + pixel // side, left + pixel % side
        source = x + ((image * height + line) * width + column) * channels
        if line < 0 or line >= height or column < 0 or column >= width:
            source = 0
        copy(patch + pixel * channels, source, channels)
    return patch, side * channels


@row_loop()
def _note(rest, tile, channel, notes, most, count):
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


@row_loop()
def points_of(side, square, channels, to, far, tile, rest, notes, most, count):
    """Write the points of a tile's square, of images (side 4) or gradients (2), with 128 added: uint8 (16, channels) at
    `to`, far bytes apart. What that leaves out of a number is noted (see `_note`), at most so many notes in all;
    returns how many there are now, -1 for more. rest: memory to work in."""
    channel = 0
    while channel < channels:
        wide = 2 * LANES if channel + 2 * LANES <= channels else LANES
        of, here = square[0] + channel, to + channel
        if side == 4:
            if wide > LANES:
                beyond = transform_image(of, square[1], channels, here, far)
            else:
                beyond = narrow_transform_image(of, square[1], channels, here, far)
        elif wide > LANES:
            beyond = transform_gradient(of, square[1], channels, here, far)
        else:
            beyond = narrow_transform_gradient(of, square[1], channels, here, far)
        if beyond:
            for lane in range(0, wide, LANES):
                if side == 4:
                    rest_of_image(of + lane, square[1], channels, rest)
                else:
                    rest_of_gradient(of + lane, square[1], channels, rest)
                if count >= 0:
                    count = _note(rest, tile, channel + lane, notes, most, count)
        channel += wide
    return count


@row_loop()
def _set_places(places, tile, tiled, target, element):
    """How many bytes from the first output the four of a tile are, -1 where there is none."""
    height, width, columns = target
    image, at = tile // (tiled[0] * tiled[1]), tile % (tiled[0] * tiled[1])
    for pixel in range(4):
        line, column = 2 * (at // tiled[1]) + pixel // 2, 2 * (at % tiled[1]) + pixel % 2
        place = ((image * height + line) * width + column) * columns * element
        places[pixel] = place if line < height and column < width else -1


@tasks
def convolve_points(request, number):
    """out (N, H', W', K), float32 or (half) bf16 <- the integers times the float at `scale`.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); weight, shifts: from `transform_weight`. padding: above
    and beside, at most 2; target: (H', W', K). group: images a task; most: tiles that are transformed at a time.
    """
    a, weight, shifts, out, half, scale, group, most = integers(request, 0, 8)
    size, padding, target = integers(request, 8, 4), integers(request, 12, 2), integers(request, 14, 3)
    images, channels = size[0], size[3]
    columns = target[2]
    factor, element = floats(scale, 1)[0], 2 if half else 4
    begin = number * group
    count = min(group, images - begin)
    tiled = (target[0] + 1) // 2, (target[1] + 1) // 2
    of_image = tiled[0] * tiled[1]
    tiles = count * of_image
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
        here, noted = min(most, tiles - first), 0
        for tile in range(here):
            int32s(offsets + 4 * tile, 1)[0] = tile * channels
            _set_places(int64s(places + 32 * tile, 4), begin * of_image + first + tile, tiled, target, element)
            to = points + tile * channels
            square = square_of(a, size, begin * of_image + first + tile, tiled, 4, padding, patch)
            noted = points_of(4, square, channels, to, far, tile, rest, notes, POINTS * far, noted)
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
                while note < noted:
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
