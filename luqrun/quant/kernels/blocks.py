"""Block-scaled quantization and Hadamard rotations in plain torch operations: the oracle of the other kernels.

All of it works in memory order: a *grid* (outer, rows, between, columns) says how the tensor's memory is read, its last
axis without gaps. A block of (a, b) is a rows of b columns; the last one of an axis may be short. Blocks of one axis
have a = 1 or b = 1. Scales are in the order (outer, blocks of rows, between, blocks of columns).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import pack as pack_fields
from luqrun.quant.formats import unpack as unpack_fields
from luqrun.quant.kernels.layout import dense, from_memory_order, in_memory_order, is_channels_last, pixels_of
from luqrun.quant.kernels.philox import SCALE_SAMPLES, random_words
from luqrun.quant.kernels.reference import float_magnitude, in_turn, log_magnitude, stochastic_round
from luqrun.quant.scale_formats import (
    draw_e4m3,
    e8m0_exponent,
    from_bytes,
    power_of_two,
    round_e4m3,
    to_bytes,
)

FLOAT32_MAX = torch.finfo(torch.float32).max
# The clip, in root mean squares, that minimises the error of e2m1 on a Gaussian (QuEST; FACTS 1.5).
RMS_CLIP = 2.92247856

Grid = Sequence[int]  # (outer, rows, between, columns)
Block = tuple[int, int]


def counts(grid: Grid, block: Block) -> tuple[int, int, int, int]:
    """How many blocks there are along each axis of the grid."""
    outer, rows, between, columns = grid
    return outer, -(-rows // block[0]), between, -(-columns // block[1])


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """What the kernels of a device write values as; torch makes other types of it."""
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


def encode_blocks(
    x: Tensor,
    how: Encoding,
    grid: Grid,
    block: Block,
    maximum: Tensor,
    stream: Tensor,
    sample: int,
    dtype: torch.dtype,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, fields, scales, tensor_scale) of x in blocks.

    values: codes times their block's scale as `dtype`, in x's shape and memory format: exact in bf16 and float32,
    unless the scales are fp32. fields: with `packed`, the codes as `reference.pack` has them, else empty. scales: flat,
    uint8 (e8m0, e4m3) or float32, in units of the format's own numbers. tensor_scale: 0-dim float32, which values are
    to be multiplied by. maximum: 0-dim float32, max|x|, read for e4m3 alone. stream, sample: see reference.encode; what
    the scales of eden draw, and the second coding of four over six, are samples from SCALE_SAMPLES on. A NaN or Inf
    makes its block's scale NaN (of e4m3, the tensor's), and codes 0.
    """
    x = dense(x.detach()).float()
    draws = finer_draws = None
    if "stochastic" in (how.rounding, how.underflow):
        draws = _draws(x, stream, sample, grid, block)
        finer_draws = _draws(x, stream, SCALE_SAMPLES + sample, grid, block) if how.four_over_six else None
    blocks = _gather(in_memory_order(x), grid, block)
    clip = _clip(blocks, how, grid, block)
    blocks = blocks * torch.tensor(how.headroom, dtype=torch.float32) if how.headroom != 1 else blocks
    if how.scale_format == "e4m3":
        stored, codes, tensor_scale = _with_tensor_scale(blocks, clip, how, maximum, draws, finer_draws)
        codes = _valid(codes, stored)
        if how.eden:
            words = _scale_draws(x, stream, SCALE_SAMPLES + sample, grid, block)
            stored = _corrected(blocks, codes, stored, tensor_scale, how, words)
        tensor_scale = tensor_scale / _number(how.headroom, x)
    else:
        stored = _scale(clip, how)
        codes = _valid(_codes(blocks / (stored * how.form.unit), how, draws), stored)
        tensor_scale = torch.full((), 1 / how.headroom, dtype=torch.float32, device=x.device)
    values = _scatter(codes * (stored * how.form.unit), x, grid, block)
    fields = torch.empty(0, dtype=torch.uint8, device=x.device)
    if packed:
        ordered = in_memory_order(_scatter(codes, x, grid, block)).reshape(-1)
        fields = pack_fields(how.form.to_fields(ordered), how.form.field_bits)
    return values.to(dtype), fields, to_bytes(stored.reshape(-1), how.scale_format), tensor_scale


def decode_blocks(
    fields: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    channels_last: bool,
    how: Encoding,
    grid: Grid,
    block: Block,
    dtype: torch.dtype,
) -> Tensor:
    """The values of encode_blocks again, from its fields and scales."""
    flat = unpack_fields(fields, how.form.field_bits, math.prod(shape))
    codes = how.form.from_fields(flat, torch.tensor(True, device=fields.device)).float()
    scale = from_bytes(scales, how.scale_format).view(counts(grid, block)) * how.form.unit
    like = from_memory_order(codes, shape, channels_last)
    return _scatter(_gather(codes, grid, block) * scale, like, grid, block).to(dtype)


