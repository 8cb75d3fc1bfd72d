"""Hadamard rotations on the CPU: compiled loops (numba), with the sums of luqrun.quant.kernels.blocks.hadamard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luqrun.quant.kernels.cpu.blocks import words_of
from luqrun.quant.kernels.cpu.driver import floats, integers, tasks
from luqrun.quant.kernels.cpu.rows import f32, row_loop, u64
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.layout import dense

COLUMNS = 64  # that are rotated together where a group lies across rows


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
            _rotate_group(x, out, start + at, part, stages, signs, at % size, factor, one, other)
            at += part
        part, stages = part // 2, stages - 1


@row_loop()
def _rotate_strip(x, out, start, stride, count, length, size, signs, panel):
    """`count` neighbouring lines across memory."""
    at, part = 0, size
    while at < length:
        factor = f32(1 / math.sqrt(part))
        while length - at >= part:
            _rotate_rows(x, out, start + at * stride, stride, count, part, signs, at % size, factor, panel)
            at += part
        part //= 2


@tasks
def rotate_lines(request, number):
    """Lines number * each up of `length` elements, with groups of `size` (2^stages) rotated, from x to out (float32),
    which are addresses, as signs is."""
    x, out, outer, length, size, stages, signs, each = integers(request, 0, 8)
    source, target, sign = floats(x, outer * length), floats(out, outer * length), floats(signs, size)
    one, other = np.empty(size, np.float32), np.empty(size, np.float32)
    for line in range(number * each, min(outer, (number + 1) * each)):
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
