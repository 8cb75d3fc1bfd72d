"""Winograd's minimal filtering in registers, on integers (Lavin and Gray, CVPR 2016, equations 8 to 11).

F(2x2, 3x3): a tile of 4x4 pixels gives the 2x2 outputs of a 3x3 kernel by 16 products for each pair of channels instead
of 36. F(3x3, 2x2): so do the tile and the gradients of its outputs that of the kernel. The transforms are taken without
their halves, which makes every number an integer and the results four times as large.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.dot_tiles import dot
from luqrun.quant.kernels.cpu.sizes import LANES
from luqrun.quant.kernels.cpu.vectors import (
    ADDRESS,
    BYTE,
    FLOATS,
    HALF,
    INT,
    INTS,
    at,
    constant,
    everywhere,
    load,
    store,
    to_bf16,
)

POINTS = 16  # products of a tile
_SIDE = 4
SHIFTS = -0x7F7F7F80  # four bytes of 128


class _Sums:
    """The transforms along one dimension, of vectors in LLVM."""

    def __init__(self, builder):
        self.add, self.sub = builder.add, builder.sub

    def image(self, d):
        """B^T d of the paper, for four."""
        return [self.sub(d[0], d[2]), self.add(d[1], d[2]), self.sub(d[2], d[1]), self.sub(d[1], d[3])]

    def kernel(self, g):
        """G g for three, without the halves in its second and third line."""
        ends = self.add(g[0], g[2])
        return [g[0], self.add(ends, g[1]), self.sub(ends, g[1]), g[2]]

    def gradient(self, g):
        """G g for two outputs, without halves."""
        return [g[0], self.add(*g), self.sub(*g), g[1]]

    def weight(self, m):
        """2 A^T m for four, of gradients without halves: for the three taps."""
        first, last, middle = self.add(m[0], m[0]), self.add(m[3], m[3]), self.add(m[1], m[2])
        return [self.add(first, middle), self.sub(m[1], m[2]), self.sub(middle, last)]

    def output(self, m):
        """2 A^T m for four, of a kernel without halves."""
        first, last = self.add(m[0], m[0]), self.add(m[3], m[3])
        return [self.add(first, self.add(m[1], m[2])), self.sub(self.sub(m[1], m[2]), last)]


def _both(transform, square):
    """A transform along both dimensions."""
    lines = [transform(line) for line in zip(*square, strict=True)]  # of columns
    return [transform(line) for line in zip(*lines, strict=True)]


def _any(builder, vector):
    """Whether any bit is set, as an integer."""
    bits = ir.IntType(vector.type.element.width * vector.type.count)
    return builder.zext(builder.icmp_unsigned("!=", builder.bitcast(vector, bits), bits(0)), ADDRESS)


def _beyond(builder, values):
    """Of int16 vectors: a vector whose bits beyond the lowest 8 tell whether any is not of int8."""
    found = None
    for value in values:
        shifted = builder.add(value, constant(128, value.type))
        found = shifted if found is None else builder.or_(found, shifted)
    return builder.lshr(found, constant(8, found.type))


def _clamped(builder, value, low, high):
    """An int16 vector within two numbers."""
    for limit, relation in ((low, "<"), (high, ">")):
        limit = constant(limit, value.type)
        value = builder.select(builder.icmp_signed(relation, value, limit), limit, value)
    return value


def _store_transformed(builder, values, out, far):
    """int16 vectors as uint8, 128 added and clamped, far bytes apart; whether any was clamped."""
    for point, value in enumerate(values):
        shifted = builder.add(value, constant(128, value.type))
        byte = builder.trunc(_clamped(builder, shifted, 0, 255), ir.VectorType(BYTE, value.type.count))
        store(builder, byte, builder.add(out, builder.mul(far, ADDRESS(point))))
    return _any(builder, _beyond(builder, values))


def _pixels(builder, image, down, across, side, lanes):
    """The lines of a square of int8 pixels as int16."""
    square = []
    for line in range(side):
        start = builder.add(image, builder.mul(down, ADDRESS(line)))
        starts = [builder.add(start, builder.mul(across, ADDRESS(column))) for column in range(side)]
        pixels = [load(builder, each, ir.VectorType(BYTE, lanes)) for each in starts]
        square.append([builder.sext(pixel, ir.VectorType(HALF, lanes)) for pixel in pixels])
    return square


def _transformed(builder, side, name, lanes, image, down, across):
    """The 16 numbers of the transform called `name` of a square of pixels."""
    square = _both(getattr(_Sums(builder), name), _pixels(builder, image, down, across, side, lanes))
    return [value for line in square for value in line]


def _transform(side, name, lanes):
    @intrinsic
    def transform(typingctx, image, down, across, out, far):
        """The transform of a square of int8 pixels at `image`, down and across bytes apart, for so many channels: uint8
        (16, lanes), 128 added, at `out`, far bytes apart. What is not of int8 is clamped: returns whether anything
        was."""

        def codegen(context, builder, signature, args):
            *image, out, far = args
            return _store_transformed(builder, _transformed(builder, side, name, lanes, *image), out, far)

        return nb.int64(*[nb.int64] * 5), codegen

    return transform


def _rest(side, name):
    @intrinsic
    def rest(typingctx, image, down, across, out):
        """What `transform` leaves out of 16 channels: int16 (16, 16) at `out`."""

        def codegen(context, builder, signature, args):
            *image, out = args
            for point, value in enumerate(_transformed(builder, side, name, LANES, *image)):
                left = builder.sub(value, _clamped(builder, value, -128, 127))
                store(builder, left, out, 2 * LANES * point)
            return context.get_dummy_value()

        return nb.void(*[nb.int64] * 4), codegen

    return rest


transform_image, narrow_transform_image = (_transform(_SIDE, "image", lanes) for lanes in (2 * LANES, LANES))
transform_gradient, narrow_transform_gradient = (_transform(2, "gradient", lanes) for lanes in (2 * LANES, LANES))
rest_of_image, rest_of_gradient = _rest(_SIDE, "image"), _rest(2, "gradient")


@intrinsic
def add_products(typingctx, sums, column, byte, factor):
    """16 int32 at `sums` += factor times number `byte` of each quad of int8 at `column`."""

    def codegen(context, builder, signature, args):
        sums, column, byte, factor = args
        up = builder.mul(builder.sub(ADDRESS(3), byte), ADDRESS(8))
        numbers = builder.shl(load(builder, column, INTS), everywhere(builder, builder.trunc(up, INT), INTS))
        numbers = builder.ashr(numbers, constant(24))
        products = builder.mul(numbers, everywhere(builder, builder.trunc(factor, INT), INTS))
        store(builder, builder.add(load(builder, sums, INTS), products), sums)
        return context.get_dummy_value()

    return nb.void(*[nb.int64] * 4), codegen


@intrinsic
def transform_kernel(typingctx, kernel, tap, step, quads, out, far, sums):
    """The transform of 9 taps of int8, tap bytes apart, and of so many quads of 16 columns, step bytes apart: int8 at
    `out`, far bytes apart. At `sums`: 128 times the sum over each column, int32 (16, 16). Returns whether anything is
    not of int8."""

    def codegen(context, builder, signature, args):
        kernel, tap, step, quads, out, far, sums = args
        bytes_, wide = ir.VectorType(BYTE, 4 * LANES), ir.VectorType(HALF, 4 * LANES)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(INTS, None)) for _ in range(POINTS)]
        beyond = cgutils.alloca_once_value(builder, ir.Constant(wide, None))
        with cgutils.for_range(builder, quads) as quad:
            begin = builder.mul(quad.index, step)
            source, target = builder.add(kernel, begin), builder.add(out, begin)
            taps = [builder.add(source, builder.mul(tap, ADDRESS(number))) for number in range(9)]
            taps = [builder.sext(load(builder, each, bytes_), wide) for each in taps]
            square = _both(_Sums(builder).kernel, [taps[:3], taps[3:6], taps[6:]])
            values = [value for line in square for value in line]
            builder.store(builder.or_(builder.load(beyond), _beyond(builder, values)), beyond)
            for point, value in enumerate(values):
                value = builder.trunc(value, bytes_)
                store(builder, value, builder.add(target, builder.mul(far, ADDRESS(point))))
                total = dot(builder, builder.load(totals[point]), constant(SHIFTS), builder.bitcast(value, INTS))
                builder.store(total, totals[point])
        for point, total in enumerate(totals):
            store(builder, builder.load(total), sums, 4 * LANES * point)
        return _any(builder, builder.load(beyond))

    return nb.int64(*[nb.int64] * 7), codegen


def _results(builder, sums, far, transform):
    """Four times the results of products at `sums`, int32 far bytes apart, as vectors line by line."""
    points = [load(builder, builder.add(sums, builder.mul(far, ADDRESS(point))), INTS) for point in range(POINTS)]
    square = [points[_SIDE * line : _SIDE * (line + 1)] for line in range(_SIDE)]
    return [value for line in _both(transform, square) for value in line]


@intrinsic
def outputs_of(typingctx, sums, far, out, pitch):
    """int32 (4, 16) at `out`, pitch bytes apart: four times the outputs of int32 (16, 16) at `sums`, far bytes
    apart."""

    def codegen(context, builder, signature, args):
        sums, far, out, pitch = args
        for place, value in enumerate(_results(builder, sums, far, _Sums(builder).output)):
            store(builder, value, builder.add(out, builder.mul(pitch, ADDRESS(place))))
        return context.get_dummy_value()

    return nb.void(*[nb.int64] * 4), codegen


@intrinsic
def store_outputs(typingctx, sums, far, shifts, pitch, scale, half, places, nowhere, out):
    """A fourth of what `outputs_of` gives less the int32 (4, 16) at `shifts`, pitch bytes apart, times scale: float32
    or (half) bf16, at out + each of four int64 at `places`, or at nowhere for those below 0."""

    def codegen(context, builder, signature, args):
        sums, far, shifts, pitch, scale, half, places, nowhere, out = args
        scales, values = everywhere(builder, scale, FLOATS), []
        for place, value in enumerate(_results(builder, sums, far, _Sums(builder).output)):
            shift = load(builder, builder.add(shifts, builder.mul(pitch, ADDRESS(place))), INTS)
            exact = builder.ashr(builder.sub(value, shift), constant(2))
            values.append(builder.fmul(builder.sitofp(exact, FLOATS), scales))
        to = []
        for place in range(len(values)):
            offset = builder.load(at(builder, builder.add(places, ADDRESS(8 * place)), ADDRESS))
            absent = builder.icmp_signed("<", offset, ADDRESS(0))
            to.append(builder.select(absent, nowhere, builder.add(out, offset)))
        with builder.if_else(builder.icmp_signed("!=", half, ADDRESS(0))) as (halves, floats):
            with halves:
                for place, value in zip(to, values, strict=True):
                    store(builder, to_bf16(builder, value), place)
            with floats:
                for place, value in zip(to, values, strict=True):
                    store(builder, value, place)
        return context.get_dummy_value()

    rest = nb.float32, *[nb.int64] * 4
    return nb.void(*[nb.int64] * 4, *rest), codegen


@intrinsic
def store_weight(typingctx, sums, far, total, out, tap, add, last):
    """A fourth of the transform of int32 (16, 16) at `sums`, far bytes apart: for each of 9 taps float64 (16,) at
    `total`, or (last) float32 at `out`; (add) with what lay at `total`. tap: how many elements taps are apart."""

    def codegen(context, builder, signature, args):
        sums, far, total, out, tap, add, last = args
        doubles = ir.VectorType(ir.DoubleType(), LANES)
        add, last = (builder.icmp_signed("!=", flag, ADDRESS(0)) for flag in (add, last))
        for number, value in enumerate(_results(builder, sums, far, _Sums(builder).weight)):
            before = builder.add(total, builder.mul(tap, ADDRESS(8 * number)))
            to = builder.add(out, builder.mul(tap, ADDRESS(4 * number)))
            found = cgutils.alloca_once_value(builder, builder.sitofp(builder.ashr(value, constant(2)), doubles))
            with builder.if_then(add):
                builder.store(builder.fadd(builder.load(found), load(builder, before, doubles)), found)
            with builder.if_else(last) as (floats, sums):
                with floats:
                    store(builder, builder.fptrunc(builder.load(found), FLOATS), to)
                with sums:
                    store(builder, builder.load(found), before)
        return context.get_dummy_value()

    return nb.void(*[nb.int64] * 7), codegen


@intrinsic
def column_sums(typingctx, right, step, quads, out):
    """int32 (16,) at `out`: -128 times the sums of so many quads of 16 columns of int8, step bytes apart."""

    def codegen(context, builder, signature, args):
        right, step, quads, out = args
        total = cgutils.alloca_once_value(builder, ir.Constant(INTS, None))
        with cgutils.for_range(builder, quads) as quad:
            four = load(builder, builder.add(right, builder.mul(quad.index, step)), INTS)
            builder.store(dot(builder, builder.load(total), constant(SHIFTS), four), total)
        store(builder, builder.neg(builder.load(total)), out)
        return context.get_dummy_value()

    return nb.void(*[nb.int64] * 4), codegen
