"""The compiled loops (numba, LLVM's vectors) of batch norm's backward pass: `norm` is the torch side.

x and its gradient are (rows, channels), float32 or bf16: pixels of images in channels_last memory. The sums and
products are those of torch's own loop, in its order, so that the results have the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu import rows as rows_of
from luqrun.quant.kernels.cpu.columns import EIGHT, PANEL, Columns, for_each_kind, row_at
from luqrun.quant.kernels.cpu.driver import integers, perform, unthreaded
from luqrun.quant.kernels.cpu.memory import doubles, floats, int64s, uint8s
from luqrun.quant.kernels.cpu.rows import f32, f64, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.cpu.statistics import measure_ends, total_of_ends
from luqrun.quant.kernels.cpu.vectors import ADDRESS


def _sum_of(lanes: int, vectors: int):
    """An intrinsic that adds g and (x - mean) * g of rows, where the mask has a bit, to the sums and products at
    addresses. half: whether x and g are bf16; pitch, mask_pitch: bytes from row to row, of x and g and of the mask."""

    @intrinsic
    def add(typingctx, half, rows, pitch, mask_pitch, x, g, mask, mean, sums, products):
        def codegen(context, builder, signature, args):
            half, rows, pitch, mask_pitch, x, g, mask, mean, sums, products = args
            columns = Columns(builder, lanes, vectors)

            def emit(half):
                means, found = columns.load(mean), [columns.load(at) for at in (sums, products)]
                held = [[cgutils.alloca_once_value(builder, each) for each in loaded] for loaded in found]
                with cgutils.for_range(builder, rows) as loop:
                    grads = columns.load_row(row_at(builder, loop.index, pitch, g), half)
                    grads = columns.masked(grads, row_at(builder, loop.index, mask_pitch, mask))
                    values = columns.load_row(row_at(builder, loop.index, pitch, x), half)
                    for vector in columns.vectors:
                        total, product = held[0][vector], held[1][vector]
                        away = builder.fsub(values[vector], means[vector])
                        builder.store(builder.fadd(builder.load(total), grads[vector]), total)
                        builder.store(columns.fma(away, grads[vector], builder.load(product)), product)
                for each, at in zip(held, (sums, products), strict=True):
                    columns.store([builder.load(one) for one in each], at)

            for_each_kind(builder, half, emit)
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 10), codegen

    return add


def _gradient_of(lanes: int, vectors: int):
    """An intrinsic that writes (g - shift - (x - mean) * slope) * inverse * weight of rows. numbers: the address of
    five numbers a channel, `far` bytes apart: mean, slope, shift, inverse, weight; the rest: as in `_sum_of`."""

    @intrinsic
    def write(typingctx, half, rows, pitch, mask_pitch, x, g, mask, numbers, far, out):
        def codegen(context, builder, signature, args):
            half, rows, pitch, mask_pitch, x, g, mask, numbers, far, out = args
            columns = Columns(builder, lanes, vectors)

            def emit(half):
                places = [builder.add(numbers, builder.mul(far, ADDRESS(i))) for i in range(5)]
                mean, slope, shift, inverse, weight = map(columns.load, places)
                with cgutils.for_range(builder, rows) as loop:
                    grads = columns.load_row(row_at(builder, loop.index, pitch, g), half)
                    grads = columns.masked(grads, row_at(builder, loop.index, mask_pitch, mask))
                    values, found = columns.load_row(row_at(builder, loop.index, pitch, x), half), []
                    for vector in columns.vectors:
                        away, left = (
                            builder.fsub(mean[vector], values[vector]),
                            builder.fsub(grads[vector], shift[vector]),
                        )
                        if half:  # torch rounds the product of bf16 by itself
                            left = builder.fadd(left, builder.fmul(away, slope[vector]))
                        else:
                            left = columns.fma(away, slope[vector], left)
                        found.append(builder.fmul(builder.fmul(left, inverse[vector]), weight[vector]))
                    columns.store_row(found, row_at(builder, loop.index, pitch, out), half)

            for_each_kind(builder, half, emit)
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 10), codegen

    return write


_KINDS = (16, 4), (16, 2), (16, 1), (8, 1)  # lanes and vectors
_add64, _add32, _add16, _add8 = (_sum_of(*kind) for kind in _KINDS)
_write64, _write32, _write16, _write8 = (_gradient_of(*kind) for kind in _KINDS)


@row_loop()
def _add_rows(half, rows, channels, mask_pitch, x, g, mask, mean, sums, products):
    column, size = 0, 2 if half else 4
    while column < channels:
        at, here, left = 4 * column, size * column, channels - column
        how, places = (half, rows, size * channels, mask_pitch), (x + here, g + here, mask + column // EIGHT)
        if left >= 64:
            _add64(*how, *places, mean + at, sums + at, products + at)
            column += 64
        elif left >= 32:
            _add32(*how, *places, mean + at, sums + at, products + at)
            column += 32
        elif left >= 16:
            _add16(*how, *places, mean + at, sums + at, products + at)
            column += 16
        else:
            _add8(*how, *places, mean + at, sums + at, products + at)
            column += 8


@row_loop()
def _write_rows(half, rows, channels, mask_pitch, x, g, mask, numbers, out):
    column, size, far = 0, 2 if half else 4, 4 * channels
    while column < channels:
        at, here, left = 4 * column, size * column, channels - column
        how, places = (half, rows, size * channels, mask_pitch), (x + here, g + here, mask + column // EIGHT)
        if left >= 64:
            _write64(*how, *places, numbers + at, far, out + here)
            column += 64
        elif left >= 32:
            _write32(*how, *places, numbers + at, far, out + here)
            column += 32
        elif left >= 16:
            _write16(*how, *places, numbers + at, far, out + here)
            column += 16
        else:
            _write8(*how, *places, numbers + at, far, out + here)
            column += 8


@unthreaded
def norm_sums(request, part):
    """The sums of g and of (x - mean) * g of one of `parts` parts of the rows, float32 (parts, 2, channels) at `sums`.

    x, g, mean: addresses; half: whether x and g are bf16; mask: of a bit an element, and mask_pitch its bytes from row
    to row, or 0 for one row that all share.
    """
    half, rows, channels, parts, mask_pitch, x, g, mask, mean, sums = integers(request, 0, 10)
    size = (rows + parts - 1) // parts
    first, stop = part * size, min(rows, (part + 1) * size)
    mine, pitch = sums + 8 * channels * part, (2 if half else 4) * channels
    found = floats(mine, 2 * channels)
    for j in range(2 * channels):
        found[j] = f32(0)
    step = max(1, PANEL // channels)
    for row in range(first, stop, step):
        how = half, min(step, stop - row), channels, mask_pitch
        places = x + row * pitch, g + row * pitch, mask + row * mask_pitch
        _add_rows(*how, *places, mean, mine, mine + 4 * channels)


@row_loop()
def column_sum(half, sums, columns, parts, column):
    """What the parts found of a channel, as float64: added up in that, or for bf16 in float32, as torch does."""
    total = 0.0
    for part in range(parts):
        total += f64(sums[columns * part + column])
        total = f64(f32(total)) if half else total
    return total


@row_loop()
def _add_parts(half, rows, channels, parts, found, numbers):
    """What the sums of `norm_sums` make of each channel: float32 (5, channels), of which the first, fourth and fifth
    (mean, inverse, weight) are there. The second and third become slope and shift of `_gradient_of`, and after them
    come the gradients of weight and bias."""
    count = f32(rows)
    for j in range(channels):
        inverse = numbers[3 * channels + j]
        total = f32(column_sum(half, found, 2 * channels, parts, j))
        product = f32(column_sum(half, found, 2 * channels, parts, channels + j))
        numbers[channels + j] = f32(f32(product * inverse) * inverse) / count
        numbers[2 * channels + j] = total / count
        numbers[5 * channels + j], numbers[6 * channels + j] = f32(product * inverse), total


@unthreaded
def norm_gradient(request, number):
    """The gradient of x: (rows, channels) of its type at `out`. numbers: of `_add_parts`; extremes: where the tasks'
    ends go (statistics.total_of_ends), or 0; the rest: as in `norm_sums`."""
    half, rows, channels, mask_pitch, x, g, mask, numbers, out, extremes = integers(request, 0, 10)
    step, panel = max(1, CHUNK // channels), max(1, PANEL // channels)
    stop, pitch = min(rows, (number + 1) * step), (2 if half else 4) * channels
    for row in range(number * step, stop, panel):
        at, count = row * pitch, min(panel, stop - row)
        _write_rows(half, count, channels, mask_pitch, x + at, g + at, mask + row * mask_pitch, numbers, out + at)
        if extremes != 0:
            measure_ends(out, half, row * channels, count * channels, extremes + 8 * number)


@unthreaded
def batch_norm_backward(
    half, rows, channels, parts, x, g, mask, weight, mean, inverse, out, of_weight, of_bias, statistics, functions
):
    """Batch norm's backward pass: the gradients of x (out), weight and bias.

    All but the sizes are addresses; half: whether x, g and out are bf16; mask, weight: 0 where there is none.
    statistics: where those of out go, float64 (4,), or 0. functions: addresses of the
    team (driver.team), norm_sums and norm_gradient.
    """
    elements, step = rows * channels, max(1, CHUNK // channels)
    tasks, mask_pitch = (rows + step - 1) // step, channels // EIGHT if mask != 0 else 0
    # One piece of memory: see quantize.encode_flat.
    sizes = 8 * parts * channels, 28 * channels, channels, 8 * (tasks + 1), 16
    room = np.zeros(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] + 80 + 8, np.uint8)
    sums = room.ctypes.data
    values = sums + sizes[0]
    ones = values + sizes[1]
    told = (ones + sizes[2] + 7) // 8 * 8
    extremes = told + 80
    request, numbers = int64s(told, 10), floats(values, 7 * channels)
    if mask == 0:
        rows_of.fill(uint8s(ones, channels), 255)
        mask = ones
    means, inverses = floats(mean, channels), floats(inverse, channels)
    for j in range(channels):
        numbers[j], numbers[3 * channels + j] = means[j], inverses[j]
        numbers[4 * channels + j] = f32(1) if weight == 0 else floats(weight, channels)[j]
    request[0], request[1], request[2], request[3], request[4] = half, rows, channels, parts, mask_pitch
    request[5], request[6], request[7], request[8], request[9] = x, g, mask, mean, sums
    perform(functions[0], elements, parts, functions[1], told)
    _add_parts(half, rows, channels, parts, floats(sums, 2 * parts * channels), numbers)
    request[3], request[4], request[5], request[6] = mask_pitch, x, g, mask
    request[7], request[8], request[9] = values, out, extremes if statistics != 0 else 0
    perform(functions[0], elements, tasks, functions[2], told)
    rows_of.copy(numbers[5 * channels : 6 * channels], floats(of_weight, channels))
    rows_of.copy(numbers[6 * channels :], floats(of_bias, channels))
    if statistics != 0:
        total_of_ends(extremes, tasks, doubles(statistics, 4))
    room[0] = 0  # what only its address was taken of must be in use until here
