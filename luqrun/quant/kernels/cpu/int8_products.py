"""Exact products of int8 matrices, by torch's integer unit where that was seen to be exact, and memory for them."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.internals.of_torch import int_mm
from luqrun.quant.kernels.cpu.proofs import Proofs, random_codes

MOST_VIEWS = 1024  # of views that are kept, a few a layer
DOUBLES = 1 << 20  # elements that are float64 at a time, where a product is made or checked in it


class _Memory(threading.local):
    """Each thread's own blocks of memory by name, and views of them by what was asked for."""

    def __init__(self):
        self.blocks: dict[str, Tensor] = {}
        self.views: dict[tuple, Tensor] = {}


_memory = _Memory()


def scratch(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory (rows, columns) of this thread that the next call with this name takes again: fresh memory would cost more
    than filling it."""
    key = name, rows, columns, dtype
    view = _memory.views.get(key)
    if view is None:
        size = rows * columns * dtype.itemsize
        block = _memory.blocks.get(name)
        with torch.inference_mode(False):  # it outlives the caller's mode
            if block is None or block.numel() < size:
                block = _memory.blocks[name] = torch.empty(size, dtype=torch.int8, device="cpu")
                _memory.views.clear()  # some are of the block that was too small
            elif len(_memory.views) >= MOST_VIEWS:
                _memory.views.clear()
            view = _memory.views[key] = block[:size].view(dtype).view(rows, columns)
    return view


class Kind(NamedTuple):
    """What decides how torch multiplies int8 (rows, depth) and (depth, columns)."""

    rows: int
    depth: int
    columns: int
    left_strides: tuple[int, int]
    right_strides: tuple[int, int]
    threads: int


def _unambiguous(x: Tensor) -> Tensor:
    """A matrix of one row or column with the strides of a contiguous one: torch 2.14 takes the stride of a size of one,
    which may be anything, for the distance of its rows, and then computes something else or nothing."""
    return x.as_strided(x.shape, (x.shape[1], 1)) if 1 in x.shape and x.is_contiguous() else x


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The exact product of int8 (M, K) and (K, N): int32 (M, N), in `out` where that is given.

    K is at most 2^17, so that int32 holds the sums of products of codes up to 127.
    """
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.int32, device="cpu")
    if out.numel() == 0 or a.shape[1] == 0:
        return out.zero_()
    (rows, depth), columns = a.shape, out.shape[1]
    if 1 in (rows, depth, columns):
        a, b = _unambiguous(a), _unambiguous(b)
    exact = proven(rows, depth, columns, a.stride(), b.stride(), torch.get_num_threads())
    return int_mm(a, b, out=out) if exact else _in_doubles(a, b, out)


def _in_doubles(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product in float64, which holds every such sum."""
    b, step = b.double(), max(1, DOUBLES // a.shape[1])
    for first in range(0, len(a), step):
        out[first : first + step] = a[first : first + step].double() @ b
    return out


def _trial(kind: Kind) -> bool:
    """Whether torch's unit multiplies random codes of the whole range, and those with the largest sums, exactly.

    Every element of the product counts: its rows' sums with two columns of random weights are compared with those of
    the factors. An error escapes that by chance in one of 2^16 cases; it takes three passes instead of a product in
    float64, which all these sums are exact in.
    """
    sizes = (kind.rows, kind.depth), (kind.depth, kind.columns)
    spans = [
        1 + (size[0] - 1) * strides[0] + (size[1] - 1) * strides[1]
        for size, strides in zip(sizes, (kind.left_strides, kind.right_strides), strict=True)
    ]
    left, right, weights = random_codes(*spans, 2 * kind.columns)
    a, b = left.as_strided(sizes[0], kind.left_strides), right.as_strided(sizes[1], kind.right_strides)
    a[0], a[-1], b[:, 0] = 127, -127, 127
    found = torch.full((kind.rows, kind.columns), -1, dtype=torch.int32, device="cpu")
    int_mm(a, b, out=found)
    weights = weights.view(-1, 2).double()
    return torch.equal(_times(found, weights), _times(a, _times(b, weights)))


def _times(matrix: Tensor, weights: Tensor) -> Tensor:
    """matrix @ weights (float64) of an integer matrix, a few rows at a time."""
    return torch.cat([rows.double() @ weights for rows in matrix.split(max(1, DOUBLES // matrix.shape[1]))])


proven = Proofs("torch's integer matrix product", Kind, _trial, "made in float64 there, slower")
