"""A block of an integer matrix product in registers: the instruction of AVX-512 VNNI, which numba does not know.

It adds to each of 16 int32 the products of four uint8 with four int8, exactly: nothing saturates.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import DOT, cgutils
from luqrun.quant.kernels.cpu.sizes import LANES, ROWS
from luqrun.quant.kernels.cpu.vectors import (
    ADDRESS,
    BYTE,
    BYTES,
    FLOATS,
    INT,
    INTS,
    at,
    everywhere,
    load,
    store,
    to_bf16,
)


def dot(builder, total, left, right):
    """16 int32 + the products of quads of uint8 with quads of int8."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INTS, [INTS] * 3), DOT)
    return builder.call(function, [total, left, right])


def _store(builder, value, address, present):
    """The first `present` elements of a vector, all where there are as many."""
    element = value.type.element
    bytes_each = element.width // 8 if isinstance(element, ir.IntType) else 4
    with builder.if_else(builder.icmp_signed(">=", present, ADDRESS(LANES))) as (whole, part):
        with whole:
            builder.store(value, at(builder, address, value.type), align=1)
        with part, cgutils.for_range(builder, present) as lane:
            place = builder.add(address, builder.mul(lane.index, ADDRESS(bytes_each)))
            one = builder.extract_element(value, builder.trunc(lane.index, INT))
            builder.store(one, at(builder, place, element), align=1)


def _sums(builder, vectors, left, offsets, runs, taps, length, step, right):
    """The vectors of a block's sums in LLVM, row by row: see `_dot_tile`."""
    rows, zeros = range(ROWS[vectors]), ir.Constant(INTS, None)
    sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(vectors)] for _ in rows]
    starts = [builder.sext(load(builder, offsets, INT, 4 * row), ADDRESS) for row in rows]
    starts = [builder.add(left, start) for start in starts]
    next_right = cgutils.alloca_once_value(builder, right)
    (runs, run_step), (taps, tap_step) = (cgutils.unpack_tuple(builder, pair) for pair in (runs, taps))
    with cgutils.for_range(builder, runs) as run, cgutils.for_range(builder, taps) as tap:
        begin = builder.add(builder.mul(run.index, run_step), builder.mul(tap.index, tap_step))
        begins = [builder.add(start, begin) for start in starts]
        with cgutils.for_range(builder, length) as quad:
            quad_start, place = builder.mul(quad.index, step), builder.load(next_right)
            columns = [load(builder, place, INTS, 64 * vector) for vector in range(vectors)]
            builder.store(builder.add(place, ADDRESS(64 * vectors)), next_right)
            for row in rows:
                four = load(builder, builder.add(begins[row], quad_start), INT)
                four = everywhere(builder, four, INTS)
                for total, column in zip(sums[row], columns, strict=True):
                    builder.store(dot(builder, builder.load(total), four, column), total)
    return [[builder.load(total) for total in row] for row in sums]


def _dot_tile(vectors: int):
    """`dot_tile` for blocks of ROWS[vectors] rows and so many vectors of columns."""

    @intrinsic
    def dot_tile(typingctx, left, offsets, runs, taps, length, step, right, out):
        """int32 (rows, columns) at `out`. Row i of the left operand lies at left + offsets[i] (int32): runs, and taps
        in each of them (how many, bytes apart), of `length` quads of uint8, step bytes apart. right: all its quads one
        after the other, int8 (columns, 4) each."""

        def codegen(context, builder, signature, args):
            sums = _sums(builder, vectors, *args[:-1])
            for place, total in enumerate(total for row in sums for total in row):
                to = builder.add(args[-1], ADDRESS(4 * LANES * place))
                builder.store(total, at(builder, to, INTS), align=1)
            return context.get_dummy_value()

        pair = nb.UniTuple(nb.int64, 2)
        return nb.void(nb.int64, nb.int64, pair, pair, *[nb.int64] * 4), codegen

    return dot_tile


