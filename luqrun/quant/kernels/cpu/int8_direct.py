"""oneDNN's convolution of int8 codes, without patches: what it is asked for, and how it is shown to be exact.

It is asked for unsigned activations only, without a zero point, padding, dilation or scale. What it did for zero points
and padding was wrong with AMX and with VNNI (kernels taller than wide, edges of images), or wrote beyond its memory
(dilation; strides longer than the kernel), which no comparison finds. The shift, the padding and the scale are loops of
ours, before and after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.internals.of_torch import conv_of_codes, prepack_conv

EXACT_FLOATS = 1 << 24  # up to which float32 holds every integer
SHIFT = 128  # what makes signed codes unsigned
BLOCK_BYTES = 1 << 21  # of images at a time, for each thread, so that they stay in its cache


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has AMX's matrix units: with them preparing a weight takes longer. It decides nothing else."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


class Kind(NamedTuple):
    """What decides how oneDNN convolves a block of images, and whether it can do so exactly."""

    images: int
    height: int  # of the unsigned activations, with their padding
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    largest: int  # the weight is one of -largest..largest
    threads: int

    def out_size(self) -> tuple[int, int]:
        ends = zip((self.height, self.width), self.kernel, self.stride, strict=True)
        height, width = ((size - kernel) // stride + 1 for size, kernel, stride in ends)
        return height, width


def suits(matrix: Tensor, geometry: Sequence[tuple[int, int]], signed: bool) -> int:
    """What the weight's elements are at most, as `Kind` says it; 0 where oneDNN is not to be asked.

    matrix: int8 (R * S * C, K); geometry: kernel, stride, padding, dilation. It returns its sums as float32, so that
    these must be small enough for it.
    """
    kernel, stride, _, dilation = geometry
    if dilation != (1, 1) or stride[0] > kernel[0] or stride[1] > kernel[1] or 0 in matrix.shape:
        return 0
    # Through a transposed view it takes torch sixty times as long.
    least, most = (end.item() for end in (matrix if matrix.is_contiguous() else matrix.t()).aminmax())
    largest = max(-least, most)
    if len(matrix) * (255 if signed else 127) * largest > EXACT_FLOATS:
        return 0
    return min(max((1 << largest.bit_length()) - 1, 7), 128)  # a few classes: each is shown for itself


def blocks(shape: Sequence[int], out_size: tuple[int, int], channels: int, geometry, largest: int) -> list:
    """(first image, Kind) of each block of (N, C, H, W) images, to `channels`: of one kind, and the last of another."""
    kernel, stride, *_ = geometry
    height, width = ((out - 1) * step + taps for out, step, taps in zip(out_size, stride, kernel, strict=True))
    threads = torch.get_num_threads()
    image = height * width * shape[1] + 4 * out_size[0] * out_size[1] * channels
    step = max(1, threads * BLOCK_BYTES // image)
    step = -(-shape[0] // -(-shape[0] // step))
    rest = height, width, shape[1], channels, kernel, stride, largest, threads
    return [(first, Kind(min(step, shape[0] - first), *rest)) for first in range(0, shape[0], step)]


@functools.cache
def _ones_and_zeros(channels: int) -> tuple[Tensor, Tensor]:
    """What oneDNN takes for the scales and zero points of a weight."""
    with torch.inference_mode(False):  # they outlive the caller's mode
        return (
            torch.ones(channels, dtype=torch.float32, device="cpu"),
            torch.zeros(channels, dtype=torch.int64, device="cpu"),
        )


def pack(matrix: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """int8 (R * S * C, K) as oneDNN wants it."""
    depth, channels = matrix.shape
    weight = matrix.t().view(channels, *kernel, depth // (kernel[0] * kernel[1])).permute(0, 3, 1, 2)
    ones, _ = _ones_and_zeros(channels)
    return prepack_conv(weight, ones, stride)


def convolve(images: Tensor, packed: Tensor, kind: Kind) -> Tensor:
    """float32 (N * H' * W', K): the sums of uint8 (N, H, W, C) with a weight from `pack`."""
    ones, zeros = _ones_and_zeros(kind.out_channels)
    out = conv_of_codes(images.permute(0, 3, 1, 2), packed, ones, zeros, kind.stride)
    if out.shape != (kind.images, kind.out_channels, *kind.out_size()):
        raise RuntimeError(f"it returns {tuple(out.shape)}")
    return out.permute(0, 2, 3, 1).reshape(-1, kind.out_channels).contiguous()
