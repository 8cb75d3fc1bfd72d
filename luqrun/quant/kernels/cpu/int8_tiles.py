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
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from luqrun.quant.kernels.cpu.int8_direct import SHIFT
from luqrun.quant.kernels.cpu.int8_products import MOST_VIEWS, scratch
from luqrun.quant.kernels.cpu.sizes import COLUMNS, LANES

if TYPE_CHECKING:
    from luqrun.quant.kernels.cpu.driver import Loop

MOST_TERMS = (1 << 31) // (255 * 128)  # of a sum that int32 holds whatever the codes
MOST_TOGETHER = 16  # groups that are multiplied as one, with zeros
IMAGE_BYTES = 1 << 28  # that a task makes of an image, at most
TASK_BYTES = 1 << 18  # of images that a thread reads over and over
PRODUCTS = 32  # that take as long as an element of other loops

Pairs = Sequence[tuple[int, int]]


@functools.cache
def is_there() -> bool:
    """Whether numba compiles for a CPU that has AVX-512's VNNI."""
    from luqrun.internals.of_numba import compiled_for  # numba is loaded where it is needed

    return "+avx512vnni" in compiled_for()[1].split(",")


@functools.cache
def driver() -> ModuleType:
    from luqrun.quant.kernels.cpu import driver  # numba is loaded when it is first needed

    return driver


@functools.cache
def tile_loops() -> ModuleType:
    from luqrun.quant.kernels.cpu import tile_loops  # compiled code is loaded when it is first needed

    return tile_loops


@functools.cache
def weight_loops() -> ModuleType:
    """See _loops."""
    from luqrun.quant.kernels.cpu import weight_loops

    return weight_loops


def suits(shape: Sequence[int], geometry: Pairs, out_size: Sequence[int]) -> bool:
    """Whether a convolution can be made of blocks. shape: of a; geometry: kernel, stride, padding, dilation."""
    kernel, _, _, (_, apart) = geometry
    depth, padded = math.prod(kernel) * shape[1], _padded(geometry, out_size)
    fits = 0 < depth <= MOST_TERMS and math.prod(padded) * shape[1] <= IMAGE_BYTES
    return fits and (apart == 1 or kernel[1] == 1) and is_there()


def suits_dgrad(g_shape: Sequence[int], geometry: Pairs, shape: Sequence[int]) -> bool:
    """Whether the gradient of an input of this shape can be."""
    kernel, stride, _, dilation = geometry
    if stride == (1, 1):
        return suits(g_shape, turned(geometry), shape[2:])
    ends = zip(g_shape[2:], shape[2:], kernel, strict=True)
    padded = math.prod(size + of + 2 * taps for size, of, taps in ends)  # as an upper limit
    fits = math.prod(kernel) * g_shape[1] <= MOST_TERMS and padded * g_shape[1] <= IMAGE_BYTES
    return fits and dilation == (1, 1) and is_there()


def turned(geometry: Pairs) -> Pairs:
    """That of the convolution with the kernel turned round which is the adjoint of one without a stride."""
    (lines, across), _, padding, (down, beside) = geometry
    return (lines, across), (1, 1), (down * (lines - 1) - padding[0], beside * (across - 1) - padding[1]), geometry[3]


def suits_groups(groups: int, channels: int, out_channels: int) -> bool:
    """Whether convolutions of so many groups may be faster in blocks, in spite of the zeros between groups."""
    return is_there() and groups <= MOST_TOGETHER * parts_of(groups, channels, out_channels)


@functools.lru_cache(MOST_VIEWS)
def parts_of(groups: int, channels: int, out_channels: int) -> int:
    """How many convolutions side by side one of so many groups is made of: each of as few groups as fill vectors, with
    zeros between them; or one."""
    for together in range(1, min(groups, MOST_TOGETHER + 1)):
        parts = groups // together
        if groups % together == 0 and channels // parts % LANES == 0 and out_channels // parts % LANES == 0:
            return parts
    return 1


