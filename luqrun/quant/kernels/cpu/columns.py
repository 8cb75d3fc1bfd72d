"""Rows of float32 or bf16 in LLVM's vectors, some columns at a time: for intrinsics over the channels of images in
channels_last memory."""

from __future__ import annotations

from llvmlite import ir

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu.vectors import ADDRESS, FLOAT, HALF, INT, constant, load, store, to_bf16

PANEL = 8192  # elements of rows whose columns are taken a few vectors at a time
EIGHT = 8  # columns share a byte of a mask


class Columns:
    """So many vectors of `lanes` channels beside each other, in LLVM."""

    def __init__(self, builder, lanes: int, vectors: int):
        self.builder, self.lanes, self.vectors = builder, lanes, range(vectors)
        self.kind = ir.VectorType(FLOAT, lanes)
        name = f"llvm.fma.v{lanes}f32"
        self._fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(self.kind, [self.kind] * 3), name)

    def fma(self, *terms):
        return self.builder.call(self._fma, terms)

    def load(self, address):
        return [load(self.builder, address, self.kind, 4 * self.lanes * vector) for vector in self.vectors]

    def store(self, values, address):
        for vector in self.vectors:
            store(self.builder, values[vector], address, 4 * self.lanes * vector)

    def load_row(self, address, half: bool):
        """As float32, what are bf16s where half."""
        if not half:
            return self.load(address)
        halves, ints, found = ir.VectorType(HALF, self.lanes), ir.VectorType(INT, self.lanes), []
        for vector in self.vectors:
            bits = self.builder.zext(load(self.builder, address, halves, 2 * self.lanes * vector), ints)
            found.append(self.builder.bitcast(self.builder.shl(bits, constant(16, ints)), self.kind))
        return found

    def store_row(self, values, address, half: bool):
        """The inverse of `load_row`."""
        if not half:
            self.store(values, address)
            return
        for vector in self.vectors:
            rounded = to_bf16(self.builder, values[vector])
            store(self.builder, rounded, address, 2 * self.lanes * vector)

    def masked(self, values, address):
        """Values where the mask at an address has a bit, else 0."""
        bits, kept = ir.IntType(self.lanes), ir.VectorType(ir.IntType(1), self.lanes)
        found = []
        for vector in self.vectors:
            mask = self.builder.bitcast(load(self.builder, address, bits, self.lanes // EIGHT * vector), kept)
            found.append(self.builder.select(mask, values[vector], ir.Constant(self.kind, None)))
        return found


def row_at(builder, index, pitch, address):
    """Where row number `index` of rows of so many bytes is."""
    return builder.add(address, builder.mul(index, pitch))


def for_each_kind(builder, half, emit):
    """emit(True) where `half`, an integer, says that rows are of bf16, and emit(False) where they are of float32."""
    with builder.if_else(builder.icmp_signed("!=", half, ADDRESS(0))) as (halves, floats):
        with halves:
            emit(True)
        with floats:
            emit(False)
