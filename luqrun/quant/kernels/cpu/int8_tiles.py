"""Convolutions and linear layers on int8 codes by our own blocks of the VNNI instruction, without patches.

A convolution reads its taps where they lie: the taps of a line of the kernel are neighbours in a channels_last image.
Its input gradient is one convolution for each of the pixels that a stride tells apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from luqrun.quant.kernels.cpu.int8_direct import SHIFT
from luqrun.quant.kernels.cpu.int8_products import MOST_VIEWS, scratch
from luqrun.quant.kernels.cpu.sizes import COLUMNS, LANES

MOST_TERMS = (1 << 31) // (255 * 128)  # of a sum that int32 holds whatever the codes
MOST_TAPS = 1 << 12  # rows of a weight gradient: with more, what a thread sums up does not fit its cache
MOST_TOGETHER = 16  # groups that are multiplied as one, with zeros
FEWEST_PIXELS = 4  # of an image's output, of which a weight gradient takes four at a time
IMAGE_BYTES = 1 << 28  # that a task makes of an image, at most
SUM_BYTES = 1 << 26  # of the sums of all tasks of a weight gradient, at most
TASK_BYTES = 1 << 18  # of images that a thread reads over and over
# Where the sums of a weight gradient do not fit the cache beside them, of more images: they are passed over less often.
LARGE_SUM_BYTES, LARGE_TASK_BYTES = 1 << 20, 1 << 20
COPY = 32  # products that take as long as the copy of a byte
PRODUCTS = 32  # that take as long as an element of other loops

Pairs = Sequence[tuple[int, int]]


@functools.cache
def is_there() -> bool:
    """Whether numba compiles for a CPU that has AVX-512's VNNI."""
    from luqrun.internals.of_numba import compiled_for  # numba is loaded where it is needed

    return "+avx512vnni" in compiled_for()[1].split(",")


@functools.cache
def _loops() -> ModuleType:
    from luqrun.quant.kernels.cpu import tile_loops  # compiled code is loaded when it is first needed

    return tile_loops


@functools.cache
def weight_loops() -> ModuleType:
    """See _loops."""
    from luqrun.quant.kernels.cpu import weight_loops

    return weight_loops


def suits(a: Tensor, geometry: Pairs, out_size: tuple[int, int]) -> bool:
    """Whether a convolution of a can be made of blocks. geometry: kernel, stride, padding, dilation."""
    kernel, _, _, (_, apart) = geometry
    depth, padded = math.prod(kernel) * a.shape[1], _padded(geometry, out_size)
    fits = 0 < depth <= MOST_TERMS and math.prod(padded) * a.shape[1] <= IMAGE_BYTES
    return fits and (apart == 1 or kernel[1] == 1) and is_there()


def suits_dgrad(g: Tensor, geometry: Pairs, shape: tuple[int, ...]) -> bool:
    """Whether the gradient of an input of this shape can be."""
    kernel, _, _, dilation = geometry
    ends = zip(g.shape[2:], shape[2:], kernel, strict=True)
    padded = math.prod(size + of + 2 * taps for size, of, taps in ends)  # as an upper limit
    fits = math.prod(kernel) * g.shape[1] <= MOST_TERMS and padded * g.shape[1] <= IMAGE_BYTES
    return fits and dilation == (1, 1) and is_there()


