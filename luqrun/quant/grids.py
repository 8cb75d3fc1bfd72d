"""Along which axis of a tensor blocks lie: as *lines* and *grids* over its memory (see luqrun.quant.kernels.blocks)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from luqrun.errors import UserError
from luqrun.quant.encoding import Encoding


class Lines(NamedTuple):
    """Memory read as (outer, length, inner): the middle axis is the one that blocks, or a rotation, lie along."""

    outer: int
    length: int
    inner: int

    @classmethod
    def along(cls, shape: Sequence[int], axis: int) -> Lines:
        """Those of a contiguous tensor of this shape."""
        return cls(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    @property
    def grid(self) -> tuple[int, int, int, int]:
        outer, length, inner = self
        return (outer, 1, 1, length) if inner == 1 else (outer, length, 1, inner)

    @property
    def axis(self) -> int:
        """Which axis of `grid` they are."""
        return 3 if self.inner == 1 else 1


class Grid(NamedTuple):
    """A grid and the block in it."""

    sizes: tuple[int, int, int, int]
    block: tuple[int, int]


def grid_of(how: Encoding, lines: Lines) -> Grid:
    """Where the blocks of an encoding lie along `lines`."""
    return Grid(lines.grid, (1, how.block) if lines.axis == 3 else (how.block, 1))


def grid_of_axis(how: Encoding, shape: Sequence[int], axis: int) -> tuple[Grid, tuple[int, ...]]:
    """The grid of a contiguous tensor with blocks along an axis, or tiles over the last two; and the shape of its
    scales. UserError for an axis that is not there."""
    dims = len(shape)
    if how.tile is not None:
        if dims < 2:
            raise UserError(f"block={list(how.tile)} is a tile of two axes, and the tensor has {dims}")
        rows, columns = shape[-2:]
        grid = Grid((math.prod(shape[:-2]), rows, 1, columns), how.tile)
        return grid, (*shape[:-2], -(-rows // how.tile[0]), -(-columns // how.tile[1]))
    if not -dims <= axis < dims:
        raise UserError(f"axis={axis} is out of range for a tensor of {dims} dimension(s)")
    axis %= dims
    scales = (*shape[:axis], -(-shape[axis] // how.block), *shape[axis + 1 :])
    return grid_of(how, Lines.along(shape, axis)), scales


def expanded(scales: Tensor, grid: Grid) -> Tensor:
    """The scales of a grid's blocks, in their order, for each of its elements: flat, in memory order."""
    (outer, rows, between, columns), (high, wide) = grid
    scales = scales.reshape(outer, -(-rows // high), between, -(-columns // wide))
    scales = scales.repeat_interleave(high, 1)[:, :rows].repeat_interleave(wide, 3)[..., :columns]
    return scales.reshape(-1)
