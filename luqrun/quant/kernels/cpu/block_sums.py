"""Compiled loops (numba) over sums of a panel's blocks (see `block_rows`), and what they decide.

kernels.blocks adds up a block one element after the other, in float64. Vectors add in another order, which is faster
and changes the last bits of a sum: where its result could depend on them, the block is added up again in turn.
"""

from __future__ import annotations

import numpy as np

from luqrun.quant.kernels.blocks import RMS_CLIP
from luqrun.quant.kernels.cpu.block_scales import FLOAT32_MAX
from luqrun.quant.kernels.cpu.rows import f32, f64, row_loop, u64

MSE, MAE = 1, 2  # what four over six compares
# Two orders of n terms that are not negative differ by less than 2 n 2^-53 of their sum, and one in float32 by n 2^-24
# from the exact sum, unless terms are so small that they lose bits: twice that, to be safe.
DOUBT, COARSE_DOUBT, SMALL = 2.0**-51, f32(2.0**-22), f32(2.0**-90)


@row_loop()
def _product(x, y, factor):
    return f64(x) * f64(f32(y * factor))


@row_loop()
def _difference(x, decoded, tensor_scale):
    return f32(f32(decoded * tensor_scale) - x)


@row_loop()
def _error(difference, kind):
    """Of what a decoded value differs from x by."""
    return difference * difference if kind == MSE else abs(difference)


@row_loop(fastmath={"reassoc"})
def _add_products(x, y, factor, at, count):
    total = 0.0
    for c in range(count):
        total += _product(x[at + c], y[at + c], factor)
    return total


@row_loop(fastmath={"reassoc"})
def _add_errors(x, first, second, tensor_scale, kind, at, count):
    one, other = f32(0), f32(0)
    for c in range(count):
        one += _error(_difference(x[at + c], first[at + c], tensor_scale), kind)
        other += _error(_difference(x[at + c], second[at + c], tensor_scale), kind)
    return one, other


@row_loop()
def products(x, y, factor, sums, high, count, wide):
    """sums[j]: of block j's products of x and factor * y, in any order."""
    sums[:count] = 0.0
    for r in range(u64(high)):
        for j in range(u64(count)):
            at = (r * u64(count) + j) * u64(wide)
            if wide == 1:
                sums[j] += _product(x[at], y[at], factor)
            elif wide == 16:  # a number of turns that is known makes vectors of them
                sums[j] += _add_products(x, y, factor, at, u64(16))
            elif wide == 32:
                sums[j] += _add_products(x, y, factor, at, u64(32))
            else:
                sums[j] += _add_products(x, y, factor, at, u64(wide))


@row_loop()
def _errors(x, first, second, tensor_scale, kind, sums, others, high, count, wide):
    for r in range(u64(high)):
        for j in range(u64(count)):
            at = (r * u64(count) + j) * u64(wide)
            if wide == 1:
                one, other = _add_errors(x, first, second, tensor_scale, kind, at, u64(1))
            elif wide == 16:
                one, other = _add_errors(x, first, second, tensor_scale, kind, at, u64(16))
            else:
                one, other = _add_errors(x, first, second, tensor_scale, kind, at, u64(wide))
            sums[j] += one
            others[j] += other


@row_loop()
def errors(x, first, second, tensor_scale, kind, sums, others, high, count, wide):
    """sums[j], others[j]: of what two ways to decode block j differ from x by, in float32 and in any order."""
    sums[:count], others[:count] = f32(0), f32(0)
    if kind == MSE:
        _errors(x, first, second, tensor_scale, MSE, sums, others, high, count, wide)
    else:
        _errors(x, first, second, tensor_scale, MAE, sums, others, high, count, wide)


@row_loop()
def _products_in_turn(x, y, factor, j, high, count, wide):
    total = 0.0
    for r in range(high):
        for at in range((r * count + j) * wide, (r * count + j + 1) * wide):
            total += _product(x[at], y[at], factor)
    return total


@row_loop()
def _errors_in_turn(x, decoded, tensor_scale, kind, j, high, count, wide):
    total = 0.0
    for r in range(high):
        for at in range((r * count + j) * wide, (r * count + j + 1) * wide):
            total += _error(f64(_difference(x[at], decoded[at], tensor_scale)), kind)
    return total


@row_loop()
def _rms_clip(squares, size):
    return f32(RMS_CLIP * np.sqrt(squares / size))


@row_loop()
def rms_clips(panel, clips, sums, high, count, wide):
    """The ends of ranges that are so many root mean squares, in place of max|x|; but of blocks that are not finite."""
    products(panel, panel, f32(1), sums, high, count, wide)
    size, doubt = high * wide, False
    margin = size * DOUBT
    for j in range(count):
        low, top = _rms_clip(sums[j] * (1 - margin), size), _rms_clip(sums[j] * (1 + margin), size)
        known = clips[j] <= FLOAT32_MAX
        doubt |= known and low != top
        clips[j] = low if known else clips[j]
    if doubt:
        for j in range(count):
            if clips[j] <= FLOAT32_MAX:
                clips[j] = _rms_clip(_products_in_turn(panel, panel, f32(1), j, high, count, wide), size)


@row_loop()
def gains(panel, values, tensor_scale, out, sums, high, count, wide):
    """EDEN's <x, x> / <x, Q(x)> of each block; 1 where that is not positive."""
    squares, across = sums
    products(panel, panel, f32(1), squares, high, count, wide)
    products(panel, values, tensor_scale, across, high, count, wide)
    margin, doubt = 2 * high * wide * DOUBT, False
    for j in range(count):
        whole = across[j] > 0
        ratio = squares[j] / (across[j] if whole else 1.0)
        low, top = f32(ratio * (1 - margin)), f32(ratio * (1 + margin))
        doubt |= whole and low != top
        out[j] = low if whole else f32(1)
    if doubt:
        for j in range(count):
            if across[j] > 0:
                exact = _products_in_turn(panel, panel, f32(1), j, high, count, wide)
                out[j] = f32(exact / _products_in_turn(panel, values, tensor_scale, j, high, count, wide))


@row_loop()
def _is_sure(one, other, margin):
    """Whether the exact sums would compare as these do."""
    return (max(one, other) > SMALL) & (abs(one - other) > margin * (one + other))


@row_loop()
def finer_is_better(panel, clips, values, finer_values, tensor_scale, kind, better, sums, high, count, wide):
    """Four over six: better[j] is 1 where the error of block j's finer values is less, else 0."""
    these, others = sums
    errors(panel, values, finer_values, tensor_scale, kind, these, others, high, count, wide)
    margin, doubt = f32(high * wide) * COARSE_DOUBT, False
    for j in range(count):
        doubt |= (clips[j] > f32(0)) & (not _is_sure(these[j], others[j], margin))
        better[j] = f32(1) if others[j] < these[j] else f32(0)
    if doubt:
        for j in range(count):
            if clips[j] > f32(0) and not _is_sure(these[j], others[j], margin):
                finer = _errors_in_turn(panel, finer_values, tensor_scale, kind, j, high, count, wide)
                less = finer < _errors_in_turn(panel, values, tensor_scale, kind, j, high, count, wide)
                better[j] = f32(1) if less else f32(0)
