"""LLVM's vectors of 16 elements, for intrinsics of what numba cannot say: any CPU has them, in as many registers as
they need."""

from __future__ import annotations

from llvmlite import ir

from luqrun.quant.kernels.cpu.sizes import LANES

INT, ADDRESS, FLOAT, HALF, BYTE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(16), ir.IntType(8)
INTS, FLOATS, HALVES, BYTES, BITS = (ir.VectorType(kind, LANES) for kind in (INT, FLOAT, HALF, BYTE, ir.IntType(1)))


def at(builder, address, kind):
    """A pointer to what lies at an address."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder, address, kind, offset=0):
    """What lies so many bytes from an address, aligned or not."""
    return builder.load(at(builder, builder.add(address, ADDRESS(offset)), kind), align=1)


def store(builder, value, address, offset=0):
    """The inverse of `load`."""
    builder.store(value, at(builder, builder.add(address, ADDRESS(offset)), value.type), align=1)


def everywhere(builder, value, kind):
    """A vector of one value."""
    undefined, zeros = ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(INT, kind.count), None)
    return builder.shuffle_vector(builder.insert_element(undefined, value, INT(0)), undefined, zeros)


def constant(number, kind=INTS):
    return ir.Constant(kind, [number] * kind.count)


def permuted(builder, value, lanes):
    """The elements at `lanes` of a vector."""
    return shuffled(builder, value, value, lanes)


def shuffled(builder, first, second, lanes):
    """The elements at `lanes` of two vectors, those of the second after those of the first."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


def to_bf16(builder, values):
    """Vectors of float32 to the nearest bf16, ties to even, and torch's NaN for NaN: rows.round_to_bf16."""
    count = values.type.count
    ints = ir.VectorType(INT, count)
    bits = builder.bitcast(values, ints)
    odd = builder.and_(builder.lshr(bits, constant(16, ints)), constant(1, ints))
    nearest = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF, ints)), odd), constant(16, ints))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF, ints))
    is_nan = builder.icmp_signed(">", magnitude, constant(0x7F800000, ints))
    return builder.trunc(builder.select(is_nan, constant(0x7FC0, ints), nearest), ir.VectorType(HALF, count))
