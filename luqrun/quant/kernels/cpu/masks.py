"""Compiled loops (numba, LLVM's vectors) over rows with a bit an element: the ReLU, and its backward pass."""

from __future__ import annotations

from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.memory import copy
from luqrun.quant.kernels.cpu.rows import row_loop
from luqrun.quant.kernels.cpu.sizes import LANES
from luqrun.quant.kernels.cpu.vectors import ADDRESS, BITS, HALF, INT, constant, everywhere, load, store

MASK_BYTES = LANES // 8  # of a vector
TAIL_BYTES = 4 * LANES + MASK_BYTES  # of scratch for what is left of a row


def _rectify_of(kind: ir.IntType, infinity: int):
    """An intrinsic that rectifies vectors of bit patterns in place and writes their masks. most: the pattern of the
    largest value, from which on the mask has no bit; or above infinity's."""
    vector, width = ir.VectorType(kind, LANES), kind.width // 8 * LANES

    @intrinsic
    def rectify(typingctx, x, mask, vectors, most):
        def codegen(context, builder, signature, args):
            x, mask, vectors, most = args
            most = everywhere(builder, builder.trunc(most, kind), vector)
            zeros, infinities = constant(0, vector), constant(infinity, vector)
            magnitudes = constant((1 << (kind.width - 1)) - 1, vector)
            with cgutils.for_range(builder, vectors) as loop:
                at = builder.add(x, builder.mul(loop.index, ADDRESS(width)))
                value = load(builder, at, vector)
                below = builder.icmp_signed("<", value, most)
                positive = builder.and_(builder.icmp_signed(">", value, zeros), below)
                magnitude = builder.and_(value, magnitudes)
                keep = builder.or_(positive, builder.icmp_signed(">", magnitude, infinities))  # NaN
                beyond = builder.and_(builder.not_(below), builder.icmp_signed("<=", value, infinities))
                other = builder.select(beyond, most, zeros)
                store(builder, builder.select(keep, value, other), at)
                to = builder.add(mask, builder.mul(loop.index, ADDRESS(MASK_BYTES)))
                store(builder, builder.bitcast(keep, ir.IntType(LANES)), to)
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 4), codegen

    return rectify


def _apply_of(kind: ir.IntType):
    """An intrinsic that writes vectors where the mask has a bit, and zeros elsewhere."""
    vector, width = ir.VectorType(kind, LANES), kind.width // 8 * LANES

    @intrinsic
    def apply(typingctx, x, mask, out, vectors):
        def codegen(context, builder, signature, args):
            x, mask, out, vectors = args
            with cgutils.for_range(builder, vectors) as loop:
                offset = builder.mul(loop.index, ADDRESS(width))
                bits = load(builder, builder.add(mask, builder.mul(loop.index, ADDRESS(MASK_BYTES))), ir.IntType(LANES))
                kept = builder.bitcast(bits, BITS)
                value = load(builder, builder.add(x, offset), vector)
                store(builder, builder.select(kept, value, ir.Constant(vector, None)), builder.add(out, offset))
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 4), codegen

    return apply


_rectify_floats, _rectify_halves = _rectify_of(INT, 0x7F800000), _rectify_of(HALF, 0x7F80)
_apply_floats, _apply_halves = _apply_of(INT), _apply_of(HALF)


@row_loop()
def rectify_row(x, half, count, mask, most, tail):
    """x <- min(max(x, 0), most), `count` float32 or (half) bf16 at an address, and a bit of the mask for each element
    between. tail: TAIL_BYTES of scratch."""
    size, vectors = 2 if half else 4, count // LANES
    if half:
        _rectify_halves(x, mask, vectors, most)
    else:
        _rectify_floats(x, mask, vectors, most)
    left = count - vectors * LANES
    if left:
        at, bits = x + size * LANES * vectors, tail + 4 * LANES
        copy(tail, 0, TAIL_BYTES)
        copy(tail, at, size * left)
        if half:
            _rectify_halves(tail, bits, 1, most)
        else:
            _rectify_floats(tail, bits, 1, most)
        copy(at, tail, size * left)
        copy(mask + MASK_BYTES * vectors, bits, (left + 7) // 8)


@row_loop()
def apply_row(x, half, count, mask, out, tail):
    """out <- x where the mask has a bit, else 0: see rectify_row."""
    size, vectors = 2 if half else 4, count // LANES
    if half:
        _apply_halves(x, mask, out, vectors)
    else:
        _apply_floats(x, mask, out, vectors)
    left = count - vectors * LANES
    if left:
        at, bits = size * LANES * vectors, tail + 4 * LANES
        copy(tail, x + at, size * left)
        copy(bits, mask + MASK_BYTES * vectors, (left + 7) // 8)
        if half:
            _apply_halves(tail, bits, tail, 1)
        else:
            _apply_floats(tail, bits, tail, 1)
        copy(out + at, tail, size * left)
