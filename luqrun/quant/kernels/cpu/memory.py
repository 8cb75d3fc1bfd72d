"""How compiled loops (numba) read and write memory: dense, at addresses (Tensor.data_ptr()).

Views and small tensors made on the way would cost more than the work itself where layers are small.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba import types as nb
from numba.extending import intrinsic
from torch import Tensor

from luqrun.internals.of_numba import cgutils
from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.rows import f32, row_loop
from luqrun.quant.kernels.layout import dense

INT8, INT16, FLOAT32, BF16 = 0, 1, 2, 3  # what the codes are stored as


@intrinsic
def pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return nb.voidptr(address), codegen


def _move(bits, lanes, add=False):
    """An intrinsic that copies (or adds) a vector from address to address, aligned or not."""

    @intrinsic
    def move(typingctx, target, source):
        def codegen(context, builder, signature, args):
            vector = ir.VectorType(ir.IntType(bits), lanes).as_pointer()
            to, value = builder.inttoptr(args[0], vector), builder.load(builder.inttoptr(args[1], vector), align=1)
            builder.store(builder.add(builder.load(to, align=1), value) if add else value, to, align=1)
            return context.get_dummy_value()

        return nb.void(target, source), codegen

    return move


_copy32, _copy16, _copy8, copy_quad, _copy1 = (_move(8, lanes) for lanes in (32, 16, 8, 4, 1))
_add16, _add8, _add1 = (_move(32, lanes, add=True) for lanes in (16, 8, 1))


@row_loop()
def copy(target, source, count):
    """Copy so many bytes, few and no two alike: a vector loop would spend its time on entering. Zeros for source 0."""
    if source == 0:
        rows.clear(uint8s(target, count))
        return
    at = 0
    while at + 32 <= count:
        _copy32(target + at, source + at)
        at += 32
    if at + 16 <= count:
        _copy16(target + at, source + at)
        at += 16
    if at + 8 <= count:
        _copy8(target + at, source + at)
        at += 8
    while at < count:
        _copy1(target + at, source + at)
        at += 1


@row_loop()
def accumulate(target, source, count):
    """Add so many int32, few as in `copy`."""
    at = 0
    while at + 16 <= count:
        _add16(target + 4 * at, source + 4 * at)
        at += 16
    if at + 8 <= count:
        _add8(target + 4 * at, source + 4 * at)
        at += 8
    while at < count:
        _add1(target + 4 * at, source + 4 * at)
        at += 1


def loadable(x: Tensor) -> Tensor:
    """x as dense float32 or bf16, which the loops read."""
    x = dense(x)
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


@row_loop()
def uint8s(address, count):
    return carray(pointer(address), (count,), np.uint8)


@row_loop()
def int8s(address, count):
    return carray(pointer(address), (count,), np.int8)


@row_loop()
def int16s(address, count):
    return carray(pointer(address), (count,), np.int16)


@row_loop()
def halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


@row_loop()
def int32s(address, count):
    return carray(pointer(address), (count,), np.int32)


@row_loop()
def uint32s(address, count):
    return carray(pointer(address), (count,), np.uint32)


@row_loop()
def int64s(address, count):
    return carray(pointer(address), (count,), np.int64)


@row_loop()
def uint64s(address, count):
    return carray(pointer(address), (count,), np.uint64)


@row_loop()
def set_float(address, value):
    carray(pointer(address), (1,), np.float32)[0] = f32(value)


@row_loop()
def floats(address, count):
    return carray(pointer(address), (count,), np.float32)


@row_loop()
def product_of(scales):
    """That of the float32 at two addresses, of which the second, or both for 1, may be 0."""
    first = floats(scales[0], 1)[0] if scales[0] != 0 else f32(1)
    return f32(first * floats(scales[1], 1)[0]) if scales[1] != 0 else first


@row_loop()
def is_set(address):
    """The bool at an address, false at 0."""
    return address != 0 and uint8s(address, 1)[0] != 0


@row_loop()
def doubles(address, count):
    return carray(pointer(address), (count,), np.float64)


@row_loop()
def load(x, half, start, count, buffer):
    """The float32 bit patterns of `count` elements: of bf16, the upper halves."""
    if half:
        return rows.patterns(halves(x + 2 * start, count), buffer)
    return int32s(x + 4 * start, count)


@row_loop()
def store(codes, target, kind, start):
    """Codes (int32) as int8, int16, float32 or bf16."""
    count = codes.size
    if kind == INT8:
        rows.copy(codes, int8s(target + start, count))
    elif kind == INT16:
        rows.copy(codes, int16s(target + 2 * start, count))
    elif kind == FLOAT32:
        rows.copy(codes, floats(target + 4 * start, count))
    else:
        rows.to_bf16(codes, halves(target + 2 * start, count))


@row_loop()
def _split(codes, fields, first, form, split, scratch):
    count = codes.size
    if form[1]:
        rows.to_fields(codes, split[:count], scratch, form[3], form[0])
        rows.join(split[:count], uint8s(fields + first // 2, (count + 1) // 2))
    else:
        rows.to_fields(codes, uint8s(fields + first, count), scratch, form[3], form[0])


@row_loop()
def fields_row(codes, stored, fields, first, form, split, scratch):
    """The fields of a row of codes, which are at `stored` as what form[2] says: int8, or else in codes (int32)."""
    count = codes.size
    if form[2] != INT8:
        _split(codes, fields, first, form, split, scratch)
    elif form[0] == 4 and not form[3]:  # narrower codes would need masks of their own
        rows.join(uint8s(stored + first, count), uint8s(fields + first // 2, (count + 1) // 2))
    else:
        _split(int8s(stored + first, count), fields, first, form, split, scratch)
