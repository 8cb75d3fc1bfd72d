"""Convolutions and linear layers on int8 codes by our own blocks of the VNNI instruction, without patches.

A convolution reads its taps where they lie: the taps of a line of the kernel are neighbours in a channels_last image.
Its input gradient is one convolution for each of the pixels that a stride tells apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.quant.kernels.cpu.int8_direct import SHIFT
from luqrun.quant.kernels.cpu.int8_products import scratch
from luqrun.quant.kernels.cpu.sizes import COLUMNS, LANES

MOST_TERMS = (1 << 31) // (255 * 128)  # of a sum that int32 holds whatever the codes
MOST_TAPS = 1 << 12  # rows of a weight gradient: with more, what a thread sums up does not fit its cache
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


def suits_wgrad(grads: Sequence[Tensor], a: Tensor, kernel: Sequence[int]) -> bool:
    """Whether a weight gradient can be."""
    taps, (images, channels, height, width) = math.prod(kernel), grads[0].shape
    pixels, rows = height * width * len(grads), taps * a.shape[1]
    if rows > MOST_TAPS or height * width < FEWEST_PIXELS or pixels > MOST_TERMS or not is_there():
        return False
    of_image = taps * _up(a.shape[1], LANES) * height * _up(width, 4)
    sums = _tasks(images, pixels) * (rows + 1) * _up(channels, LANES) * 4
    return of_image <= IMAGE_BYTES and sums <= SUM_BYTES


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


def _pack(weight: int, channels: int, taps: tuple[int, int, int], strides: tuple[int, int, int, int]) -> Tensor:
    """See tile_loops.pack_weight. weight: an address."""
    from luqrun.quant.kernels.cpu import tile_loops  # compiled code is loaded when it is first needed

    depth = taps[0] * _up(taps[1] * taps[2], 4) // 4
    out = torch.empty(_up(channels, LANES) * depth * 4, dtype=torch.int8, device="cpu")
    panels = -(-channels // COLUMNS)
    tile_loops.pack_weight(panels, out.numel(), weight, out.data_ptr(), channels, depth, *taps, *strides)
    return out


def _convolve(a: Tensor, weight: Tensor, scale: Tensor, signed: bool, out: Tensor, *where: Sequence[int]) -> None:
    """See tile_loops.convolve. where: padding, padded, source, taps, target."""
    from luqrun.quant.kernels.cpu import tile_loops

    (images, channels, height, width), (_, padded, _, taps, target) = a.shape, where
    address = a.data_ptr(), weight.data_ptr(), out.data_ptr()
    how, size = (int(out.dtype == torch.bfloat16), scale.data_ptr(), SHIFT * signed), (images, height, width, channels)
    products = images * target[-2] * target[-1] * target[2] * taps[0] * taps[2]
    group = _images_a_task(images, padded[0] * padded[1] * channels)
    work, places = max(a.numel(), products // PRODUCTS), (each for part in where for each in part)
    tile_loops.convolve(-(-images // group), work, *address, *how, group, *size, *places)


def conv(a: Tensor, matrix: Tensor, scale: Tensor, geometry: Pairs, signed: bool, out: Tensor) -> None:
    """Fill `out`, channels_last, as int8.conv says. a: channels_last; geometry: kernel, stride, padding, dilation."""
    (lines, across), stride, padding, (down, _) = geometry
    (_, channels, *_), (out_height, out_width) = a.shape, out.shape[2:]
    element, column = matrix.stride()
    strides = across * channels * element, channels * element, element, column
    weight = _pack(matrix.data_ptr(), out.shape[1], (lines, across, channels), strides)
    target = out_height, out_width, out.shape[1], 0, 0, 1, 1, out_height, out_width
    taps = lines, down, across * channels
    _convolve(a, weight, scale, signed, out, padding, _padded(geometry, out.shape[2:]), (0, 0, *stride), taps, target)


def conv_dgrad(g: Tensor, matrix: Tensor, scale: Tensor, geometry: Pairs, out: Tensor) -> None:
    """Fill `out`, channels_last, as int8.conv_dgrad says. g: channels_last; matrix: (K, R * S * C), contiguous;
    geometry: kernel, stride, padding, dilation, which is 1."""
    (lines, across), (down, beside), (above, left), _ = geometry
    channels, (height, width) = out.shape[1], out.shape[2:]
    upright = [_taps_of(first, lines, down, above, height) for first in range(min(down, height))]
    sideways = [_taps_of(first, across, beside, left, width) for first in range(min(beside, width))]
    if not all(count for count, *_ in (*upright, *sideways)):
        out.zero_()
    high, padded_height = _padding(upright)
    wide, padded_width = _padding(sideways)
    for line, (runs, last_line, source_line, count_lines) in enumerate(upright):
        for column, (taps, last_tap, source_column, count_columns) in enumerate(sideways):
            if runs and taps:
                begin = matrix.data_ptr() + (last_line * across + last_tap) * channels
                strides = -down * across * channels, -beside * channels, lines * across * channels, 1
                weight = _pack(begin, channels, (runs, taps, g.shape[1]), strides)
                source = source_line + high, source_column + wide, 1, 1
                target = height, width, channels, line, column, down, beside, count_lines, count_columns
                how = (high, wide), (padded_height, padded_width), source, (runs, 1, taps * g.shape[1]), target
                _convolve(g, weight, scale, True, out, *how)


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


def conv_wgrad(grads: Sequence[Tensor], a: Tensor, geometry: Pairs) -> Tensor:
    """See int8.conv_wgrad: float32 (K, R * S * C). grads, a: channels_last; geometry: kernel, stride, padding,
    dilation."""
    from luqrun.quant.kernels.cpu import tile_loops

    (kernel, stride, _, dilation), (images, channels, height, width) = geometry, grads[0].shape
    inputs, taps = a.shape[1], kernel[0] * kernel[1] * a.shape[1]
    tasks = _tasks(images, height * width * len(grads))
    padded = _up(channels, LANES)
    sums = scratch("weight gradients", tasks * (taps + 1), padded, torch.int32)
    size, g_size = (images, a.shape[2], a.shape[3], inputs), (images, height, width, channels)
    limit = LARGE_TASK_BYTES if 4 * (taps + 1) * padded > LARGE_SUM_BYTES else TASK_BYTES
    work = max(a.numel(), images * height * width * taps * channels // PRODUCTS)
    by_lines = _prefers_lines(kernel, stride, dilation, height, width, channels)
    for number, g in enumerate(grads):
        address, how = (a.data_ptr(), g.data_ptr(), sums.data_ptr()), (int(by_lines), tasks, limit, int(number > 0))
        places = (each for part in geometry for each in part)
        tile_loops.convolve_for_weight(tasks, work, *address, SHIFT, *how, *size, *g_size, *places)
    out = torch.empty(channels, taps, dtype=torch.float32, device="cpu")
    parts = padded // LANES
    tile_loops.add_tasks(parts, out.numel(), sums.data_ptr(), tasks, taps, channels, out.data_ptr())
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
