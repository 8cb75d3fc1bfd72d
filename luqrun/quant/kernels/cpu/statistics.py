"""Compiled loops (numba, LLVM's vectors) that find what ranges need of a tensor: see reference.statistics.

The sums have the order of reference.add_up: tasks of CHUNK elements, of which a row of ROW is measured at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic
from torch import Tensor

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.driver import integers, tasks
from luqrun.quant.kernels.cpu.memory import doubles, floats, halves, int32s, load
from luqrun.quant.kernels.cpu.rows import HAS_FMA, f32, i32, row_loop, u16, u32
from luqrun.quant.kernels.cpu.sizes import LANES, LINE, ROW
from luqrun.quant.kernels.cpu.vectors import ADDRESS, BITS, FLOAT, HALF, INT, INTS, constant
from luqrun.quant.kernels.cpu.vectors import load as load_vector

SUMS = 8  # of a vector
VECTORS = LINE // SUMS
EIGHT_FLOATS, EIGHT_INTS, DOUBLES = (ir.VectorType(kind, SUMS) for kind in (FLOAT, INT, ir.DoubleType()))
MAGNITUDE = ir.Constant(EIGHT_INTS, [0x7FFFFFFF] * SUMS)


def _add_line(builder, address, sums, squares):
    """Add LINE float32 to vectors of sums, which are in memory until LLVM finds registers for them. Squares of float32
    are exact in float64: there a fused multiply-add rounds as often."""
    kind = ir.FunctionType(DOUBLES, [DOUBLES] * 3)
    square = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{'fma' if HAS_FMA else 'fmuladd'}.v8f64")
    for number in range(VECTORS):
        bits = load_vector(builder, address, EIGHT_INTS, 4 * SUMS * number)
        x = builder.fpext(builder.bitcast(builder.and_(bits, MAGNITUDE), EIGHT_FLOATS), DOUBLES)
        builder.store(builder.fadd(builder.load(sums[number]), x), sums[number])
        builder.store(builder.call(square, [x, x, builder.load(squares[number])]), squares[number])


def _total(builder, partial):
    total = builder.load(partial[0])
    for vector in partial[1:]:
        total = builder.fadd(total, builder.load(vector))
    lanes = SUMS
    while lanes > 1:
        lanes //= 2
        kinds = [ir.Constant(ir.VectorType(INT, lanes), list(range(first, first + lanes))) for first in (0, lanes)]
        total = builder.fadd(*(builder.shuffle_vector(total, total, kind) for kind in kinds))
    return builder.extract_element(total, INT(0))


@intrinsic
def _add_up(typingctx, address, lines, rest):
    """(sum |x|, sum x^2) of so many LINEs of float32 at an address, and then of one at `rest`."""

    def codegen(context, builder, signature, args):
        address, lines, rest = args
        zeros = ir.Constant(DOUBLES, None)
        sums, squares = ([cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)] for _ in range(2))
        with cgutils.for_range(builder, lines) as loop:
            _add_line(builder, builder.add(address, builder.mul(loop.index, ADDRESS(4 * LINE))), sums, squares)
        _add_line(builder, rest, sums, squares)
        return context.make_tuple(builder, signature.return_type, [_total(builder, sums), _total(builder, squares)])

    return nb.UniTuple(nb.float64, 2)(nb.int64, nb.int64, nb.int64), codegen


@row_loop()
def moments(x, rest):
    """(sum |x|, sum x^2) of a row in float64. rest: scratch for float32 (LINE,)."""
    whole = x.size // LINE * LINE
    for j in range(LINE):
        rest[j] = x[whole + j] if whole + j < x.size else f32(0)
    return _add_up(x.ctypes.data, x.size // LINE, rest.ctypes.data)


@intrinsic
def _ends(typingctx, address, vectors):
    """(bit pattern of max|x|, whether any x < 0) of so many vectors of float32 at an address."""

    def codegen(context, builder, signature, args):
        address, vectors = args
        largest = cgutils.alloca_once_value(builder, constant(0))
        below = cgutils.alloca_once_value(builder, ir.Constant(BITS, None))
        with cgutils.for_range(builder, vectors) as loop:
            bits = load_vector(builder, builder.add(address, builder.mul(loop.index, ADDRESS(4 * LANES))), INTS)
            magnitude, before = builder.and_(bits, constant(0x7FFFFFFF)), builder.load(largest)
            builder.store(builder.select(builder.icmp_signed(">", magnitude, before), magnitude, before), largest)
            # The patterns of negative numbers, between those of -0 and of NaN; no comparison of floats, which may take
            # the smallest for zero.
            negative = builder.icmp_unsigned("<", builder.sub(bits, constant(0x80000001)), constant(0x7F800000))
            builder.store(builder.or_(builder.load(below), negative), below)
        kind = ir.FunctionType(INT, [INTS])
        most = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.smax.v{LANES}i32")
        any_below = builder.icmp_unsigned("!=", builder.bitcast(builder.load(below), ir.IntType(LANES)), HALF(0))
        found = [builder.call(most, [builder.load(largest)]), builder.sext(any_below, INT)]
        return context.make_tuple(builder, signature.return_type, found)

    return nb.UniTuple(nb.int32, 2)(nb.int64, nb.int64), codegen


@row_loop()
def _ends_of_few(bits):
    """See `ends`. The casts keep numba from widening to 64 bits."""
    largest, negative = i32(0), i32(0)
    for j in range(bits.size):
        magnitude = i32(bits[j] & i32(0x7FFFFFFF))
        largest = max(largest, magnitude)
        # Three sign bits: negative, not -0, and not NaN.
        negative = i32(negative | i32(bits[j] & i32(i32(-magnitude) & i32(magnitude - i32(0x7F800001)))))
    return largest, negative


@row_loop()
def _ends_of_halves(bits):
    """See `ends`; of bf16's bit patterns."""
    largest, negative = u16(0), u16(0)
    for j in range(bits.size):
        magnitude = u16(bits[j] & u16(0x7FFF))
        largest = max(largest, magnitude)
        negative = max(negative, bits[j] if magnitude <= u16(0x7F80) else u16(0))
    return i32(u32(largest) << u32(16)), i32(-1) if negative > u16(0x8000) else i32(0)  # which is -0


