"""Convolutions and linear layers on int8 codes with int32 sums: exact whatever the order, and on a CPU with VNNI
instructions faster than the bf16 units, let alone fp32's.

Libraries' units do it (`int8_library`); where the CPU has AVX-512's VNNI our own blocks do it too (`int8_tiles`), for
3x3 kernels with fewer products (`int8_winograd`), and the fastest is taken. A linear layer is the 1x1 convolution of
(rows, features, 1, 1). Groups are for our blocks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.errors import UserError
from luqrun.internals.of_torch import has_vnni
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import int8_library, int8_products, int8_tiles, int8_winograd
from luqrun.quant.kernels.cpu.int8_library import CHUNK_ROWS, out_size
from luqrun.quant.kernels.layout import empty, in_channels_last
from luqrun.quant.routes import Route, fastest, size_class

log = logging.getLogger(__name__)

BLOCKS, WINOGRAD = "blocks of ours", "Winograd's tiles"

__all__ = ["CHUNK_ROWS", "conv", "conv_dgrad", "conv_wgrad", "is_fast", "out_size", "suits_groups"]


@functools.cache
def is_fast() -> bool:
    """Whether this CPU multiplies int8 by itself (VNNI), through oneDNN, exactly."""
    vnni = has_vnni()
    if vnni is None:
        log.warning("this torch does not say whether the CPU has VNNI: GEMMs run in floating point, slower")
        return False
    if not (torch.backends.mkldnn.is_available() and vnni):
        return False
    # Where it is not exact for a usual product, floating point is faster than what is made of the integers then.
    return int8_products.proven(64, 64, 64, (64, 1), (64, 1), torch.get_num_threads())


def suits_groups(groups: int, channels: int, out_channels: int) -> bool:
    """Whether int8 may be the faster way to multiply so many groups of these channels: of blocks of our own alone."""
    return int8_tiles.suits_groups(groups, channels, out_channels)


def _pairs(*geometry: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding and dilation as what can be looked up: operators hand over lists."""
    return tuple([(pair[0], pair[1]) for pair in geometry])


def _by_the_fastest(
    gemm: str, x: Tensor, geometry: Sequence, groups: int, rest: tuple, ours: dict[str, Route], library: Route
) -> Tensor:
    """What all make of x (N, C, H, W), by the one that takes the least time. rest: what else that depends on; ours:
    those that are exact whatever the numbers, or refuse them."""
    if not ours:
        return library()
    if groups > 1:  # libraries have none, but for floating point, which others compare it with
        return ours[BLOCKS]()
    return fastest((gemm, size_class(x.shape), geometry, *rest), {**ours, "libraries": library})


def conv(
    a: Tensor,
    matrix: Tensor,
    scale: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    signed: Tensor,
    groups: int = 1,
) -> Tensor:
    """scale * conv2d(a, w): the exact integers as float32, times scale, as `dtype`.

    (N, K, H', W') in channels_last or contiguous memory.

    a: int8 (N, C, H, W); matrix: int8 (R * S * C / groups, K), w in the order of the patches; scale: 0-dim float32;
    signed: 0-dim bool, false where no element of a is negative.
    """
    geometry, channels = _pairs(kernel, stride, padding, dilation), matrix.shape[1]
    ends = zip(a.shape[2:], *geometry, strict=True)
    size = a.shape[0], channels, *(out_size(*end) for end in ends)

    has_sign = bool(signed.item())

    def by_libraries() -> Tensor:
        if groups > 1:
            how = kernel, stride, padding, dilation, dtype, True, signed, groups
            return reference.int8_conv(a, matrix, scale, *how)
        return int8_library.conv(a, matrix, scale, geometry, dtype, signed)

    def by_tiles() -> Tensor:
        out = empty(size, True, dtype, a.device)
        int8_tiles.conv(in_channels_last(a), matrix, scale, geometry, has_sign, out, groups)
        return out

    def by_winograd() -> Tensor | None:
        out = empty(size, True, dtype, a.device)
        fits = int8_winograd.conv(in_channels_last(a), matrix, scale, geometry[2], out)
        return out if fits else None

    ours: dict[str, Route] = {}
    if 0 not in size and int8_tiles.suits(a, geometry, size[2:]):
        ours[BLOCKS] = by_tiles
        if groups == 1 and int8_winograd.suits(geometry, a.shape[1], channels, size[0] * size[2] * size[3]):
            ours[WINOGRAD] = by_winograd
    rest = channels, matrix.stride(), dtype, has_sign
    out = _by_the_fastest("fprop", a, geometry, groups, rest, ours, by_libraries)
    return out if channels_last else _contiguous(out)


