"""Compiled sums (numba, LLVM's vectors) of a row's moments, in the order of reference.add_up."""

from __future__ import annotations

from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.rows import f32, row_loop
from luqrun.quant.kernels.cpu.sizes import LINE
from luqrun.quant.kernels.cpu.vectors import ADDRESS, FLOAT, INT, load

SUMS = 8  # of a vector
VECTORS = LINE // SUMS
FLOATS, INTS, DOUBLES = (ir.VectorType(kind, SUMS) for kind in (FLOAT, INT, ir.DoubleType()))
MAGNITUDE = ir.Constant(INTS, [0x7FFFFFFF] * SUMS)


def _add_line(builder, address, sums, squares):
    """Add LINE float32 to vectors of sums, which are in memory until LLVM finds registers for them."""
    for number in range(VECTORS):
        bits = load(builder, address, INTS, 4 * SUMS * number)
        x = builder.fpext(builder.bitcast(builder.and_(bits, MAGNITUDE), FLOATS), DOUBLES)
        builder.store(builder.fadd(builder.load(sums[number]), x), sums[number])
        builder.store(builder.fadd(builder.load(squares[number]), builder.fmul(x, x)), squares[number])


def _total(builder, vectors):
    total = builder.load(vectors[0])
    for vector in vectors[1:]:
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
    """(sum |x|, sum x^2) of a row in float64. rest: float32 (LINE,) of zeros, which may be filled."""
    whole = x.size // LINE * LINE
    for j in range(LINE if whole < x.size else 0):
        rest[j] = x[whole + j] if whole + j < x.size else f32(0)
    return _add_up(x.ctypes.data, x.size // LINE, rest.ctypes.data)