@row_loop()
def ends(x, half, count):
    """(bit pattern of max|x|, a number below 0 if any x is) of `count` float32 or (half) bf16 at an address. Patterns
    of non-negative floats order like integers, and NaN comes out above Inf."""
    if half:
        return _ends_of_halves(halves(x, count))
    whole = count // LANES
    largest, negative = _ends(x, whole)
    if whole * LANES < count:
        last, below = _ends_of_few(int32s(x + 4 * LANES * whole, count - LANES * whole))
        largest, negative = max(largest, last), min(negative, below)
    return largest, negative


MEASURE_BYTES = 4 * (ROW + LINE)  # of scratch that `measure_row` takes


@row_loop()
def measure_ends(x, half, first, count, extremes):
    """Add `count` elements of x, `first` up, to what a task found: int32 (2,) at `extremes`. x: an address; half:
    whether x is bf16 and not float32."""
    found = int32s(extremes, 2)
    largest, negative = ends(x + (2 if half else 4) * first, half, count)
    found[0], found[1] = max(found[0], largest), min(found[1], negative)


@row_loop()
def measure_row(x, half, first, count, wants_moments, extremes, sums, scratch):
    """As measure_ends, of one row, and its moments to float64 (2,) at `sums`. scratch: MEASURE_BYTES at an address."""
    measure_ends(x, half, first, count, extremes)
    if wants_moments:
        row = load(x, half, first, count, int32s(scratch, ROW))
        sum1, sum2 = moments(row.view(np.float32), floats(scratch + 4 * ROW, LINE))
        total = doubles(sums, 2)
        total[0] += sum1
        total[1] += sum2


@row_loop()
def total_of_ends(extremes, tasks, found):
    """The statistics of a tensor without its moments: see `total`."""
    ends = int32s(extremes, 2 * tasks)
    largest, negative = i32(0), i32(0)
    for number in range(tasks):
        largest, negative = max(largest, ends[2 * number]), min(negative, ends[2 * number + 1])
    found[0], found[1], found[2], found[3] = rows.as_float(largest), negative < i32(0), 0.0, 0.0


@row_loop()
def total(extremes, sums, tasks, found):
    """float64 (4,), the statistics of a tensor, from what its tasks found, one after the other. extremes, sums:
    addresses of int32 and float64 (tasks, 2)."""
    total_of_ends(extremes, tasks, found)
    added = doubles(sums, 2 * tasks)
    for number in range(tasks):
        found[2] += added[2 * number]
        found[3] += added[2 * number + 1]


@tasks
def statistics(request, number):
    """float64 (4,) at `out`: see `total`."""
    extremes, sums, parts, out = integers(request, 0, 4)
    total(extremes, sums, parts, doubles(out, 4))


def measuring(loop: tasks, count: int, elements: int, *numbers: int, out: Tensor | None, moments: bool = False) -> None:
    """loop(count, elements, *numbers), which also measures what it writes: statistics (float64 (4,)) go to `out`, those
    of reference.statistics, or None. Its last three numbers are whether it measures (2: with the moments), and the
    addresses of what its tasks find: see `total`."""
    if out is None:
        loop(count, elements, *numbers, 0, 0, 0)
        return
    assert out.dtype == torch.float64
    assert out.shape == (4,)
    found = torch.zeros(3 * count, dtype=torch.float64, device="cpu")
    extremes, sums = found.data_ptr(), found.data_ptr() + 8 * count
    loop(count, elements, *numbers, 1 + moments, extremes, sums)
    statistics(1, 1, extremes, sums, count, out.data_ptr())