def suits_wgrad(grads: Sequence[Tensor], a: Tensor, kernel: Sequence[int], groups: int = 1) -> bool:
    """Whether a weight gradient can be."""
    taps, (images, channels, height, width) = math.prod(kernel), grads[0].shape
    parts = _parts(groups, a.shape[1], channels)
    pixels, rows = height * width * len(grads), taps * a.shape[1] // parts
    if rows > MOST_TAPS or height * width < FEWEST_PIXELS or pixels > MOST_TERMS or not is_there():
        return False
    of_image = taps * _up(a.shape[1] // parts, LANES) * height * _up(width, 4)
    sums = _tasks(images, pixels) * parts * (rows + 1) * _up(channels // parts, LANES) * 4
    return of_image <= IMAGE_BYTES and sums <= SUM_BYTES


def suits_groups(groups: int, channels: int, out_channels: int) -> bool:
    """Whether convolutions of so many groups may be faster in blocks, in spite of the zeros between groups."""
    return is_there() and groups <= MOST_TOGETHER * _parts(groups, channels, out_channels)


@functools.lru_cache(MOST_VIEWS)
def _parts(groups: int, channels: int, out_channels: int) -> int:
    """How many convolutions side by side one of so many groups is made of: each of as few groups as fill vectors, with
    zeros between them; or one."""
    for together in range(1, min(groups, MOST_TOGETHER + 1)):
        parts = groups // together
        if groups % together == 0 and channels // parts % LANES == 0 and out_channels // parts % LANES == 0:
            return parts
    return 1


def _up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step


def _padded(geometry: Pairs, out_size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the input that a convolution to these pixels reads."""
    (lines, across), (down, beside), _, (apart, _) = geometry
    return (out_size[0] - 1) * down + apart * (lines - 1) + 1, (out_size[1] - 1) * beside + across


def _tasks(images: int, pixels: int) -> int:
    """Parts of a weight gradient, of so many pixels an image: one for each thread, or as many as int32 needs."""
    return min(images, max(torch.get_num_threads(), -(-images // (MOST_TERMS // pixels))))


def _images_a_task(images: int, image_bytes: int) -> int:
    threads = torch.get_num_threads()
    tasks = -(-images // max(1, min(TASK_BYTES // max(image_bytes, 1), -(-images // threads))))
    return max(1, -(-images // (-(-tasks // threads) * threads)))  # as many for each thread


def pack(weight: int, groups: int, parts: int, outputs: int, taps: Sequence[int], strides: Sequence[int]) -> Tensor:
    """See weight_loops.pack_weight. weight: an address; groups: of all parts."""
    of_part = groups // parts
    channels, depth = of_part * outputs, taps[0] * _up(taps[1] * of_part * taps[2], 4) // 4
    out = torch.empty(parts * _up(channels, LANES) * depth * 4, dtype=torch.int8, device="cpu")
    panels = parts * -(-channels // COLUMNS)
    weight_loops().pack_weight(panels, out.numel(), weight, out.data_ptr(), depth, of_part, outputs, *taps, *strides)
    return out


def _convolve(
    a: Tensor, weight: Tensor, scale: Tensor, signed: bool, out: Tensor, parts: int, *where: Sequence[int]
) -> None:
    """See tile_loops.convolve. where: padding, padded, source, taps, target."""
    (images, channels, height, width), (_, padded, _, taps, target) = a.shape, where
    address = a.data_ptr(), weight.data_ptr(), out.data_ptr()
    how, size = (int(out.dtype == torch.bfloat16), scale.data_ptr()), (images, height, width, channels)
    products = images * target[-2] * target[-1] * target[2] * taps[0] * taps[2] * channels // parts
    group = _images_a_task(images, padded[0] * padded[1] * channels)
    work, places = max(a.numel(), products // PRODUCTS), chain.from_iterable(where)
    tasks, shift = -(-images // group), SHIFT * signed
    _loops().convolve(tasks, work, *address, *how, shift, group, parts, *size, *places)


def conv(a: Tensor, matrix: Tensor, scale: Tensor, geometry: Pairs, signed: bool, out: Tensor, groups: int = 1) -> None:
    """Fill `out`, channels_last, as int8.conv says. a: channels_last; geometry: kernel, stride, padding, dilation."""
    (lines, across), stride, padding, (down, _) = geometry
    (_, channels, *_), (out_height, out_width) = a.shape, out.shape[2:]
    inputs, outputs, parts = channels // groups, out.shape[1] // groups, _parts(groups, channels, out.shape[1])
    element, column = matrix.stride()
    strides = across * inputs * element, inputs * element, element, column, outputs * column
    weight = pack(matrix.data_ptr(), groups, parts, outputs, (lines, across, inputs), strides)
    target = out_height, out_width, out.shape[1], 0, 0, 1, 1, out_height, out_width
    taps, source = (lines, down, across), (0, 0, *stride)
    _convolve(a, weight, scale, signed, out, parts, padding, _padded(geometry, out.shape[2:]), source, taps, target)


def conv_dgrad(g: Tensor, matrix: Tensor, scale: Tensor, geometry: Pairs, out: Tensor, groups: int = 1) -> None:
    """Fill `out`, channels_last, as int8.conv_dgrad says. g: channels_last; matrix: (K, R * S * C / groups),
    contiguous; geometry: kernel, stride, padding, dilation, which is 1."""
    (lines, across), (down, beside), (above, left), _ = geometry
    channels, (height, width) = out.shape[1], out.shape[2:]
    inputs, outputs, parts = g.shape[1] // groups, channels // groups, _parts(groups, g.shape[1], channels)
    upright = [_taps_of(first, lines, down, above, height) for first in range(min(down, height))]
    sideways = [_taps_of(first, across, beside, left, width) for first in range(min(beside, width))]
    if not all(count for count, *_ in (*upright, *sideways)):
        out.zero_()
    high, padded_height = _padding(upright)
    wide, padded_width = _padding(sideways)
    row = lines * across * outputs  # of the matrix
    for line, (runs, last_line, source_line, count_lines) in enumerate(upright):
        for column, (taps, last_tap, source_column, count_columns) in enumerate(sideways):
            if runs and taps:
                begin = matrix.data_ptr() + (last_line * across + last_tap) * outputs
                strides = -down * across * outputs, -beside * outputs, row, 1, inputs * row
                weight = pack(begin, groups, parts, outputs, (runs, taps, inputs), strides)
                source = source_line + high, source_column + wide, 1, 1
                target = height, width, channels, line, column, down, beside, count_lines, count_columns
                how = (high, wide), (padded_height, padded_width), source, (runs, 1, taps), target
                _convolve(g, weight, scale, True, out, parts, *how)


def _taps_of(first: int, kernel: int, stride: int, padding: int, size: int) -> tuple[int, int, int, int]:
    """Of the pixels first, first + stride, ... of the input, along one dimension: how many taps saw them, the last of
    these, the pixel of the gradient that this one gave the first of them, and how many they are."""
    taps = [tap for tap in range(kernel) if (first + padding - tap) % stride == 0]
    if not taps:
        return 0, 0, 0, 0
    return len(taps), taps[-1], (first + padding - taps[-1]) // stride, -(-(size - first) // stride)


def _padding(kinds: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """(padding before, padded size) of the gradient, for all that is read of it."""
    before = max([0, *(-source for taps, _, source, _ in kinds if taps)])
    return before, max([1, *(before + source + count - 1 + taps for taps, _, source, count in kinds if taps)])


def conv_wgrad(grads: Sequence[Tensor], a: Tensor, geometry: Pairs, groups: int = 1) -> Tensor:
    """See int8.conv_wgrad: float32 (K, R * S * C / groups). grads, a: channels_last; geometry: kernel, stride, padding,
    dilation."""
    (kernel, stride, _, dilation), (images, channels, height, width) = geometry, grads[0].shape
    parts, taps = _parts(groups, a.shape[1], channels), kernel[0] * kernel[1]
    inputs, outputs, of_part = a.shape[1] // groups, channels // groups, channels // parts
    rows, tasks = taps * a.shape[1] // parts, _tasks(images, height * width * len(grads))
    padded = _up(of_part, LANES)
    sums = scratch("weight gradients", tasks * parts * (rows + 1), padded, torch.int32)
    size, g_size = (images, a.shape[2], a.shape[3], a.shape[1]), (images, height, width, channels)
    limit = LARGE_TASK_BYTES if 4 * (rows + 1) * padded > LARGE_SUM_BYTES else TASK_BYTES
    work = max(a.numel(), images * height * width * rows * channels // PRODUCTS)
    by_lines = _prefers_lines(kernel, stride, dilation, height, width, of_part)
    for number, g in enumerate(grads):
        address = a.data_ptr(), g.data_ptr(), sums.data_ptr(), SHIFT
        how, places = (int(by_lines), tasks, limit, int(number > 0), parts), chain.from_iterable(geometry)
        _loops().convolve_for_weight(tasks, work, *address, *how, *size, *g_size, *places)
    out = torch.empty(channels, taps * inputs, dtype=torch.float32, device="cpu")
    split = parts, groups // parts, inputs, outputs, taps
    _loops().add_tasks(parts * padded // LANES, out.numel(), sums.data_ptr(), tasks, *split, out.data_ptr())
    return out


def _prefers_lines(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], height: int, width: int, channels: int
) -> bool:
    """Whether quads of lines, which may end with pixels that are none, take less time than those of whole images, of
    which each tap needs its own."""
    if stride[0] != 1:
        return False
    taps, pixels = kernel[0] * kernel[1], height * width
    of_lines, of_images = height * _up(width, 4), _up(pixels, 4)
    copied = of_lines * kernel[1] * (1 + dilation[0] * (kernel[0] - 1) / height), of_images * taps
    multiplied = of_lines * taps * channels, of_images * taps * channels
    return copied[0] * COPY + multiplied[0] <= copied[1] * COPY + multiplied[1]
