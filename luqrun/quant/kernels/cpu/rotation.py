"""Hadamard rotations on the CPU: compiled loops (numba), with the sums of luqrun.quant.kernels.blocks.hadamard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic
from torch import Tensor

from luqrun.quant.kernels.cpu.blocks import words_of
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.memory import floats
from luqrun.quant.kernels.cpu.rows import f32, row_loop, u64
from luqrun.quant.kernels.cpu.sizes import CHUNK, LANES
from luqrun.quant.kernels.cpu.vectors import ADDRESS, BITS, FLOAT, FLOATS, everywhere, load, permuted, store
from luqrun.quant.kernels.layout import dense

COLUMNS = 64  # that are rotated together where a group lies across rows


def _spans(size):
    return [1 << stage for stage in range(size.bit_length() - 1)]


def _across(builder, found):
    """The transform of as many elements as there are vectors, of each lane: in place."""
    for span in _spans(len(found)):
        for i in range(len(found)):
            if not i & span:
                first, second = found[i], found[i + span]
                found[i], found[i + span] = builder.fadd(first, second), builder.fsub(first, second)


def _rotate_line_of(size):
    """An intrinsic that rotates `size` neighbours in registers: the sums of `_rotate_group`."""
    vectors = size // LANES

    @intrinsic
    def rotate(typingctx, x, out, signs, factor):
        def codegen(context, builder, signature, args):
            x, out, signs, factor = args
            places = [4 * LANES * i for i in range(vectors)]
            found = [builder.fmul(load(builder, x, FLOATS, at), load(builder, signs, FLOATS, at)) for at in places]
            for span in _spans(LANES):
                swapped = [lane ^ span for lane in range(LANES)]
                is_second = ir.Constant(BITS, [int(lane & span > 0) for lane in range(LANES)])
                for i, each in enumerate(found):
                    other = permuted(builder, each, swapped)
                    found[i] = builder.select(is_second, builder.fsub(other, each), builder.fadd(each, other))
            _across(builder, found)
            factor = everywhere(builder, factor, FLOATS)
            for at, each in zip(places, found, strict=True):
                store(builder, builder.fmul(each, factor), out, at)
            return context.get_dummy_value()

        return nb.void(nb.int64, nb.int64, nb.int64, nb.float32), codegen

    return rotate


def _rotate_columns_of(size):
    """An intrinsic that rotates `size` rows, so many bytes apart, of 16 columns: the sums of `_rotate_rows`."""

    @intrinsic
    def rotate(typingctx, x, out, stride, signs, factor):
        def codegen(context, builder, signature, args):
            x, out, stride, signs, factor = args
            rows = [builder.mul(stride, ADDRESS(i)) for i in range(size)]
            found = []
            for i, row in enumerate(rows):
                sign = everywhere(builder, load(builder, signs, FLOAT, 4 * i), FLOATS)
                found.append(builder.fmul(load(builder, builder.add(x, row), FLOATS), sign))
            _across(builder, found)
            factor = everywhere(builder, factor, FLOATS)
            for row, each in zip(rows, found, strict=True):
                store(builder, builder.fmul(each, factor), builder.add(out, row))
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 4, nb.float32), codegen

    return rotate


_line16, _line32, _line64, _line128, _line256 = (_rotate_line_of(size) for size in (16, 32, 64, 128, 256))
_columns16, _columns32, _columns64, _columns128 = (_rotate_columns_of(size) for size in (16, 32, 64, 128))


@row_loop()
def _stage(x, y, half):
    """Sums of neighbours, then their differences: after log2(size) such stages the order is the first one again."""
    for j in range(u64(half)):
        first, second = x[u64(2) * j], x[u64(2) * j + u64(1)]
        y[j] = first + second
        y[u64(half) + j] = first - second


@row_loop()
def _rotate_group(x, out, start, size, stages, signs, shift, factor, one, other):
    """`size` elements, with the signs from number `shift` on."""
    for j in range(u64(size)):
        one[j] = x[u64(start) + j] * signs[u64(shift) + j]
    for stage in range(stages):
        if stage % 2 == 0:
            _stage(one, other, size // 2)
        else:
            _stage(other, one, size // 2)
    found = one if stages % 2 == 0 else other
    for j in range(u64(size)):
        out[u64(start) + j] = found[j] * factor


@row_loop()
def _rotate_rows(x, out, start, stride, count, size, signs, shift, factor, panel):
    """`size` rows, a stride apart, of `count` columns, with the signs from number `shift` on."""
    for i in range(u64(size)):
        at = u64(start) + i * u64(stride)
        for j in range(u64(count)):
            panel[i * u64(count) + j] = x[at + j] * signs[u64(shift) + i]
    span = u64(1)
    while span < u64(size):
        for pair in range(u64(size) // u64(2)):
            first = (pair // span * u64(2) * span + pair % span) * u64(count)
            second = first + span * u64(count)
            for j in range(u64(count)):
                one, other = panel[first + j], panel[second + j]
                panel[first + j] = one + other
                panel[second + j] = one - other
        span = span * u64(2)
    for i in range(u64(size)):
        at = u64(start) + i * u64(stride)
        for j in range(u64(count)):
            out[at + j] = panel[i * u64(count) + j] * factor


@row_loop()
def _rotate_line(x, out, start, length, size, stages, signs, one, other):
    """A line in memory: groups of `size`, then of half of it, down to one."""
    at, part = 0, size
    while at < length:
        factor = f32(1 / math.sqrt(part))
        while length - at >= part:
            source, target = x.ctypes.data + 4 * (start + at), out.ctypes.data + 4 * (start + at)
            sign = signs.ctypes.data + 4 * (at % size)
            if part == 16:
                _line16(source, target, sign, factor)
            elif part == 32:
                _line32(source, target, sign, factor)
            elif part == 64:
                _line64(source, target, sign, factor)
            elif part == 128:
                _line128(source, target, sign, factor)
            elif part == 256:
                _line256(source, target, sign, factor)
            else:
                _rotate_group(x, out, start + at, part, stages, signs, at % size, factor, one, other)
            at += part
        part, stages = part // 2, stages - 1


@row_loop()
def _rotate_vectors(source, target, stride, count, size, sign, factor):
    """`_rotate_rows` of the first columns, 16 at a time, of a size that registers hold; how many it rotated."""
    if size < 16 or size > 128:
        return 0
    for column in range(0, count // 16 * 16, 16):
        x, out = source + 4 * column, target + 4 * column
        if size == 16:
            _columns16(x, out, stride, sign, factor)
        elif size == 32:
            _columns32(x, out, stride, sign, factor)
        elif size == 64:
            _columns64(x, out, stride, sign, factor)
        else:
            _columns128(x, out, stride, sign, factor)
    return count // 16 * 16


@row_loop()
def _rotate_strip(x, out, start, stride, count, length, size, signs, panel):
    """`count` neighbouring lines across memory."""
    at, part = 0, size
    while at < length:
        factor = f32(1 / math.sqrt(part))
        while length - at >= part:
            first, shift = start + at * stride, at % size
            source, target = x.ctypes.data + 4 * first, out.ctypes.data + 4 * first
            done = _rotate_vectors(source, target, 4 * stride, count, part, signs.ctypes.data + 4 * shift, factor)
            if done < count:
                _rotate_rows(x, out, first + done, stride, count - done, part, signs, shift, factor, panel)
            at += part
        part //= 2


@tasks
def rotate_lines(request, number):
    """Lines number * each up of `length` elements, with groups of `size` (2^stages) rotated, from x to out (float32),
    which are addresses, as signs is."""
    x, out, outer, length, size, stages, signs, each = integers(request, 0, 8)
    source, target, sign = floats(x, outer * length), floats(out, outer * length), floats(signs, size)
    one, other = np.empty(size, np.float32), np.empty(size, np.float32)
    first, last = number * each, min(outer, (number + 1) * each)
    if length % size == 0:  # as one line
        _rotate_line(source, target, first * length, (last - first) * length, size, stages, sign, one, other)
    else:
        for line in range(first, last):
            _rotate_line(source, target, line * length, length, size, stages, sign, one, other)


@tasks
def rotate_strips(request, number):
    """The same along the middle of (outer, length, inner): a strip of COLUMNS neighbouring lines."""
    x, out, outer, length, inner, size, signs = integers(request, 0, 7)
    elements, strips = outer * length * inner, (inner + COLUMNS - 1) // COLUMNS
    source, target, sign = floats(x, elements), floats(out, elements), floats(signs, size)
    panel, line, first = np.empty(size * COLUMNS, np.float32), number // strips, number % strips * COLUMNS
    count, start = min(COLUMNS, inner - first), line * length * inner + first
    _rotate_strip(source, target, start, inner, count, length, size, sign, panel)


def signs(stream: Tensor, size: int) -> Tensor:
    """See kernels.blocks.signs."""
    return (words_of(size, (0, 0, 0), stream, 0)[:size] & 1).float() * 2 - 1


def hadamard(x: Tensor, grid: Sequence[int], axis: int, size: int, signs: Tensor | None) -> Tensor:
    """See kernels.blocks.hadamard."""
    x, sizes = dense(x.detach()).float(), tuple(map(int, grid))
    out = torch.empty_like(x)
    signs = torch.ones(size, device="cpu") if signs is None else signs.contiguous()
    if x.numel():
        outer, length, inner = math.prod(sizes[:axis]), sizes[axis], math.prod(sizes[axis + 1 :])
        count, sign, addresses = x.numel(), signs.data_ptr(), (x.data_ptr(), out.data_ptr())
        if inner == 1:
            each = max(1, CHUNK // max(1, length))
            stages = size.bit_length() - 1
            rotate_lines(-(-outer // each), count, *addresses, outer, length, size, stages, sign, each)
        else:
            rotate_strips(outer * -(-inner // COLUMNS), count, *addresses, outer, length, inner, size, sign)
    return out
