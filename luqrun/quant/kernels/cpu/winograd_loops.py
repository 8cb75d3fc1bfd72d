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
    rest_of_gradient,
    rest_of_image,
    store_outputs,
    transform_gradient,
    transform_image,
)

NOTE = 16  # bytes of what is known of a number that does not fit


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


@row_loop()
def _add_rest(noted, notes, note, tile, step, sums, right, channels, wide):
    """Add what is noted of `step` tiles, from number `note` on, to their products with a panel; returns the number of
    the next tiles' first note."""
    while note < noted:
        point, of, channel, over = int32s(notes + NOTE * note, 4)
        if of >= tile + step:
            break
        to, by = sums + (point * step + of - tile) * 4 * wide, right + (point * channels + channel // 4 * 4) * wide
        for lane in range(0, 4 * wide, 4 * LANES):
            add_products(to + lane, by + lane, channel % 4, over)
        note += 1
    return note


@tasks
def convolve_points(request, number):
    """out (N, H', W', K), float32 or (half) bf16 <- the integers times the float at `scale`.

    a: the address of int8 (N, H, W, C) with size (N, H, W, C); weight, shifts: from weight_loops.transform_weight;
    padding: above and beside; target: (H', W', K). group: images a task; most: tiles that are transformed at a time.
    refused: uint8 (tasks,), set where more than one in `scarce` of an image's numbers do not fit; then nothing more is
    done.
    """
    a, weight, shifts, out, half, scale, group, most = integers(request, 0, 8)
    refused, scarce = integers(request, 8, 2)
    size, padding, target = integers(request, 10, 4), integers(request, 14, 2), integers(request, 16, 3)
    images, channels, columns = size[0], size[3], target[2]
    factor, element = floats(scale, 1)[0], 2 if half else 4
    begin = number * group
    count = min(group, images - begin)
    tiled = (target[0] + 1) // 2, (target[1] + 1) // 2
    of_image = tiled[0] * tiled[1]
    tiles = count * of_image
    most = min(most, tiles)
    far, most_notes = most * channels + APART, POINTS * most * channels // scarce
    # One piece of memory, see tile_loops.convolve.
    sizes = 32 * most, 4 * (most + MOST_ROWS), POINTS * 4 * MOST_ROWS * COLUMNS, 4 * COLUMNS, POINTS * channels
    memory = np.empty(sum(sizes) + POINTS * far + 2 * POINTS * LANES + NOTE * most_notes, np.uint8)
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
            of = begin * of_image + first + tile
            int32s(offsets + 4 * tile, 1)[0] = tile * channels
            _set_places(int64s(places + 32 * tile, 4), of, tiled, target, element)
            square, to = square_of(a, size, of, tiled, 4, padding, patch), points + tile * channels
            noted = points_of(4, square, channels, to, far, tile, rest, notes, most_notes, noted)
        if noted < 0:
            uint8s(refused + number, 1)[0] = 1
            break
        for row in range(MOST_ROWS):
            int32s(offsets + 4 * (here + row), 1)[0] = (here - 1) * channels  # the last one once more
        for panel in range(0, columns, COLUMNS):
            wide = panel_width(min(COLUMNS, columns - panel))
            right, pitch, note = weight + panel * POINTS * channels, 4 * wide, 0
            step = WIDE_ROWS if wide > LANES else NARROW_ROWS
            for tile in range(0, here, step):
                for point in range(POINTS):
                    left, by, to = points + point * far, right + point * channels * wide, sums + point * step * pitch
                    once = 1, 0
                    multiply(wide, left, offsets + 4 * tile, once, once, channels // 4, 4, by, to)
                note = _add_rest(noted, notes, note, tile, step, sums, right, channels, wide)
                for row in range(min(step, here - tile)):
                    for lane in range(0, wide, LANES):
                        which, by = sums + row * pitch + 4 * lane, shifts + 16 * panel + 4 * lane
                        to, where = out + (panel + lane) * element, places + 32 * (tile + row)
                        store_outputs(which, step * pitch, by, pitch, factor, half, where, nowhere, to)
    memory[0] = 0  # what only its address was taken of must be in use until here
