"""Weight gradients of convolutions on int8 codes by our own blocks of the VNNI instruction: see int8_tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from luqrun.quant.kernels.cpu import int8_tiles
from luqrun.quant.kernels.cpu.int8_direct import SHIFT
from luqrun.quant.kernels.cpu.int8_products import MOST_VIEWS, scratch
from luqrun.quant.kernels.cpu.int8_tiles import IMAGE_BYTES, MOST_TERMS, PRODUCTS, Pairs, parts_of, up
from luqrun.quant.kernels.cpu.sizes import LANES
from luqrun.quant.kernels.layout import empty

if TYPE_CHECKING:
    from luqrun.quant.kernels.cpu.driver import Loop

MOST_TAPS = 1 << 12  # rows of a weight gradient: with more, what a thread sums up does not fit its cache
FEWEST_PIXELS = 4  # of an image's output, of which a weight gradient takes four at a time
SUM_BYTES = 1 << 26  # of the sums of all tasks of a weight gradient, at most
# Where the sums of a weight gradient do not fit the cache beside them, of more images: they are passed over less often.
LARGE_SUM_BYTES, LARGE_TASK_BYTES = 1 << 20, 1 << 20
COPY = 32  # products that take as long as the copy of a byte


def suits(g_shape: Sequence[int], draws: int, shape: Sequence[int], kernel: Sequence[int], groups: int = 1) -> bool:
    """Whether a weight gradient of so many draws of a gradient of this shape can be. shape: of a."""
    taps, (images, channels, height, width) = math.prod(kernel), g_shape
    parts = parts_of(groups, shape[1], channels)
    pixels, rows = height * width * draws, taps * shape[1] // parts
    if rows > MOST_TAPS or height * width < FEWEST_PIXELS or pixels > MOST_TERMS or not int8_tiles.is_there():
        return False
    of_image = taps * up(shape[1] // parts, LANES) * height * up(width, 4)
    sums = _tasks(images, pixels) * parts * (rows + 1) * up(channels // parts, LANES) * 4
    return of_image <= IMAGE_BYTES and sums <= SUM_BYTES


def _tasks(images: int, pixels: int) -> int:
    """Parts of a weight gradient, of so many pixels an image: one for each thread, or as many as int32 needs."""
    return min(images, max(torch.get_num_threads(), -(-images // (MOST_TERMS // pixels))))


class WeightGradient(NamedTuple):
    """The weight gradient of images of one shape: what tile_loops is told, but for addresses. sums: rows and columns of
    what tasks add up."""

    sums: tuple[int, int]
    tasks: int
    work: int
    how: tuple[int, ...]
    rest: tuple[int, ...]
    panels: int
    split: tuple[int, ...]

    def loops(
        self, a: int, grads: Sequence[int], sums: int, out: int, elements: int, scales: tuple[int, int]
    ) -> list[Loop]:
        """What multiplies and adds up, of images and gradients at these addresses. elements: of out."""
        of_pixels, of_tasks = int8_tiles.tile_loops().convolve_for_weight, int8_tiles.tile_loops().add_tasks
        found: list[Loop] = []
        for number, g in enumerate(grads):
            numbers = a, g, sums, SHIFT, *self.how, int(number > 0), *self.rest
            found.append((of_pixels, self.tasks, self.work, numbers))
        return [*found, (of_tasks, self.panels, elements, (sums, self.tasks, *self.split, out, *scales))]


@functools.lru_cache(MOST_VIEWS)
def weight_gradient(
    g_shape: Sequence[int], shape: Sequence[int], draws: int, geometry: Pairs, groups: int, threads: int
) -> WeightGradient:
    """What `conv_wgrad` does. shape: of a; threads: see `convolution`."""
    (kernel, stride, _, dilation), (images, channels, height, width) = geometry, g_shape
    parts, taps = parts_of(groups, shape[1], channels), kernel[0] * kernel[1]
    inputs, outputs, of_part = shape[1] // groups, channels // groups, channels // parts
    rows, tasks = taps * shape[1] // parts, _tasks(images, height * width * draws)
    padded = up(of_part, LANES)
    size, g_size = (images, shape[2], shape[3], shape[1]), (images, height, width, channels)
    limit = LARGE_TASK_BYTES if 4 * (rows + 1) * padded > LARGE_SUM_BYTES else int8_tiles.TASK_BYTES
    work = max(math.prod(shape), images * height * width * rows * channels // PRODUCTS)
    by_lines = _prefers_lines(kernel, stride, dilation, height, width, of_part)
    how, rest = (int(by_lines), tasks, limit), (*size, *g_size, *chain.from_iterable(geometry))
    split = parts, groups // parts, inputs, outputs, taps
    sums = tasks * parts * (rows + 1), padded
    return WeightGradient(sums, tasks, work, how, (parts, *rest), parts * padded // LANES, split)


def conv_wgrad(grads: Sequence[Tensor], a: Tensor, geometry: Pairs, groups: int = 1) -> Tensor:
    """See int8.conv_wgrad. All channels_last; geometry: kernel, stride, padding, dilation."""
    (_, channels, *_), inputs = grads[0].shape, a.shape[1] // groups
    which = grads[0].shape, a.shape, len(grads), geometry, groups
    found = weight_gradient(*which, torch.get_num_threads())
    sums = scratch("weight gradients", *found.sums, torch.int32).data_ptr()
    out = empty((channels, inputs, *geometry[0]), True, torch.float32, a.device)
    where = a.data_ptr(), [g.data_ptr() for g in grads], sums, out.data_ptr()
    int8_tiles.driver().in_turn(*found.loops(*where, out.numel(), (0, 0)))
    return out


def _prefers_lines(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], height: int, width: int, channels: int
) -> bool:
    """Whether quads of lines, which may end with pixels that are none, take less time than those of whole images, of
    which each tap needs its own."""
    if stride[0] != 1:
        return False
    taps, pixels = kernel[0] * kernel[1], height * width
    of_lines, of_images = height * up(width, 4), up(pixels, 4)
    copied = of_lines * kernel[1] * (1 + dilation[0] * (kernel[0] - 1) / height), of_images * taps
    multiplied = of_lines * taps * channels, of_images * taps * channels
    return copied[0] * COPY + multiplied[0] <= copied[1] * COPY + multiplied[1]
