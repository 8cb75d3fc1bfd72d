"""The compiled loops (numba, LLVM's vectors) of batch norm's forward pass in training: `norm` is the torch side.

x is float32 (rows, channels): pixels of images in channels_last memory. As in norm_loops, each number is computed as
torch's own loop computes it, so that the results have the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.columns import PANEL, Columns, row_at
from luqrun.quant.kernels.cpu.driver import call4, integers, unthreaded
from luqrun.quant.kernels.cpu.encode import fma
from luqrun.quant.kernels.cpu.memory import floats, int64s
from luqrun.quant.kernels.cpu.rows import f32, f64, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK


def _sum_of(lanes: int, vectors: int):
    """An intrinsic that adds x of rows, or (squares) its squared distances from a mean, to the sums at an address.
    pitch: bytes from row to row."""

    def adder(squares):
        @intrinsic
        def add(typingctx, rows, pitch, x, mean, sums):
            def codegen(context, builder, signature, args):
                rows, pitch, x, mean, sums = args
                columns = Columns(builder, lanes, vectors)
                means = columns.load(mean)
                held = [cgutils.alloca_once_value(builder, each) for each in columns.load(sums)]
                with cgutils.for_range(builder, rows) as loop:
                    values = columns.load(row_at(builder, loop.index, pitch, x))
                    for vector in columns.vectors:
                        value, total = values[vector], builder.load(held[vector])
                        if squares:
                            away = builder.fsub(value, means[vector])
                            total = columns.fma(away, away, total)
                        else:
                            total = builder.fadd(total, value)
                        builder.store(total, held[vector])
                columns.store([builder.load(each) for each in held], sums)
                return context.get_dummy_value()

            return nb.void(*[nb.int64] * 5), codegen

        return add

    return adder(False), adder(True)


def _line_of(lanes: int, vectors: int):
    """An intrinsic that writes x * slope + shift of rows, rounded once."""

    @intrinsic
    def write(typingctx, rows, pitch, x, slope, shift, out):
        def codegen(context, builder, signature, args):
            rows, pitch, x, slope, shift, out = args
            columns = Columns(builder, lanes, vectors)
            slopes, shifts = columns.load(slope), columns.load(shift)
            with cgutils.for_range(builder, rows) as loop:
                values = columns.load(row_at(builder, loop.index, pitch, x))
                found = [columns.fma(values[vector], slopes[vector], shifts[vector]) for vector in columns.vectors]
                columns.store(found, row_at(builder, loop.index, pitch, out))
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 6), codegen

    return write


(_add64, _square64), (_add16, _square16), (_add8, _square8) = _sum_of(16, 4), _sum_of(16, 1), _sum_of(8, 1)
_line64, _line16, _line8 = _line_of(16, 4), _line_of(16, 1), _line_of(8, 1)


@row_loop()
def _add_rows(rows, channels, squares, x, mean, sums):
    column, pitch = 0, 4 * channels
    while column < channels:
        at, left = 4 * column, channels - column
        if left >= 64:
            if squares:
                _square64(rows, pitch, x + at, mean + at, sums + at)
            else:
                _add64(rows, pitch, x + at, mean + at, sums + at)
            column += 64
        elif left >= 16:
            if squares:
                _square16(rows, pitch, x + at, mean + at, sums + at)
            else:
                _add16(rows, pitch, x + at, mean + at, sums + at)
            column += 16
        else:
            if squares:
                _square8(rows, pitch, x + at, mean + at, sums + at)
            else:
                _add8(rows, pitch, x + at, mean + at, sums + at)
            column += 8


@row_loop()
def _write_rows(rows, channels, x, slope, shift, out):
    column, pitch = 0, 4 * channels
    while column < channels:
        at, left = 4 * column, channels - column
        if left >= 64:
            _line64(rows, pitch, x + at, slope + at, shift + at, out + at)
            column += 64
        elif left >= 16:
            _line16(rows, pitch, x + at, slope + at, shift + at, out + at)
            column += 16
        else:
            _line8(rows, pitch, x + at, slope + at, shift + at, out + at)
            column += 8


@unthreaded
def channel_sums(request, part):
    """The sums of x, or of its squared distances from the mean, of one of `parts` parts of the rows: float32 (parts,
    channels) at `sums`. x, mean: addresses."""
    rows, channels, parts, squares, x, mean, sums = integers(request, 0, 7)
    size = (rows + parts - 1) // parts
    first, stop = part * size, min(rows, (part + 1) * size)
    mine = sums + 4 * channels * part
    found = floats(mine, channels)
    for j in range(channels):
        found[j] = f32(0)
    step = max(1, PANEL // channels)
    for row in range(first, stop, step):
        _add_rows(min(step, stop - row), channels, squares, x + 4 * row * channels, mean, mine)


@unthreaded
def normalize(request, number):
    """out <- x * slope + shift, of the channels' own; float32 (rows, channels). x, slope, shift, out: addresses."""
    rows, channels, x, slope, shift, out = integers(request, 0, 6)
    step, panel = max(1, CHUNK // channels), max(1, PANEL // channels)
    stop = min(rows, (number + 1) * step)
    for row in range(number * step, stop, panel):
        at = 4 * row * channels
        _write_rows(min(panel, stop - row), channels, x + at, slope, shift, out + at)


@row_loop()
def _column_sum(sums, channels, parts, channel):
    """What the parts found of a channel, float64."""
    total = 0.0
    for part in range(parts):
        total += f64(sums[channels * part + channel])
    return total


@unthreaded
def batch_norm(rows, channels, parts, x, weight, bias, running, mean, inverse, out, momentum, eps, functions):
    """Batch norm in training: out, and a channel's mean and 1 / sqrt(variance + eps). All but the sizes, momentum and
    eps are addresses of float32. weight, bias, running (mean and variance, which are updated): 0 where there are none.
    functions: addresses of `run`, channel_sums and normalize.
    """
    elements, count, eta = rows * channels, f64(rows), f32(momentum)
    room = np.empty((parts + 2) * channels, np.float32)
    sums = room.ctypes.data
    slope, shift = sums + 4 * parts * channels, sums + 4 * (parts + 1) * channels
    told = np.empty(7, np.int64)
    request = int64s(told.ctypes.data, 7)
    request[0], request[1], request[2], request[3] = rows, channels, parts, 0
    request[4], request[5], request[6] = x, mean, sums
    means, inverses = floats(mean, channels), floats(inverse, channels)
    found, slopes, shifts = floats(sums, parts * channels), floats(slope, channels), floats(shift, channels)
    for j in range(channels):
        means[j] = f32(0)
    call4(functions[0], elements, parts, functions[1], told.ctypes.data)
    for j in range(channels):
        means[j] = f32(_column_sum(found, channels, parts, j) / count)
    request[3] = 1
    call4(functions[0], elements, parts, functions[1], told.ctypes.data)
    for j in range(channels):
        squares = f32(_column_sum(found, channels, parts, j))
        variance = f64(squares / f32(rows))
        inverses[j] = f32(1.0 / np.sqrt(variance + eps)) if variance != 0 or eps != 0 else f32(0)
        if running[0] != 0:
            before = floats(running[0], channels)
            before[j] = f32(f32(eta * means[j]) + f32(f32(f32(1) - eta) * before[j]))
        if running[1] != 0:
            before = floats(running[1], channels)
            rest = f64(f32(f32(f32(1) - eta) * before[j]))
            before[j] = f32(f64(eta) * f64(squares / f32(rows - 1)) + rest)
        slopes[j] = inverses[j] if weight == 0 else f32(inverses[j] * floats(weight, channels)[j])
        shifts[j] = fma(-means[j], slopes[j], f32(0) if bias == 0 else floats(bias, channels)[j])
    request[2], request[3], request[4], request[5] = x, slope, shift, out
    step = max(1, CHUNK // channels)
    call4(functions[0], elements, (rows + step - 1) // step, functions[2], told.ctypes.data)
    told[0], room[0] = 0, f32(0)  # what only its address was taken of must be in use until here
