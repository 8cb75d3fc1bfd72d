"""The compiled loops (numba) that lay weights out as the loops over blocks read them, and transform them for Winograd's
tiles."""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.dot_tiles import interleave
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.memory import copy_quad, int8s, uint8s
from luqrun.quant.kernels.cpu.rows import row_loop
from luqrun.quant.kernels.cpu.sizes import COLUMNS, LANES
from luqrun.quant.kernels.cpu.tile_loops import panel_width, up
from luqrun.quant.kernels.cpu.winograd_tiles import POINTS, outputs_of, transform_kernel


@row_loop()
def _pack_columns(target, source, bytes_, columns, width, stride):
    """A run of a panel, of columns whose bytes are neighbours; stride: from column to column."""
    whole = bytes_ // 4
    for column in range(columns):
        begin = source + column * stride
        for quad in range(whole):
            copy_quad(target + (quad * width + column) * 4, begin + 4 * quad)
        for byte in range(4 * whole, bytes_):
            to = target + (whole * width + column) * 4 + byte % 4
            int8s(to, 1)[0] = int8s(begin + byte, 1)[0]


@row_loop()
def _pack_rows(target, source, taps, strides, columns, width):
    """A run of a panel, of columns that are neighbours. taps, strides: how many taps and channels, multiples of four,
    and the bytes from one to the next."""
    (across, inputs), (tap, channel) = taps, strides
    for quad in range(across * inputs // 4):
        one = source + quad * 4 // inputs * tap + quad * 4 % inputs * channel
        two, three, four = one + channel, one + 2 * channel, one + 3 * channel
        to = target + quad * width * 4
        for lane in range(0, columns, LANES):
            count = min(LANES, columns - lane)
            interleave(to + 4 * lane, one + lane, two + lane, three + lane, four + lane, count, 0)


@tasks
def pack_weight(request, number):
    """The right operand of tile_loops.convolve: for each part, panels of COLUMNS output channels, the last perhaps of
    LANES, quad by quad.

    weight: the address of int8; depth: quads in all runs; parts: see there; groups, outputs: of a part, and of one of
    its groups; taps: (runs, taps a run, channels a tap) of a group; strides: from one to the next of each of these, of
    the output channels and of the groups, in bytes. Where input and output are of different groups, there are zeros. A
    task is a panel.
    """
    weight, out, depth, groups, outputs = integers(request, 0, 5)
    taps, strides = integers(request, 5, 3), integers(request, 8, 5)
    runs, across, inputs = taps
    quads, channels = depth // runs, groups * outputs  # a part's taps are of whole quads, or there is only one part
    panels = (channels + COLUMNS - 1) // COLUMNS
    part, first = number // panels, number % panels * COLUMNS
    columns = min(COLUMNS, channels - first)
    width = panel_width(columns)
    target = out + (part * up(channels) + first) * depth * 4
    rows.clear(uint8s(target, depth * width * 4))
    source = weight + part * groups * strides[4] + first * strides[3]
    for run in range(runs):
        here, begin = target + run * quads * width * 4, source + run * strides[0]
        if groups == 1 and strides[2] == 1 and (across == 1 or strides[1] == inputs):
            _pack_columns(here, begin, across * inputs, columns, width, strides[3])
            continue
        if groups == 1 and strides[3] == 1 and inputs % 4 == 0:
            _pack_rows(here, begin, (across, inputs), (strides[1], strides[2]), columns, width)
            continue
        for group in range(groups):
            # The columns of this group in the panel.
            low, high = max(0, group * outputs - first), min(columns, (group + 1) * outputs - first)
            start = begin + group * (strides[4] - outputs * strides[3])
            for tap in range(across):
                for channel in range(inputs):
                    byte = (tap * groups + group) * inputs + channel
                    of = start + tap * strides[1] + channel * strides[2]
                    to = int8s(here + byte // 4 * width * 4 + byte % 4, width * 4)
                    for column in range(low, high):
                        to[4 * column] = int8s(of + column * strides[3], 1)[0]


@tasks
def transform_weight(request, number):
    """The right operand of winograd_loops.convolve_points <- that of tile_loops.convolve for 3x3 taps: for each panel
    of columns 16 points where that has 9 taps. channels: of the input, a multiple of 4; columns: all panels'.

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
