"""The compiled loops (numba, LLVM's vectors) of batch norm's forward pass in training: `norm` is the torch side.

x is (rows, channels), float32 or bf16: pixels of images in channels_last memory. As in norm_loops, each number is
computed as torch's own loop computes it, so that the results have the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.columns import PANEL, Columns, for_each_kind, row_at
from luqrun.quant.kernels.cpu.driver import integers, perform, unthreaded
from luqrun.quant.kernels.cpu.encode import fma
from luqrun.quant.kernels.cpu.memory import floats, int64s
from luqrun.quant.kernels.cpu.norm_loops import column_sum
from luqrun.quant.kernels.cpu.rows import f32, f64, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.cpu.vectors import ADDRESS


def _sum_of(lanes: int, vectors: int):
    """An intrinsic that adds x of rows, or (squares) its squared distances from a mean, to the sums at an address.
    half: whether x is bf16; pitch: bytes from row to row."""

    @intrinsic
    def add(typingctx, half, squares, rows, pitch, x, mean, sums):
        def codegen(context, builder, signature, args):
            half, squares, rows, pitch, x, mean, sums = args
            columns = Columns(builder, lanes, vectors)

            def emit(half, of_squares):
                means = columns.load(mean)
                held = [cgutils.alloca_once_value(builder, each) for each in columns.load(sums)]
                with cgutils.for_range(builder, rows) as loop:
                    values = columns.load_row(row_at(builder, loop.index, pitch, x), half)
                    for vector in columns.vectors:
                        value, total = values[vector], builder.load(held[vector])
                        if of_squares:
                            away = builder.fsub(value, means[vector])
                            total = columns.fma(away, away, total)
                        else:
                            total = builder.fadd(total, value)
                        builder.store(total, held[vector])
                columns.store([builder.load(each) for each in held], sums)

            with builder.if_else(builder.icmp_signed("!=", squares, ADDRESS(0))) as (yes, no):
                with yes:
                    for_each_kind(builder, half, lambda half: emit(half, True))
                with no:
                    for_each_kind(builder, half, lambda half: emit(half, False))
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 7), codegen

    return add


def _line_of(lanes: int, vectors: int):
    """An intrinsic that writes x * slope + shift of rows, rounded once; half, pitch: as in `_sum_of`."""

    @intrinsic
    def write(typingctx, half, rows, pitch, x, slope, shift, out):
        def codegen(context, builder, signature, args):
            half, rows, pitch, x, slope, shift, out = args
            columns = Columns(builder, lanes, vectors)

            def emit(half):
                slopes, shifts = columns.load(slope), columns.load(shift)
                with cgutils.for_range(builder, rows) as loop:
                    values = columns.load_row(row_at(builder, loop.index, pitch, x), half)
                    found = [columns.fma(*terms) for terms in zip(values, slopes, shifts, strict=True)]
                    columns.store_row(found, row_at(builder, loop.index, pitch, out), half)

            for_each_kind(builder, half, emit)
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 7), codegen

    return write


_add64, _add32, _add16, _add8 = _sum_of(16, 4), _sum_of(16, 2), _sum_of(16, 1), _sum_of(8, 1)
_line64, _line16, _line8 = _line_of(16, 4), _line_of(16, 1), _line_of(8, 1)


@row_loop()
def _add_rows(half, squares, rows, channels, x, mean, sums):
    column, size = 0, 2 if half else 4
    while column < channels:
        at, left = 4 * column, channels - column
        how = half, squares, rows, size * channels, x + size * column, mean + at, sums + at
        if left >= 64:
            _add64(*how)
            column += 64
        elif left >= 32:
            _add32(*how)
            column += 32
        elif left >= 16:
            _add16(*how)
            column += 16
        else:
            _add8(*how)
            column += 8


@row_loop()
def _write_rows(half, rows, channels, x, slope, shift, out):
    column, size = 0, 2 if half else 4
    while column < channels:
        at, here, left = 4 * column, size * column, channels - column
        how = half, rows, size * channels, x + here, slope + at, shift + at, out + here
        if left >= 64:
            _line64(*how)
            column += 64
        elif left >= 16:
            _line16(*how)
            column += 16
        else:
            _line8(*how)
            column += 8


@unthreaded
def channel_sums(request, part):
    """The sums of x, or of its squared distances from the mean, of one of `parts` parts of the rows: float32 (parts,
    channels) at `sums`. x, mean: addresses; half: whether x is bf16."""
    half, rows, channels, parts, squares, x, mean, sums = integers(request, 0, 8)
    size = (rows + parts - 1) // parts
    first, stop = part * size, min(rows, (part + 1) * size)
    mine = sums + 4 * channels * part
    found = floats(mine, channels)
    for j in range(channels):
        found[j] = f32(0)
    step, pitch = max(1, PANEL // channels), (2 if half else 4) * channels
    for row in range(first, stop, step):
        _add_rows(half, squares, min(step, stop - row), channels, x + row * pitch, mean, mine)


@unthreaded
def normalize(request, number):
    """out <- x * slope + shift, of the channels' own; (rows, channels) at addresses, as slope and shift are. half:
    whether x and out are bf16."""
    half, rows, channels, x, slope, shift, out = integers(request, 0, 7)
    step, panel = max(1, CHUNK // channels), max(1, PANEL // channels)
    stop, pitch = min(rows, (number + 1) * step), (2 if half else 4) * channels
    for row in range(number * step, stop, panel):
        at = row * pitch
        _write_rows(half, min(panel, stop - row), channels, x + at, slope, shift, out + at)


@unthreaded
def batch_norm(half, rows, channels, parts, x, weight, bias, running, mean, inverse, out, momentum, eps, functions):
    """Batch norm in training: out, and a channel's mean and 1 / sqrt(variance + eps). All but the sizes, momentum and
    eps are addresses; half: whether x and out are bf16, and not float32 as the rest. weight, bias, running (mean and
    variance, which are updated): 0 where there are none. functions: addresses of the team (driver.team),
    channel_sums and normalize.
    """
    elements, count, eta = rows * channels, f32(rows), f32(momentum)
    room = np.empty((parts + 2) * channels, np.float32)
    sums = room.ctypes.data
    slope, shift = sums + 4 * parts * channels, sums + 4 * (parts + 1) * channels
    told = np.empty(8, np.int64)
    request = int64s(told.ctypes.data, 8)
    request[0], request[1], request[2], request[3], request[4] = half, rows, channels, parts, 0
    request[5], request[6], request[7] = x, mean, sums
    means, inverses = floats(mean, channels), floats(inverse, channels)
    found, slopes, shifts = floats(sums, parts * channels), floats(slope, channels), floats(shift, channels)
    for j in range(channels):
        means[j] = f32(0)
    perform(functions[0], elements, parts, functions[1], told.ctypes.data)
    for j in range(channels):
        total = column_sum(half, found, channels, parts, j)
        means[j] = f32(total) / count if half else f32(total / f64(rows))
    request[4] = 1
    perform(functions[0], elements, parts, functions[1], told.ctypes.data)
    for j in range(channels):
        squares = f32(column_sum(half, found, channels, parts, j))
        variance = f64(squares / count)
        inverses[j] = f32(1.0 / np.sqrt(variance + eps)) if variance != 0 or eps != 0 else f32(0)
        if running[0] != 0:
            before = floats(running[0], channels)
            before[j] = f32(f32(eta * means[j]) + f32(f32(f32(1) - eta) * before[j]))
        if running[1] != 0:
            before, unbiased = floats(running[1], channels), squares / f32(rows - 1)
            rest = f32(f32(f32(1) - eta) * before[j])
            if half:
                before[j] = f32(f32(eta * unbiased) + rest)
            else:
                before[j] = f32(f64(eta) * f64(unbiased) + f64(rest))
        slopes[j] = inverses[j] if weight == 0 else f32(inverses[j] * floats(weight, channels)[j])
        shifts[j] = fma(-means[j], slopes[j], f32(0) if bias == 0 else floats(bias, channels)[j])
    request[3], request[4], request[5], request[6] = x, slope, shift, out
    step = max(1, CHUNK // channels)
    perform(functions[0], elements, (rows + step - 1) // step, functions[2], told.ctypes.data)
    told[0], room[0] = 0, f32(0)  # what only its address was taken of must be in use until here