def hadamard(x: Tensor, grid: Grid, axis: int, size: int, signs: Tensor | None) -> Tensor:
    """x, float32, with groups of `size` along an axis (1 or 3) of the grid rotated: (x * signs) H / sqrt(size).

    H: Sylvester's matrix of a power of two; signs: float32 (size,) of +-1, or None. What is left over at the end of
    the axis, fewer than `size` elements, is rotated in groups of half the size, and so on down to one element, which
    its sign alone is left for. Sums in the order of the fast transform, so that every backend gives the same bits.
    """
    x = dense(x.detach()).float()
    flat = in_memory_order(x).reshape(tuple(grid)).movedim(axis, -1)
    if signs is not None:
        flat = flat * signs.repeat(-(-flat.shape[-1] // size))[: flat.shape[-1]]
    rotated, rest = [], flat
    while rest.shape[-1]:
        whole = rest.shape[-1] // size * size
        rotated.append(_rotate(rest[..., :whole], size))
        rest, size = rest[..., whole:], size // 2
    flat = torch.cat(rotated, -1) if rotated else flat
    return from_memory_order(flat.movedim(-1, axis).reshape(-1), x.shape, is_channels_last(x))


def _rotate(x: Tensor, size: int) -> Tensor:
    """Groups of `size` along the last axis of x, which they fill, without signs."""
    groups, span = x.unflatten(-1, (x.shape[-1] // size, size)), 1
    while span < size:
        pairs = groups.unflatten(-1, (size // (2 * span), 2, span))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        groups = torch.stack([first + second, first - second], -2).flatten(-3)
        span *= 2
    return groups.flatten(-2) * torch.tensor(size**-0.5, dtype=torch.float32)


def signs(stream: Tensor, size: int) -> Tensor:
    """float32 (size,) of +-1: the lowest bits of the random words of a draw's first sample."""
    return (random_words(stream, 0, size) & 1).float() * 2 - 1


def _draws(x: Tensor, stream: Tensor, sample: int, grid: Grid, block: Block) -> Tensor:
    """The random words of x's elements, numbered in row-major order, in blocks."""
    words = random_words(stream.to(x.device), sample, x.numel()).view(x.shape)
    words = words.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else words
    return _gather(in_memory_order(words), grid, block)


def layout_of_scales(x: Tensor, grid: Grid, block: Block) -> tuple[int, int, int]:
    """(images, pixels, channels) as which the scales of a channels_last x lie in memory; zeros of a contiguous x, whose
    scales lie in the order in which their draws are numbered."""
    images, pixels, _ = pixels_of(x)
    if images == 0:
        return 0, 0, 0
    many = counts(grid, block)
    images = images if grid[1] == 1 else many[0] * many[1]
    return images, pixels, math.prod(many) // max(images * pixels, 1)


def _scale_draws(x: Tensor, stream: Tensor, sample: int, grid: Grid, block: Block) -> Tensor:
    """The random words of x's scales."""
    many = counts(grid, block)
    words = random_words(stream.to(x.device), sample, math.prod(many))
    images, pixels, channels = layout_of_scales(x, grid, block)
    words = words.view(images, channels, pixels).transpose(1, 2) if images else words
    return words.reshape(many)


def _gather(x: Tensor, grid: Grid, block: Block) -> Tensor:
    """x, in memory order, as (elements of a block, *counts(grid, block)); short blocks are filled up with zeros."""
    (outer, rows, between, columns), (high, wide) = grid, block
    _, down, _, across = counts(grid, block)
    x = F.pad(x.reshape(outer, rows, between, columns), (0, across * wide - columns, 0, 0, 0, down * high - rows))
    x = x.view(outer, down, high, between, across, wide)
    return x.permute(2, 5, 0, 1, 3, 4).reshape(high * wide, outer, down, between, across)


def _scatter(blocks: Tensor, like: Tensor, grid: Grid, block: Block) -> Tensor:
    """The inverse of `_gather`, in the shape and memory format of `like`."""
    (_, rows, _, columns), (high, wide) = grid, block
    _, outer, down, between, across = blocks.shape
    x = blocks.view(high, wide, outer, down, between, across).permute(2, 3, 0, 4, 5, 1)
    x = x.reshape(outer, down * high, between, across * wide)[:, :rows, :, :columns]
    return from_memory_order(x.reshape(-1), like.shape, is_channels_last(like))


def _number(value: float, like: Tensor) -> Tensor:
    """0-dim float32 to divide by: a GPU would multiply by the inverse of a number that the host holds."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _clip(blocks: Tensor, how: Encoding, grid: Grid, block: Block) -> Tensor:
    """The end of each block's range; NaN where an element is not finite."""
    maximum = blocks.abs().amax(0) if blocks.numel() else blocks.new_zeros(blocks.shape[1:])
    clip = maximum
    if how.range == "rms":
        ones = _gather(torch.ones(math.prod(grid), device=blocks.device), grid, block)
        count = ones.sum(0, dtype=torch.float64)
        squares = in_turn(blocks.double() * blocks.double())
        clip = (RMS_CLIP * (squares / count).sqrt()).float()
    return torch.where(maximum.isfinite() & clip.isfinite(), clip, torch.nan)


def _scale(clip: Tensor, how: Encoding) -> Tensor:
    """The scales of blocks that have no scale of the tensor on top: values are multiples of them."""
    if how.scale_format == "fp32":
        return clip / _number(how.top, clip)
    known = clip.isfinite()
    exponent = e8m0_exponent(torch.where(known, clip, 0.0), how.exponent_rule)
    return torch.where(known, power_of_two(exponent), torch.nan)


def _codes(ratio: Tensor, how: Encoding, draws: Tensor | None) -> Tensor:
    """Codes, as float32, of elements in units of the smallest level; those that are not finite are any."""
    form = how.form
    magnitude = torch.where(ratio.isnan(), 0.0, ratio.abs()).clamp(max=form.limit)
    if form.mantissa_bits:
        magnitude = float_magnitude(magnitude, form, how.rounding, draws)
    elif form.logarithmic:
        magnitude = log_magnitude(magnitude, how, draws)
    elif how.rounding == "nearest":
        magnitude = magnitude.round()
    else:
        magnitude = stochastic_round(magnitude, draws)
    return torch.where(ratio < 0, -magnitude, magnitude)


def _valid(codes: Tensor, stored: Tensor) -> Tensor:
    """Codes, but 0 where the block's scale is NaN or 0."""
    return torch.where(stored.isfinite() & (stored > 0), codes, 0.0)


def _with_tensor_scale(
    blocks: Tensor, clip: Tensor, how: Encoding, maximum: Tensor, draws: Tensor | None, finer_draws: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 scales, codes, float32 scale of the tensor): FACTS 2.1, and with four over six 2.5."""
    encode_scale, tensor_scale = scales_of_tensor(maximum, how)
    wanted = clip / _number(how.top, clip) * encode_scale
    stored = round_e4m3(wanted)
    codes = _codes(blocks * _factor(stored, tensor_scale) / how.form.unit, how, draws)
    if how.four_over_six is None:
        return stored, codes, tensor_scale
    finer = round_e4m3(wanted * 1.5)
    others = _codes(blocks * _factor(finer, tensor_scale) / how.form.unit, how, finer_draws)
    better = _error(blocks, others, finer, tensor_scale, how) < _error(blocks, codes, stored, tensor_scale, how)
    return torch.where(better, finer, stored), torch.where(better, others, codes), tensor_scale


def scales_of_tensor(maximum: Tensor, how: Encoding) -> tuple[Tensor, Tensor]:
    """(what blocks' scales are multiplied by to reach e4m3's range, its inverse): 0-dim float32, of 0-dim max|x|."""
    encode_scale = torch.tensor(how.top, dtype=torch.float32) * how.scale_limit / maximum
    encode_scale = torch.where(maximum > 0, encode_scale.clamp(max=FLOAT32_MAX), torch.ones_like(maximum))
    encode_scale = torch.where(maximum.isfinite(), encode_scale, torch.nan)
    return encode_scale, 1 / encode_scale


def _factor(stored: Tensor, tensor_scale: Tensor) -> Tensor:
    """What a block is multiplied by: 0 for a scale of 0."""
    return torch.where(stored > 0, (1 / (stored * tensor_scale)).clamp(max=FLOAT32_MAX), torch.zeros_like(stored))


def _decoded(codes: Tensor, stored: Tensor, tensor_scale: Tensor, how: Encoding) -> Tensor:
    return codes * (stored * how.form.unit) * tensor_scale


def _error(blocks: Tensor, codes: Tensor, stored: Tensor, tensor_scale: Tensor, how: Encoding) -> Tensor:
    difference = (_decoded(codes, stored, tensor_scale, how) - blocks).double()
    return in_turn(difference * difference if how.four_over_six == "mse" else difference.abs())


def _corrected(
    blocks: Tensor, codes: Tensor, stored: Tensor, tensor_scale: Tensor, how: Encoding, words: Tensor
) -> Tensor:
    """EDEN's scales: times <x, x> / <x, Q(x)> of the block, drawn."""
    decoded, exact = _decoded(codes, stored, tensor_scale, how).double(), blocks.double()
    across = in_turn(exact * decoded)
    factor = torch.where(across > 0, in_turn(exact * exact) / across, torch.ones_like(across)).float()
    return draw_e4m3(factor * stored, words)
