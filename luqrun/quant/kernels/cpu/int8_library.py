"""Convolutions on int8 codes by the units of libraries: torch's integer product of patches, oneDNN's convolution.

The patches (im2col) are made a few images' rows at a time, so that they stay in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.quant.kernels.cpu import int8_direct
from luqrun.quant.kernels.cpu.int8_direct import SHIFT, has_amx
from luqrun.quant.kernels.cpu.int8_products import MOST_VIEWS, multiply, scratch
from luqrun.quant.kernels.cpu.proofs import Proofs, random_codes
from luqrun.quant.kernels.cpu.sizes import CHUNK, chunks
from luqrun.quant.kernels.layout import empty, in_channels_last

CHUNK_BYTES = 1 << 22  # of patches at a time
PRODUCT_BYTES = 1 << 20  # of products at a time
# From where a convolution without patches is faster in spite of its preparations: bytes of patches, and with AMX, where
# preparing the weight takes longest, pixels of the output for each channel of it.
DIRECT_BYTES, DIRECT_PIXELS = 1 << 22, 56
NARROW = 32  # channels of a gradient up to which making patches of the activation is what a weight gradient costs
CHUNK_ROWS = 1 << 17  # a sum of so many products of two int8 codes stays in int32


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@functools.cache
def _loops() -> ModuleType:
    from luqrun.quant.kernels.cpu import loops  # compiled code is loaded when it is first needed

    return loops


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of int8 matrices, in scratch memory: int32."""
    return multiply(a, b, scratch("products", a.shape[0], b.shape[1], torch.int32))