def _scaled_dot_tile(vectors: int):
    """`_dot_tile`, whose sums go to their places as float32 at once."""

    @intrinsic
    def scaled_dot_tile(typingctx, left, offsets, runs, taps, length, step, right, shifts, scale, places, out):
        """(sums - int32 (columns,) at `shifts`) * scale, row i at out + places[i] (int64)."""

        def codegen(context, builder, signature, args):
            *operands, shifts, scale, places, out = args
            sums = _sums(builder, vectors, *operands)
            shifts = [load(builder, shifts, INTS, 4 * LANES * vector) for vector in range(vectors)]
            scales = everywhere(builder, scale, FLOATS)
            for row, totals in enumerate(sums):
                to = builder.add(out, load(builder, places, ADDRESS, 8 * row))
                for vector, total in enumerate(totals):
                    exact = builder.sitofp(builder.sub(total, shifts[vector]), FLOATS)
                    store(builder, builder.fmul(exact, scales), to, 4 * LANES * vector)
            return context.get_dummy_value()

        pair = nb.UniTuple(nb.int64, 2)
        rest = *[nb.int64] * 3, nb.int64, nb.float32, nb.int64, nb.int64
        return nb.void(nb.int64, nb.int64, pair, pair, *rest), codegen

    return scaled_dot_tile


dot_tile, narrow_dot_tile = _dot_tile(2), _dot_tile(1)
scaled_dot_tile, narrow_scaled_dot_tile = _scaled_dot_tile(2), _scaled_dot_tile(1)


@intrinsic
def store_scaled(typingctx, sums, shifts, scale, out, half, present):
    """(16 int32 at `sums` - those at `shifts`) * scale as float32 or (half) bf16 at `out`, or only as many as are
    present."""

    def codegen(context, builder, signature, args):
        sums, shifts, scale, out, half, present = args
        exact = builder.sub(load(builder, sums, INTS), load(builder, shifts, INTS))
        value = builder.fmul(builder.sitofp(exact, FLOATS), everywhere(builder, scale, FLOATS))
        with builder.if_else(builder.icmp_signed("!=", half, ADDRESS(0))) as (halves, floats):
            with halves:
                _store(builder, to_bf16(builder, value), out, present)
            with floats:
                _store(builder, value, out, present)
        return context.get_dummy_value()

    return nb.void(nb.int64, nb.int64, nb.float32, *[nb.int64] * 3), codegen


@intrinsic
def interleave(typingctx, out, first, second, third, fourth, count, flip):
    """The quads of 16 columns, or as many as count: byte 4j + i at `out` is byte j at the i-th address, exclusive or
    flip."""

    def codegen(context, builder, signature, args):
        out, *sources, count, flip = args
        flip = builder.trunc(flip, BYTE)
        with builder.if_else(builder.icmp_signed(">=", count, ADDRESS(LANES))) as (whole, part):
            with whole:
                flips = everywhere(builder, flip, BYTES)
                rows = [builder.xor(load(builder, source, BYTES), flips) for source in sources]
                pairs = ir.Constant(ir.VectorType(INT, 2 * LANES), [*range(2 * LANES)])
                quads = [LANES * (place % 4) + place // 4 for place in range(4 * LANES)]
                halves = [builder.shuffle_vector(*rows[i : i + 2], pairs) for i in (0, 2)]
                mixed = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(INT, 4 * LANES), quads))
                builder.store(mixed, at(builder, out, mixed.type), align=1)
            with part, cgutils.for_range(builder, count) as column:
                place = builder.add(out, builder.mul(column.index, ADDRESS(4)))
                for byte, source in enumerate(sources):
                    value = builder.xor(load(builder, builder.add(source, column.index), BYTE), flip)
                    builder.store(value, at(builder, builder.add(place, ADDRESS(byte)), BYTE), align=1)
        return context.get_dummy_value()

    return nb.void(*[nb.int64] * 7), codegen