def up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step


def _padded(geometry: Pairs, out_size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the input that a convolution to these pixels reads."""
    (lines, across), (down, beside), _, (apart, _) = geometry
    return (out_size[0] - 1) * down + apart * (lines - 1) + 1, (out_size[1] - 1) * beside + across


def _images_a_task(images: int, image_bytes: int) -> int:
    threads = torch.get_num_threads()
    tasks = -(-images // max(1, min(TASK_BYTES // max(image_bytes, 1), -(-images // threads))))
    return max(1, -(-images // (-(-tasks // threads) * threads)))  # as many for each thread


class Packing(NamedTuple):
    """How weights of one shape are packed: what weight_loops.pack_weight is told, but for addresses."""

    panels: int
    bytes: int
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, groups: int, parts: int, outputs: int, taps: Sequence[int], strides: Sequence[int]) -> Packing:
        """groups: of all parts; the rest: see weight_loops.pack_weight."""
        of_part = groups // parts
        channels, depth = of_part * outputs, taps[0] * up(taps[1] * of_part * taps[2], 4) // 4
        size = parts * up(channels, LANES) * depth * 4
        return cls(parts * -(-channels // COLUMNS), size, (depth, of_part, outputs, *taps, *strides))

    def loop(self, weight: int, to: int) -> Loop:
        """What packs the weight at an address to another."""
        return weight_loops().pack_weight, self.panels, self.bytes, (weight, to, *self.numbers)

    def scratch(self) -> int:
        """The address of room for what is packed, which the next weight takes again."""
        return scratch("packed weight", 1, self.bytes, torch.int8).data_ptr()


class Convolution(NamedTuple):
    """A convolution of images of one shape: what tile_loops.convolve is told, but for addresses and signs. begin: bytes
    from the weight's first to what is packed first."""

    packing: Packing
    begin: int
    tasks: int
    work: int
    group: int
    rest: tuple[int, ...]

    @classmethod
    def of(
        cls, shape: Sequence[int], packing: Packing, parts: int, where: Sequence[Sequence[int]], begin: int = 0
    ) -> Convolution:
        """shape: of a; where: padding, padded, source, taps, target (see tile_loops.convolve)."""
        (images, channels, height, width), (_, padded, _, taps, target) = shape, where
        products = images * target[-2] * target[-1] * target[2] * taps[0] * taps[2] * channels // parts
        group = _images_a_task(images, padded[0] * padded[1] * channels)
        work = max(math.prod(shape), products // PRODUCTS)
        rest = parts, images, height, width, channels, *chain.from_iterable(where)
        return cls(packing, begin, -(-images // group), work, group, rest)

    def loops(
        self, a: int, weight: int, packed: int, out: int, half: int, shift: tuple[int, int], scales: tuple[int, int]
    ) -> tuple[Loop, Loop]:
        """What packs the weight, the address of whose first it is told, and convolves. shift: with `signed`."""
        numbers = a, packed, out, half, *shift, self.group, *self.rest, *scales
        packing = self.packing.loop(weight + self.begin, packed)
        return packing, (tile_loops().convolve, self.tasks, self.work, numbers)

    def run(self, a: Tensor, weight: int, scale: Tensor, signed: bool, out: Tensor) -> None:
        """weight: the address of the first."""
        to, half = (self.packing.scratch(), out.data_ptr()), int(out.dtype == torch.bfloat16)
        how = half, (SHIFT * signed, 0), (scale.data_ptr(), 0)
        driver().in_turn(*self.loops(a.data_ptr(), weight, *to, *how))


@functools.lru_cache(MOST_VIEWS)
def convolution(
    shape: Sequence[int],
    strides: tuple[int, ...],
    geometry: Pairs,
    out_shape: Sequence[int],
    groups: int,
    threads: int,
    begin: int = 0,
) -> Convolution:
    """What `conv` does. shape: of a; strides: of the weight, see weight_loops.pack_weight; begin: see Convolution;
    threads: torch's, among which images are divided. Known once: in a small layer it takes as long as the work."""
    (lines, across), stride, padding, (down, _) = geometry
    channels, (_, out_channels, out_height, out_width) = shape[1], out_shape
    inputs, outputs, parts = channels // groups, out_channels // groups, parts_of(groups, channels, out_channels)
    target = out_height, out_width, out_channels, 0, 0, 1, 1, out_height, out_width
    taps, source = (lines, down, across), (0, 0, *stride)
    where = padding, _padded(geometry, out_shape[2:]), source, taps, target
    packing = Packing.of(groups, parts, outputs, (lines, across, inputs), strides)
    return Convolution.of(shape, packing, parts, where, begin)


def strides_of(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Those of a channels_last weight (K, C / groups, R, S): see weight_loops.pack_weight."""
    channels, inputs, _, across = shape
    row = math.prod(shape[1:])
    return across * inputs, inputs, 1, row, channels // groups * row


def conv(a: Tensor, w: Tensor, scale: Tensor, geometry: Pairs, signed: bool, out: Tensor, groups: int = 1) -> None:
    """Fill `out` as int8.conv says. All channels_last; geometry: kernel, stride, padding, dilation."""
    how = convolution(a.shape, strides_of(w.shape, groups), geometry, out.shape, groups, torch.get_num_threads())
    how.run(a, w.data_ptr(), scale, signed, out)


@functools.lru_cache(MOST_VIEWS)
def input_gradient(
    shape: Sequence[int], geometry: Pairs, out_shape: Sequence[int], groups: int, threads: int
) -> tuple[bool, list[Convolution]]:
    """What `conv_dgrad` does: whether each pixel gets something, and a convolution for each kind of them. shape: of g;
    threads: see `convolution`."""
    (lines, across), (down, beside), (above, left), _ = geometry
    _, channels, height, width = out_shape
    inputs, outputs, parts = shape[1] // groups, channels // groups, parts_of(groups, shape[1], channels)
    row = lines * across * outputs  # of an output channel of the weight
    if (down, beside) == (1, 1):
        strides = -across * outputs, -outputs, row, 1, inputs * row
        how = strides, turned(geometry), out_shape, groups, threads, row - outputs
        return True, [convolution(shape, *how)]
    upright = [_taps_of(first, lines, down, above, height) for first in range(min(down, height))]
    sideways = [_taps_of(first, across, beside, left, width) for first in range(min(beside, width))]
    high, padded_height = _padding(upright)
    wide, padded_width = _padding(sideways)
    strides = -down * across * outputs, -beside * outputs, row, 1, inputs * row
    found = []
    for line, (runs, last_line, source_line, count_lines) in enumerate(upright):
        for column, (taps, last_tap, source_column, count_columns) in enumerate(sideways):
            if runs and taps:
                packing = Packing.of(groups, parts, outputs, (runs, taps, inputs), strides)
                source = source_line + high, source_column + wide, 1, 1
                target = height, width, channels, line, column, down, beside, count_lines, count_columns
                where = (high, wide), (padded_height, padded_width), source, (runs, 1, taps), target
                begin = (last_line * across + last_tap) * outputs
                found.append(Convolution.of(shape, packing, parts, where, begin))
    return all(count for count, *_ in (*upright, *sideways)), found


def conv_dgrad(
    g: Tensor, w: Tensor, scale: Tensor, geometry: Pairs, signed: bool, out: Tensor, groups: int = 1
) -> None:
    """Fill `out` as int8.conv_dgrad says. All channels_last; geometry: kernel, stride, padding, dilation, which is
    1 where there is a stride."""
    reaches_all, convolutions = input_gradient(g.shape, geometry, out.shape, groups, torch.get_num_threads())
    if not reaches_all:
        out.zero_()
    for each in convolutions:
        each.run(g, w.data_ptr(), scale, signed, out)


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