def conv_dgrad(
    g: Tensor,
    matrix: Tensor,
    scale: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    groups: int = 1,
) -> Tensor:
    """scale * the gradient of conv2d for its (N, C, H, W) input, any stride: exact integers as float32, times scale.

    `dtype` (N, C, H, W) in channels_last or contiguous memory.

    g: int8 (N, K, H', W'); matrix: int8 (K, R * S * C / groups), the weight; scale: 0-dim float32; shape: (N, C,
    H, W).
    """
    geometry, shape = _pairs(kernel, stride, padding, dilation), tuple(map(int, shape))

    def by_tiles() -> Tensor:
        out = empty(shape, True, dtype, g.device)
        int8_tiles.conv_dgrad(in_channels_last(g), matrix.contiguous(), scale, geometry, out, groups)
        return out

    def by_libraries() -> Tensor:
        if groups > 1:
            how = kernel, stride, padding, dilation, dtype, True, groups
            return reference.int8_conv_dgrad(g, matrix, scale, shape, *how)
        return int8_library.conv_dgrad(g, matrix, scale, shape, geometry, dtype)

    suits = 0 not in shape and g.numel() and int8_tiles.suits_dgrad(g, geometry, shape)
    ours = {BLOCKS: by_tiles} if suits else {}
    out = _by_the_fastest("dgrad", g, geometry, groups, (shape[1], dtype), ours, by_libraries)
    return out if channels_last else _contiguous(out)


def _contiguous(x: Tensor) -> Tensor:
    return empty(x.shape, False, x.dtype, x.device).copy_(x)  # no view, and the usual strides for sizes of one too


def conv_wgrad(
    grads: Sequence[Tensor],
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The weight gradient of conv2d, summed over `grads`: float32 (K, C / groups, R, S), the exact integer rounded
    once.

    grads: int8 (N, K, H', W') each; a: int8 (N, C, H, W). Where stride leaves pixels over, they have no gradient.
    """
    geometry, (images, channels, height, width) = _pairs(kernel, stride, padding, dilation), grads[0].shape
    if width > CHUNK_ROWS:
        raise UserError(f"images of {width} pixels a row are too wide; at most {CHUNK_ROWS}")

    def by_libraries() -> Tensor:
        if groups > 1:
            whole = reference.int8_conv_wgrad(grads, a, kernel, stride, padding, dilation, groups)
            return whole.permute(0, 2, 3, 1).reshape(channels, -1)
        return int8_library.conv_wgrad(grads, a, geometry)

    def by_tiles() -> Tensor:
        return int8_tiles.conv_wgrad([in_channels_last(g) for g in grads], in_channels_last(a), geometry, groups)

    def by_winograd() -> Tensor | None:
        return int8_winograd.conv_wgrad([in_channels_last(g) for g in grads], in_channels_last(a), geometry[2])

    ours: dict[str, Route] = {}
    if images and height and width and channels and a.numel():
        if int8_tiles.suits_wgrad(grads, a, kernel, groups):
            ours[BLOCKS] = by_tiles
        if groups == 1 and int8_winograd.suits(geometry, a.shape[1], channels, images * height * width):
            ours[WINOGRAD] = by_winograd
    total = _by_the_fastest("wgrad", a, geometry, groups, (channels, len(grads)), ours, by_libraries)
    return total.view(channels, *kernel, a.shape[1] // groups).permute(0, 3, 1, 2)
