"""Blocks on the CPU: the torch side of luqrun.quant.kernels.cpu.block_loops, with the signatures of kernels.blocks."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.kernels.blocks import counts, layout_of_scales, scales_of_tensor, stored_as
from luqrun.quant.kernels.cpu import block_loops, loops
from luqrun.quant.kernels.cpu.block_loops import PANEL
from luqrun.quant.kernels.cpu.block_scales import E4M3, E8M0, FP32
from luqrun.quant.kernels.cpu.block_sums import MAE, MSE
from luqrun.quant.kernels.cpu.memory import INT8, loadable
from luqrun.quant.kernels.cpu.rows import NEAREST, STOCHASTIC
from luqrun.quant.kernels.cpu.sizes import CHUNK, chunks
from luqrun.quant.kernels.layout import empty, is_channels_last, pixels_of
from luqrun.quant.kernels.philox import SCALE_SAMPLES
from luqrun.quant.scale_formats import dtype_of

KINDS = {"e8m0": E8M0, "e4m3": E4M3, "fp32": FP32}
COMPARED = {None: 0, "mse": MSE, "mae": MAE}
NO_MANTISSA = 64  # larger than any exponent: every spacing is 1


def quantizes_blocks(how: Encoding) -> bool:
    """Whether the loops have this encoding: blocks of powers of two are left to torch's operations."""
    return not how.form.logarithmic


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
    x, grid = loadable(x), tuple(map(int, grid))
    many = math.prod(counts(grid, block))
    encode_scale, tensor_scale = scales_of_tensor(maximum, how) if how.scale_format == "e4m3" else (_ONE, _ONE)
    stored = stored_as(dtype)
    values = torch.empty_like(x, dtype=stored)
    scales = torch.empty(many, dtype=dtype_of(how.scale_format), device="cpu")
    sizes, side = _merged(grid, block) if x.numel() else (grid, block)
    strip = min(max(1, PANEL // (side[0] * side[1]) // 2 * 2), -(-sizes[3] // side[1]))
    # Elements that lie beside each other in a byte are of one panel.
    pairs = how.form.field_bits == 4 and (sizes[3] % 2 == 0 or sizes[:3] == (1, 1, 1)) and side[1] * strip % 2 == 0
    pairs = pairs and (side[1] % 2 == 0 or sizes[3] % side[1] == 0)
    count = how.form.field_bytes(x.numel()) if pairs else x.numel()
    fields = torch.empty(count if packed else 0, dtype=torch.uint8, device="cpu")
    draws, first, second = how.rounding == "stochastic", _NONE, _NONE
    if draws and is_channels_last(x):
        first = words_of(x.numel(), pixels_of(x), stream, sample)
    if how.eden:
        second = words_of(many, layout_of_scales(x, grid, block), stream, SCALE_SAMPLES + sample)
    elif how.four_over_six and draws:
        second = words_of(x.numel(), pixels_of(x), stream, SCALE_SAMPLES + sample)
    if x.numel():
        numbers = patterns_of(*_numbers(how), encode_scale.item(), tensor_scale.item())
        drawn, names = (first.data_ptr(), second.data_ptr()), (stream.data_ptr(), sample)
        halves = int(x.dtype == torch.bfloat16), int(stored == torch.bfloat16)
        addresses = values.data_ptr(), halves[1], fields.data_ptr() if packed else 0, scales.data_ptr()
        each = max(1, CHUNK // (strip * side[0] * side[1]))
        panels = sizes[0] * -(-sizes[1] // side[0]) * sizes[2] * -(-sizes[3] // (side[1] * strip))
        block_loops.encode_blocks(
            -(-panels // each), x.numel(), x.numel(), x.data_ptr(), halves[0], *names, *addresses,
            *drawn, *sizes, *side, *_how(how), *numbers, strip, each, int(pairs),
        )  # fmt: skip
    fields = fields if pairs or not packed else _joined(fields, how.form)
    return values.to(dtype), fields, scales, (tensor_scale / how.headroom).clone()


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
    stored = stored_as(dtype)
    values = empty(shape, channels_last, stored, fields.device)
    if values.numel():
        sizes, side = _merged(tuple(map(int, grid)), block)
        flat = fields
        if how.form.field_bits == 4:
            flat = torch.empty(values.numel(), dtype=torch.uint8, device="cpu")
            count = flat.numel()
            loops.unpack(chunks(count), count, count, fields.data_ptr(), flat.data_ptr(), 0, *_FIELDS)
        half, table = int(stored == torch.bfloat16), _table(how.form)
        addresses = flat.data_ptr(), scales.data_ptr(), values.data_ptr(), half
        strip = min(max(1, PANEL // side[1]), -(-sizes[3] // side[1]))
        each = max(1, CHUNK // (strip * side[1]))
        panels = math.prod(sizes[:3]) * -(-sizes[3] // (side[1] * strip))
        block_loops.decode_blocks(
            -(-panels // each), values.numel(), *addresses, KINDS[how.scale_format], table.data_ptr(), *sizes, *side,
            *patterns_of(how.form.unit), strip, each,
        )  # fmt: skip
    return values.to(dtype)


_ONE = torch.ones((), device="cpu")
_NONE = torch.zeros(0, dtype=torch.int32, device="cpu")
_FIELDS = (4, 1, INT8, 0)  # loops' form of fields that are their own codes


def _merged(grid: tuple[int, ...], block: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The same blocks, none larger than the grid, in one with longer runs where blocks of one row straddle none."""
    block = min(block[0], grid[1]), min(block[1], grid[3])
    if block[0] == 1 and grid[3] % block[1] == 0:
        return (1, 1, 1, math.prod(grid)), block
    return grid, block


def words_of(count: int, layout: tuple[int, int, int], stream: Tensor, sample: int) -> Tensor:
    """Of so many elements in memory order (see block_loops.words); int32, with some room at the end."""
    out = torch.empty((count + 7) // 4 * 4, dtype=torch.int32, device="cpu")
    if count:
        (images, pixels, channels), names = layout, (stream.data_ptr(), sample)
        if images:
            block_loops.words_of_images(images, count, out.data_ptr(), *names, pixels, channels)
        else:
            block_loops.words(chunks(count), count, count, out.data_ptr(), *names)
    return out


def _joined(fields: Tensor, form: Format) -> Tensor:
    """Fields of a byte each as reference.pack has them."""
    if form.field_bits == 8:
        return fields
    packed = torch.empty(form.field_bytes(fields.numel()), dtype=torch.uint8, device="cpu")
    count = fields.numel()
    loops.pack(chunks(count), count, count, fields.data_ptr(), packed.data_ptr(), *_FIELDS)
    return packed


@functools.cache
def _table(form: Format) -> Tensor:
    """The code of each field, float32 (256,)."""
    fields = torch.arange(256, dtype=torch.int32, device="cpu") & (2**form.bits - 1)
    return form.from_fields(fields, torch.tensor(True)).float()


@functools.cache
def _how(how: Encoding) -> tuple[int, ...]:
    """The `how` of block_loops.encode_blocks."""
    form, (carry, shift) = how.form, how.exponent_rule
    rounding = STOCHASTIC if how.rounding == "stochastic" else NEAREST
    return (
        form.mantissa_bits or NO_MANTISSA,
        rounding,
        int(how.range == "rms"),
        KINDS[how.scale_format],
        carry,
        shift,
        COMPARED[how.four_over_six],
        int(how.eden),
        form.mantissa_bits,
        form.bits,
    )


@functools.cache
def _numbers(how: Encoding) -> tuple[float, ...]:
    """The first four `numbers` of block_loops.encode_blocks."""
    return how.form.limit, how.form.unit, how.top, how.headroom


def patterns_of(*numbers: float) -> tuple[int, ...]:
    """Their bits as float32, which is how a request holds them."""
    return struct.unpack(f"{len(numbers)}i", struct.pack(f"{len(numbers)}f", *numbers))