def _rescale(sums: Tensor, scale: Tensor, address: int, dtype: torch.dtype) -> None:
    """The numbers at `address`, float32 or bf16, <- int32 sums * scale in one pass, where torch makes two copies."""
    assert dtype in (torch.float32, torch.bfloat16)
    count, half = sums.numel(), int(dtype == torch.bfloat16)
    _loops().rescale(chunks(count), count, count, sums.data_ptr(), address, half, scale.data_ptr(), 0)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C), without a copy of what is channels_last."""
    images, channels, height, width = x.shape
    return in_channels_last(x).permute(0, 2, 3, 1).reshape(images * height * width, channels)  # -1 would not do without


class Patches(NamedTuple):
    """The im2col matrix of a (N, C, H, W) int8, a block of its rows at a time. blocks: (first output line, lines)."""

    size: tuple[int, int, int, int]  # (N, H, W, C)
    out_size: tuple[int, int]
    geometry: tuple[tuple[int, int], ...]  # kernel, stride, padding, dilation
    depth: int  # R * S * C
    pointwise: bool
    blocks: tuple[tuple[int, int], ...]

    def rows(self) -> int:
        """Of the whole matrix: the pixels of the output, of all images."""
        return self.size[0] * math.prod(self.out_size)

    def bytes(self) -> int:
        """The size of the whole matrix; 0 for a pointwise convolution, which needs none."""
        return 0 if self.pointwise else self.rows() * self.depth

    def of(self, a: Tensor, name: str = "patches") -> Iterator[tuple[int, Tensor]]:
        """(first row, int8 (rows, depth)) of each block, which lies in the scratch memory `name`."""
        if not self.blocks:
            return
        line = self.out_size[1]
        a = _pixels(a) if self.pointwise else in_channels_last(a)
        for first, lines in self.blocks:
            if self.pointwise:
                block = a[first * line : (first + lines) * line]
            else:
                block = scratch(name, lines * line, self.depth, torch.int8)
                addresses, places = (block.data_ptr(), a.data_ptr()), (each for part in self.geometry for each in part)
                _loops().patches(lines, block.numel(), *addresses, first, *self.size, *self.out_size, *places)
            yield first * line, block


@functools.lru_cache(MOST_VIEWS)
def patches_of(shape: Sequence[int], geometry: tuple, columns: int, chunk_bytes: int, product_bytes: int) -> Patches:
    """Those of an int8 of this shape. columns: how many products each row gets, where these should fit the cache too;
    the rest: what a block may take."""
    images, channels, height, width = shape
    kernel, stride, padding, dilation = geometry
    ends = zip((height, width), kernel, stride, padding, dilation, strict=True)
    out_height, out_width = (out_size(*end) for end in ends)
    depth, lines, line = kernel[0] * kernel[1] * channels, images * out_height, max(out_width, 1)
    blocks = []
    if lines and depth:
        step = min(chunk_bytes // (line * depth), CHUNK_ROWS // line)
        if columns:
            step = min(step, product_bytes // (4 * line * columns))
        step = max(1, step)
        step = -(-lines // -(-lines // step))  # as many blocks, of one size
        blocks = [(first, min(step, lines - first)) for first in range(0, lines, step)]
    pointwise = geometry == ((1, 1), (1, 1), (0, 0), (1, 1))
    return Patches((images, height, width, channels), (out_height, out_width), geometry, depth, pointwise, (*blocks,))


def prefers_direct(patches: Patches, channels: int) -> bool:
    """Whether a convolution to so many channels is faster without these patches."""
    if has_amx():
        return patches.bytes() > 0 and channels > 0 and patches.rows() >= DIRECT_PIXELS * channels
    return patches.bytes() > DIRECT_BYTES


def conv(a: Tensor, matrix: Tensor, scale: Tensor, geometry: Sequence, dtype: torch.dtype, signed: Tensor) -> Tensor:
    """See int8.conv: channels_last. geometry: kernel, stride, padding, dilation."""
    channels = matrix.shape[1]
    patches = patches_of(a.shape, geometry, channels, CHUNK_BYTES, PRODUCT_BYTES)
    out = empty((a.shape[0], channels, *patches.out_size), True, dtype, a.device)
    if patches.depth == 0:
        out.zero_()
    direct = prefers_direct(patches, channels) and has_direct_conv()
    if not (direct and _conv_directly(a, matrix, scale, patches, signed.item(), out)):
        for row, block in patches.of(a):
            _rescale(_multiply(block, matrix), scale, out.data_ptr() + row * channels * dtype.itemsize, dtype)
    return out


def _conv_directly(a: Tensor, matrix: Tensor, scale: Tensor, patches: Patches, signed: bool, out: Tensor) -> bool:
    """Fill `out`, channels_last, as `conv` says, by oneDNN's convolution; or return False where that is not exact."""
    (_, height, width, channels), (kernel, stride, padding, _) = patches.size, patches.geometry
    largest = int8_direct.suits(matrix, patches.geometry, signed)
    if not largest or not out.numel():
        return False
    blocks = int8_direct.blocks(a.shape, patches.out_size, matrix.shape[1], patches.geometry, largest)
    if not all(proven_direct(*kind) for _, kind in blocks):
        return False
    shift, half = SHIFT * signed, int(out.dtype == torch.bfloat16)
    if shift:
        shifts = matrix.sum(0, dtype=torch.int32).mul_(shift).float()
    else:
        shifts = torch.zeros(matrix.shape[1], dtype=torch.float32, device="cpu")
    packed, a, to = int8_direct.pack(matrix, kernel, stride), in_channels_last(a), out.data_ptr()
    for first, kind in blocks:
        size = kind.images, kind.height, kind.width, channels
        padded = scratch("padded", kind.images * kind.height, kind.width * channels, torch.uint8)
        address = padded.data_ptr(), a.data_ptr() + first * height * width * channels
        ends = kind.images, height, width, channels, *padding, *size[1:3]
        _loops().pad(kind.images * kind.height, padded.numel(), *address, shift, *ends)
        sums = int8_direct.convolve(padded.view(size), packed, kind)
        count, wide, address = sums.numel(), sums.shape[1], (sums.data_ptr(), shifts.data_ptr())
        tasks = -(-sums.shape[0] // max(CHUNK // wide, 1))
        _loops().rescale_shifted(tasks, count, count, *address, wide, to, half, scale.data_ptr())
        to += sums.numel() * out.element_size()
    return True


def _trial(kind: int8_direct.Kind) -> bool:
    """Whether oneDNN's convolution of random codes of the whole range, and of the largest, is that of their patches."""
    size = kind.images, kind.height, kind.width, kind.channels
    depth, largest = math.prod(kind.kernel) * kind.channels, min(kind.largest, 127)
    (codes,) = random_codes(math.prod(size))
    codes[: len(codes) // 4] = 127
    generator, shape = torch.Generator("cpu").manual_seed(1), (depth, kind.out_channels)
    matrix = torch.randint(-kind.largest, largest + 1, shape, dtype=torch.int8, generator=generator, device="cpu")
    matrix[:, 0], matrix[:, -1] = largest, -kind.largest
    unsigned = (codes.view(torch.uint8) ^ SHIFT).view(size)
    found = int8_direct.convolve(unsigned, int8_direct.pack(matrix, kind.kernel, kind.stride), kind)
    geometry = kind.kernel, kind.stride, (0, 0), (1, 1)
    images = codes.view(size).permute(0, 3, 1, 2)
    patches = patches_of(images.shape, geometry, kind.out_channels, CHUNK_BYTES, PRODUCT_BYTES)
    shifts = matrix.sum(0, dtype=torch.int32) * SHIFT
    return all(
        torch.equal((_multiply(block, matrix) + shifts).float(), found[row : row + len(block)])
        for row, block in patches.of(images)
    )


proven_direct = Proofs("oneDNN's int8 convolution", int8_direct.Kind, _trial, "made of patches there, slower")


@functools.cache
def has_direct_conv() -> bool:
    """Whether this torch has oneDNN's int8 convolution, which nobody promised, and it does a usual one exactly. What
    else it can do is found out when it is needed."""
    try:
        return _trial(int8_direct.Kind(2, 10, 10, 16, 16, (3, 3), (1, 1), 7, torch.get_num_threads()))
    except (AttributeError, RuntimeError, TypeError):
        return False


def conv_dgrad(
    g: Tensor, matrix: Tensor, scale: Tensor, shape: Sequence[int], geometry: Sequence, dtype: torch.dtype
) -> Tensor:
    """See int8.conv_dgrad: channels_last."""
    (images, channels, height, width), out_size = shape, tuple(g.shape[2:])
    out = empty(shape, True, dtype, g.device)
    rows, pixels, image = _pixels(g), out_size[0] * out_size[1], height * width * channels
    step = max(1, PRODUCT_BYTES // max(4 * pixels * matrix.shape[1], 1))  # images whose products stay in the cache
    for first in range(0, images, step):
        count = min(step, images - first)
        products = _multiply(rows[first * pixels : (first + count) * pixels], matrix)
        sums = scratch("patches", count * height * width, channels, torch.int32)
        address, size = (sums.data_ptr(), products.data_ptr()), (count, height, width, channels)
        places = (each for part in geometry for each in part)
        _loops().fold(count * height, sums.numel(), *address, *out_size, *size, *places)
        _rescale(sums, scale, out.data_ptr() + first * image * dtype.itemsize, dtype)
    return out


def _products(grads: Sequence[Tensor], a: Tensor, geometry) -> Iterator[Tensor]:
    """What sums to the weight gradient: int32 (K, R * S * C) of each block of patches and each g."""
    patches = patches_of(a.shape, geometry, 0, CHUNK_BYTES, PRODUCT_BYTES)
    flat = [_pixels(g) for g in grads]
    for row, block in patches.of(a):
        for g in flat:
            yield multiply(g[row : row + len(block)].t(), block)


def _products_by_lines(grads: Sequence[Tensor], a: Tensor, geometry) -> Iterator[Tensor]:
    """As _products, of a's patches by a line of the kernel and g's by a column: to each pixel of a belong, for all
    lines of the kernel, as many of g. The products are wider."""
    (lines, columns), (_, step), (above, beside), (down, across) = geometry
    channels, depth = grads[0].shape[1], columns * a.shape[1]
    memory = CHUNK_BYTES * depth // (depth + lines * channels), PRODUCT_BYTES  # the rest is g's
    of_a = patches_of(a.shape, ((1, columns), (1, step), (0, beside), (1, across)), 0, *memory)
    upright = (lines, 1), (1, 1), (down * (lines - 1) - above, 0), (down, 1)
    of_g = patches_of(grads[0].shape, upright, 0, *memory)._replace(blocks=of_a.blocks)
    others = [of_g.of(g, "upright patches") for g in grads]
    for _, block in of_a.of(a):
        for other in others:
            product = multiply(next(other)[1].t(), block).view(lines, channels, depth)
            yield product.flip(0).transpose(0, 1).reshape(channels, -1)


def conv_wgrad(grads: Sequence[Tensor], a: Tensor, geometry: Sequence) -> Tensor:
    """See int8.conv_wgrad: (K, R * S * C)."""
    (kernel, stride, *_), (images, channels, height, width) = geometry, grads[0].shape
    smaller = kernel[1] * a.shape[1] + kernel[0] * channels * len(grads) < kernel[0] * kernel[1] * a.shape[1]
    by_lines = channels <= NARROW and stride[0] == 1 and smaller
    products = (_products_by_lines if by_lines else _products)(grads, a, geometry)
    size = channels, kernel[0] * kernel[1] * a.shape[1]
    return _total(products, images * height * width * len(grads), *size)


def linear_wgrad(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """See int8.linear_wgrad, of matrices."""
    rows, depth = a.shape
    parts = [slice(first, first + CHUNK_ROWS) for first in range(0, rows, CHUNK_ROWS)]
    products = (multiply(g[part].t(), a[part]) for part in parts for g in grads)
    return _total(products, rows * len(grads), grads[0].shape[1], depth)


def _total(products: Iterator[Tensor], terms: int, rows: int, columns: int) -> Tensor:
    """The sum of int32 (rows, columns), float32. terms: of each sum, in all of them."""
    total = None
    for product in products:
        if total is None:
            total = product if terms <= CHUNK_ROWS else product.long()  # mostly int32 holds the whole
        else:
            total += product
    if total is None:
        total = torch.zeros(rows, columns, dtype=torch.int32, device="cpu")
    return total.float()
