"""Blocks on a GPU: the torch side of luqrun.quant.kernels.cuda.block_loops, with the signatures of kernels.blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.kernels.blocks import counts, layout_of_scales, scales_of_tensor, stored_as
from luqrun.quant.kernels.cuda import block_loops as kernels
from luqrun.quant.kernels.cuda.launch import launch, native
from luqrun.quant.kernels.layout import empty, is_channels_last
from luqrun.quant.scale_formats import dtype_of, float32

TILE = 2048  # elements of a tile, or one block where that is larger
LARGEST = 4096  # elements of a block, at most: a tile has to fit in registers
CHOOSERS = 128  # blocks of a program that chooses scales, one a thread
JOINED = 1024  # bytes of a program that joins fields
FAR = 2**31 - 2**16  # elements up to which int32 holds the offsets of a tile, its end included


def quantizes_blocks(how: Encoding) -> bool:
    """Whether the kernels have this encoding: larger blocks are left to torch's operations."""
    high, wide = how.tile or (1, how.block)
    return triton.next_power_of_2(high) * triton.next_power_of_2(wide) <= LARGEST


def encode_blocks(
    x: Tensor,
    how: Encoding,
    grid: Sequence[int],
    block: tuple[int, int],
    maximum: Tensor,
    stream: Tensor,
    sample: int,
    dtype: torch.dtype,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels.blocks.encode_blocks."""
    x, form = native(x), how.form
    device, numel, many = x.device, x.numel(), math.prod(counts(grid, block))
    encode_scale = tensor_scale = None
    if how.scale_format == "e4m3":
        encode_scale, tensor_scale = scales_of_tensor(maximum.to(device), how)
    values = torch.empty_like(x, dtype=stored_as(dtype))
    scales = torch.empty(many, dtype=dtype_of(how.scale_format), device=device)
    fields = torch.empty(form.field_bytes(numel) if packed else 0, dtype=torch.uint8, device=device)
    if numel:
        last, stream, walk = is_channels_last(x), stream.to(device), _Walk(grid, block, numel)
        layout = (x.shape[2] * x.shape[3], x.shape[1]) if last else (1, 1)
        draws = "stochastic" in (how.rounding, how.underflow)
        above, constants = (encode_scale, tensor_scale), {**_constants(how), "LAST": last, "INDEX": walk.index}
        chosen = kept = None
        if how.range == "rms" or how.four_over_six or how.eden:
            chosen = torch.empty(many, dtype=torch.float32, device=device)
            kept = torch.empty_like(chosen) if how.eden else None
            of_draws = layout_of_scales(x, grid, block)[1:] if how.eden and last else layout
            choice = {"RMS": how.range == "rms", "COMPARED": how.four_over_six, "EDEN": how.eden}
            launch(
                kernels.choose_scales, triton.cdiv(many, CHOOSERS), x, chosen, kept, *above,
                stream if draws or how.eden else None, sample, *walk.sizes, *of_draws,
                **constants, **choice, **walk.block, BLOCKS=CHOOSERS,
            )  # fmt: skip
        paired = form.field_bits == 4 and walk.is_aligned(2)
        apart = packed and form.field_bits == 4 and not paired
        coded = torch.empty(numel, dtype=torch.uint8, device=device) if apart else fields
        shape = {"PAIRED": paired, "GROUPED": not last and walk.is_aligned(4), **walk.block, **walk.tile}
        launch(
            kernels.encode_blocks, walk.programs, x, values, coded if packed else None, scales, chosen, kept, *above,
            stream if draws else None, sample, *walk.sizes, *walk.steps, *layout,
            **constants, **shape, BITS=form.bits, REDRAWN=draws and how.four_over_six is not None, num_warps=walk.warps,
        )  # fmt: skip
        if apart:
            programs = triton.cdiv(fields.numel(), JOINED)
            launch(kernels.join_fields, programs, coded, fields, numel, fields.numel(), TILE=JOINED)
    if tensor_scale is None:
        return values.to(dtype), fields, scales, torch.full((), 1 / how.headroom, dtype=torch.float32, device=device)
    if how.headroom != 1:
        # By a tensor: torch would multiply a GPU's by the inverse of a number.
        tensor_scale = tensor_scale / torch.full_like(tensor_scale, how.headroom)
    return values.to(dtype), fields, scales, tensor_scale


def decode_blocks(
    fields: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    channels_last: bool,
    how: Encoding,
    grid: Sequence[int],
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """See kernels.blocks.decode_blocks."""
    values, form = empty(shape, channels_last, stored_as(dtype), fields.device), how.form
    if values.numel():
        walk = _Walk(grid, block, values.numel())
        launch(
            kernels.decode_blocks, walk.programs, fields, scales, values, *walk.sizes, *walk.steps,
            KIND=how.scale_format, UNIT=form.unit, FLOATING=form.floating, BITS=form.bits, FIELD_BITS=form.field_bits,
            PAIRED=form.field_bits == 4 and walk.is_aligned(2), **walk.block, **walk.tile, INDEX=walk.index,
            num_warps=walk.warps,
        )  # fmt: skip
    return values.to(dtype)


class _Walk:
    """How programs go through a grid: the numbers and constants of block_loops.

    sizes: bands, rows, between, columns, down, across. steps: tiles beside each other, and bytes of a line of pairs.
    """

    def __init__(self, grid: Sequence[int], block: tuple[int, int], numel: int):
        outer, rows, between, columns = map(int, grid)
        high, wide = min(block[0], rows), min(block[1], columns)
        # The same blocks with longer lines.
        if high == 1 and columns % wide == 0:
            outer, rows, between, columns = 1, 1, 1, numel
        elif wide == 1:
            between, columns = 1, between * columns
        down, across = triton.cdiv(rows, high), triton.cdiv(columns, wide)
        bands = outer * down * between
        self.lines = outer * rows * between
        self.sizes = bands, rows, between, columns, down, across
        self.block = {"A": high, "B": wide}
        power = triton.next_power_of_2
        room = max(1, TILE // (power(high) * power(wide)))
        count = min(power(across), room)
        each = min(power(bands), max(1, room // count))
        self.tile = {"BANDS": each, "HIGH": power(high), "COUNT": count, "WIDE": power(wide)}
        strips = triton.cdiv(across, count)
        self.steps = strips, triton.cdiv(columns, 2)
        self.programs = triton.cdiv(bands, each) * strips
        self.warps = min(8, max(1, math.prod(self.tile.values()) // 512))
        self.index = tl.int32 if numel <= FAR else tl.int64

    def is_aligned(self, elements: int) -> bool:
        """Whether every line of a tile is whole groups of so many elements, from the tensor's start on, but for what is
        left over at its end."""
        wide, columns = self.block["B"], self.sizes[3]
        starts = self.lines == 1 or columns % elements == 0
        return wide == self.tile["WIDE"] and starts and self.tile["COUNT"] * wide % elements == 0


@functools.cache
def _constants(how: Encoding) -> dict:
    form, (carry, shift) = how.form, how.exponent_rule
    return {
        "KIND": how.scale_format,
        "TOP": float32(how.top),
        "CARRY": carry,
        "SHIFT": shift,
        "UNIT": form.unit,
        "HEADROOM": float32(how.headroom),
        "LIMIT": float(form.limit),
        "FLOATING": form.floating,
        "ROUNDING": how.rounding,
        "UNDERFLOW": how.underflow,
    }
