"""The compiled loops (numba) of the weight gradients of 3x3 convolutions on int8 codes by Winograd's tiles.

Both operands are transformed, tiles in quads; then each point is a matrix product over the tiles.
"""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.dot_tiles import interleave
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.memory import accumulate, copy, int32s, int64s, uint8s
from luqrun.quant.kernels.cpu.sizes import APART, COLUMNS, LANES, MOST_ROWS
from luqrun.quant.kernels.cpu.tile_loops import NARROW_ROWS, WIDE_ROWS, multiply, panel_width
from luqrun.quant.kernels.cpu.winograd_loops import NOTE, points_of, square_of
from luqrun.quant.kernels.cpu.winograd_tiles import POINTS, add_products, column_sums, store_weight

CHUNK = 256  # quads of tiles of which a block is summed up at a time, so that they stay in the cache


@tasks
def transform(request, number):
    """Of tiles begin, begin + 1, ... the transforms' (16, channels) at `out`: at each point, far bytes apart, panels of
    so many channels, quads of tiles one after the other, 4 bytes a channel, zeros for what is beyond `tiles`. side: 4
    for images, which become int8, and 2 for gradients, which become uint8, 128 added.

    x: the address of int8 (N, H, W, C) with size (N, H, W, C); padding: above and beside; tiled: (lines, columns) of
    tiles of an image. step: quads a task. What is not of int8 is noted (see `points_of`), at most so many notes a task.
    found: int64 (tasks,) <- how many notes there are, -1 for more.
    """
    x, out, far, begin, tiles, quads, panel, side, step = integers(request, 0, 9)
    notes, most, found = integers(request, 9, 3)
    size, padding, tiled = integers(request, 12, 4), integers(request, 16, 2), integers(request, 18, 2)
    channels = size[3]
    memory = np.empty((4 * POINTS + 2 * POINTS) * channels + 2 * POINTS * LANES, np.uint8)
    made = memory.ctypes.data
    patch = made + 4 * POINTS * channels
    zero = patch + POINTS * channels
    rest = zero + POINTS * channels
    rows.clear(uint8s(zero, POINTS * channels))
    notes += NOTE * most * number
    count, flip = 0, 128 if side == 4 else 0
    for quad in range(number * step, min(quads, (number + 1) * step)):
        for i in range(4):
            tile, to = 4 * quad + i, made + i * POINTS * channels
            square = zero, 4 * channels
            if tile < tiles:
                square = square_of(x, size, begin + tile, tiled, side, padding, patch)
            count = points_of(side, square, channels, to, channels, tile, rest, notes, most, count)
        for point in range(POINTS):
            tiles_of, next_tile = made + point * channels, POINTS * channels
            for first in range(0, channels, panel):
                width = min(panel, channels - first)
                to = out + point * far + 4 * (first * quads + quad * width)
                for lane in range(0, width, LANES):
                    one = tiles_of + first + lane
                    two, three, four = one + next_tile, one + 2 * next_tile, one + 3 * next_tile
                    interleave(to + 4 * lane, one, two, three, four, LANES, flip)
    int64s(found + 8 * number, 1)[0] = count
    memory[0] = 0  # what only its address was taken of must be in use until here


@tasks
def multiply_points(request, number):
    """float32 (K, 9, C) at `out`, or if not last float64 at `total` <- (add: and what lies at `total`) the weight
    gradient of the tiles that `transform` made `left` of, of gradients in one panel, and `right`, of images.

    left_far, right_far: see there; quads: of tiles. notes, most, found, tasks: of the gradients. splits: parts of the
    output channels. A task is a part of a panel of COLUMNS input channels.
    """
    left, left_far, right, right_far, quads, notes, most, found, tasks = integers(request, 0, 9)
    out, total, add, last, splits, channels, out_channels = integers(request, 9, 7)
    panel, split = number // splits * COLUMNS, number % splits
    begin, end = out_channels * split // splits, out_channels * (split + 1) // splits
    wide = panel_width(min(COLUMNS, channels - panel))
    pitch, height, step = 4 * wide, end - begin, WIDE_ROWS if wide > LANES else NARROW_ROWS
    far = height * pitch + APART
    sizes = 4 * (height + MOST_ROWS), 4 * MOST_ROWS * COLUMNS
    memory = np.empty(sum(sizes) + POINTS * far, np.uint8)
    offsets = memory.ctypes.data
    block = offsets + sizes[0]
    sums = block + sizes[1]
    starts = int32s(offsets, height + MOST_ROWS)
    for row in range(height + MOST_ROWS):
        starts[row] = 4 * (begin + min(row, height - 1))
    for point in range(POINTS):
        to, by = sums + point * far, right + point * right_far + 4 * panel * quads
        for lane in range(0, wide, LANES):
            column_sums(by + 4 * lane, pitch, quads, to + 4 * lane)
        for row in range(1, height):
            copy(to + row * pitch, to, pitch)
        for first in range(0, quads, CHUNK):
            length = min(CHUNK, quads - first)
            from_ = left + point * left_far + first * 4 * out_channels
            for row in range(0, height, step):
                once = 1, 0
                at = offsets + 4 * row
                multiply(wide, from_, at, once, once, length, 4 * out_channels, by + first * pitch, block)
                accumulate(to + row * pitch, block, min(step, height - row) * wide)
    for task in range(tasks):
        for number_ in range(int64s(found + 8 * task, 1)[0]):
            note = int32s(notes + NOTE * (most * task + number_), 4)
            if note[2] < begin or note[2] >= end:
                continue
            to = sums + note[0] * far + (note[2] - begin) * pitch
            by = right + note[0] * right_far + 4 * panel * quads + note[1] // 4 * pitch
            for lane in range(0, pitch, 4 * LANES):
                add_products(to + lane, by + lane, note[1] % 4, note[3])
    for row in range(height):
        for lane in range(0, wide, LANES):
            to = (begin + row) * 9 * channels + panel + lane
            store_weight(sums + row * pitch + 4 * lane, far, total + 8 * to, out + 4 * to, channels, add, last)
    memory[0] = 0  # what only its address was taken of must be in use until here
