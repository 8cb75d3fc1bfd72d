"""Convolutions and linear layers on int8 codes with int32 sums: exact whatever the order, and on a CPU with VNNI
instructions faster than the bf16 units, let alone fp32's.

Libraries' units do it (`int8_library`); where the CPU has AVX-512's VNNI our own blocks do it too (`int8_tiles`), for
3x3 kernels with fewer products (`int8_winograd`), and the fastest is taken. A linear layer is to them the 1x1
convolution of (rows, features, 1, 1). Groups are for our blocks.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.errors import UserError
from luqrun.internals.of_torch import has_vnni, with_shape
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import int8_library, int8_products, int8_tiles, int8_tiles_wgrad, int8_winograd
from luqrun.quant.kernels.cpu.int8_library import CHUNK_ROWS, out_size
from luqrun.quant.kernels.layout import empty, in_channels_last
from luqrun.quant.routes import Route, chosen, fastest, rehearses, size_class

log = logging.getLogger(__name__)

BLOCKS, WINOGRAD, LIBRARIES = "blocks of ours", "Winograd's tiles", "libraries"
ONE = (1, 1)
POINTWISE = ONE, ONE, (0, 0), ONE

__all__ = ["CHUNK_ROWS", "conv", "conv_dgrad", "conv_wgrad", "is_fast", "linear", "linear_wgrad", "out_size"]
__all__ += ["suits_groups"]


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
    return tuple(map(tuple, geometry))


@functools.lru_cache(int8_products.MOST_VIEWS)
def _fprop(shape: Sequence[int], channels: int, geometry: tuple, groups: int, rehearses: bool) -> tuple:
    """(size of a convolution's result, whether blocks of ours serve, whether Winograd's tiles do). shape: of a."""
    size = shape[0], channels, *itertools.starmap(out_size, zip(shape[2:], *geometry, strict=True))
    blocks = 0 not in size and int8_tiles.suits(shape, geometry, size[2:])
    pixels = size[0] * size[2] * size[3]
    return size, blocks, blocks and groups == 1 and int8_winograd.suits(geometry, shape[1], channels, pixels)


@functools.lru_cache(int8_products.MOST_VIEWS)
def _dgrad(
    g_shape: Sequence[int], shape: Sequence[int], geometry: tuple, groups: int, rehearses: bool
) -> tuple[bool, bool]:
    """Whether blocks of ours serve the gradient of an input of this shape, and whether Winograd's tiles do."""
    blocks = 0 not in shape and 0 not in g_shape and int8_tiles.suits_dgrad(g_shape, geometry, shape)
    pixels = shape[0] * shape[2] * shape[3]
    return blocks, blocks and groups == 1 and int8_winograd.suits(geometry, g_shape[1], shape[1], pixels)


@functools.lru_cache(int8_products.MOST_VIEWS)
def _wgrad(
    g_shape: Sequence[int],
    draws: int,
    shape: Sequence[int],
    geometry: tuple,
    groups: int,
    rehearses: bool,
    threads: int,
) -> tuple[bool, bool]:
    """Whether blocks of ours serve a weight gradient, and whether Winograd's tiles do. shape: of a; threads: torch's,
    each of which has sums of its own."""
    if 0 in g_shape or 0 in shape:
        return False, False
    images, channels, height, width = g_shape
    pixels = images * height * width
    winograd = groups == 1 and int8_winograd.suits(geometry, shape[1], channels, pixels)
    return int8_tiles_wgrad.suits(g_shape, draws, shape, geometry[0], groups), winograd


def _by_the_fastest(
    gemm: str,
    shape: Sequence[int],
    geometry: Sequence,
    groups: int,
    rest: tuple,
    ours: dict[str, Route],
    library: Route,
) -> Tensor:
    """What all make of (N, C, H, W) of this shape, by the one that takes the least time. rest: what else that depends
    on; ours: those that are exact whatever the numbers, or refuse them."""
    if not ours:
        return library()
    if groups > 1:  # libraries have none, but for floating point, which others compare it with
        return ours[BLOCKS]()
    return fastest(_key(gemm, shape, geometry, rest), {**ours, LIBRARIES: library})


def _key(gemm: str, shape: Sequence[int], geometry: Sequence, rest: tuple) -> tuple:
    return gemm, size_class(shape), geometry, *rest


def prefers_blocks(gemm: str, shape: Sequence[int], geometry: Sequence, rest: tuple, winograd: bool) -> bool | None:
    """Whether blocks of ours were the fastest; None where nobody tried. rest: see _by_the_fastest; winograd: whether
    Winograd's tiles were tried, too."""
    names = (BLOCKS, WINOGRAD, LIBRARIES) if winograd else (BLOCKS, LIBRARIES)
    name = chosen(_key(gemm, shape, geometry, rest), names)
    return None if name is None else name == BLOCKS


def conv(
    a: Tensor,
    w: Tensor,
    scale: Tensor,
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

    a: int8 (N, C, H, W); w: int8 (K, C / groups, R, S); scale: 0-dim float32; signed: 0-dim bool, false where no
    element of a is negative.
    """
    geometry, channels, w = _pairs(w.shape[2:], stride, padding, dilation), w.shape[0], in_channels_last(w)
    size, blocks, winograd = _fprop(a.shape, channels, geometry, groups, rehearses())
    has_sign = bool(signed.item())

    def by_libraries() -> Tensor:
        if groups > 1:
            return reference.int8_conv(a, w, scale, stride, padding, dilation, dtype, True, signed, groups)
        return int8_library.conv(a, _matrix_of(w).t(), scale, geometry, dtype, signed)

    def by_tiles() -> Tensor:
        out = empty(size, True, dtype, a.device)
        int8_tiles.conv(in_channels_last(a), w, scale, geometry, has_sign, out, groups)
        return out

    def by_winograd() -> Tensor | None:
        out = empty(size, True, dtype, a.device)
        fits = int8_winograd.conv(in_channels_last(a), w, scale, geometry[2], out)
        return out if fits else None

    ours: dict[str, Route] = {}
    if blocks:
        ours[BLOCKS] = by_tiles
    if winograd:
        ours[WINOGRAD] = by_winograd
    rest = channels, dtype, has_sign
    out = _by_the_fastest("fprop", a.shape, geometry, groups, rest, ours, by_libraries)
    return out if channels_last else _contiguous(out)


def linear_strides(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of a weight of this shape and of its transpose, as of one tap and one group: see int8_tiles.strides_of."""
    inputs = shape[1]
    return (0, 0, 1, inputs, 0), (0, 0, inputs, 1, 0)


def linear(a: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor, adjoint: bool) -> Tensor:
    """scale * (a @ w.t()), or with `adjoint` of a @ w, as `conv` says it of the 1x1 convolution: `dtype` (..., K).

    a: int8 (..., C); w: int8 (K, C), or (C, K); scale, signed: as there.
    """
    a, w = a.contiguous(), w.contiguous()
    *rest, depth = a.shape
    shape, columns = (math.prod(rest), depth, 1, 1), w.shape[int(adjoint)]
    size, blocks, _ = _fprop(shape, columns, POINTWISE, 1, rehearses())
    strides = linear_strides(w.shape)[int(adjoint)]
    has_sign = bool(signed.item())

    def by_libraries() -> Tensor:
        matrix = w if adjoint else w.t()
        out = int8_library.conv(a.view(shape), matrix, scale, POINTWISE, dtype, signed)
        return with_shape(out, (*rest, columns))

    def by_tiles() -> Tensor:
        out = torch.empty((*rest, columns), dtype=dtype, device="cpu")
        how = int8_tiles.convolution(shape, strides, POINTWISE, size, 1, torch.get_num_threads())
        how.run(a, w.data_ptr(), scale, has_sign, out)
        return out

    ours: dict[str, Route] = {BLOCKS: by_tiles} if blocks else {}
    return _by_the_fastest("fprop", shape, POINTWISE, 1, (columns, strides, dtype, has_sign), ours, by_libraries)


def linear_wgrad(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """The weight gradient of a linear layer, summed over `grads`: float32 (K, C), the exact integer rounded once.

    grads: int8 (..., K) each; a: int8 (..., C).
    """
    rows = math.prod(a.shape[:-1])
    flat = [x if x.dim() == 2 else x.reshape(rows, x.shape[-1]) for x in (*grads, a)]
    return int8_library.linear_wgrad(flat[:-1], flat[-1])


def conv_dgrad(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    signed: Tensor,
    groups: int = 1,
) -> Tensor:
    """scale * the gradient of conv2d for its (N, C, H, W) input, any stride: exact integers as float32, times scale.

    `dtype` (N, C, H, W) in channels_last or contiguous memory.

    g: int8 (N, K, H', W'); w: int8 (K, C / groups, R, S); scale: 0-dim float32; shape: (N, C, H, W); signed: 0-dim
    bool, false where no element of g is negative.
    """
    geometry, shape, w = _pairs(w.shape[2:], stride, padding, dilation), tuple(map(int, shape)), in_channels_last(w)
    blocks, winograd = _dgrad(g.shape, shape, geometry, groups, rehearses())
    has_sign = bool(signed.item())

    def by_tiles() -> Tensor:
        out = empty(shape, True, dtype, g.device)
        int8_tiles.conv_dgrad(in_channels_last(g), w, scale, geometry, has_sign, out, groups)
        return out

    def by_winograd() -> Tensor | None:
        out = empty(shape, True, dtype, g.device)
        fits = int8_winograd.conv(in_channels_last(g), w, scale, int8_tiles.turned(geometry)[2], out, adjoint=True)
        return out if fits else None

    def by_libraries() -> Tensor:
        if groups > 1:
            return reference.int8_conv_dgrad(g, w, scale, shape, stride, padding, dilation, dtype, True, signed, groups)
        if geometry[1] != ONE:
            return int8_library.conv_dgrad(g, _matrix_of(w), scale, shape, geometry, dtype)
        rows = w.shape[0] * math.prod(geometry[0])
        matrix = w.flip(2, 3).permute(2, 3, 0, 1).reshape(rows, w.shape[1])
        return int8_library.conv(g, matrix, scale, int8_tiles.turned(geometry), dtype, signed)

    ours: dict[str, Route] = {}
    if blocks:
        ours[BLOCKS] = by_tiles
    if winograd:
        ours[WINOGRAD] = by_winograd
    rest = shape[1], dtype, has_sign
    out = _by_the_fastest("dgrad", g.shape, geometry, groups, rest, ours, by_libraries)
    return out if channels_last else _contiguous(out)


def _matrix_of(w: Tensor) -> Tensor:
    """w (K, C, R, S) as (K, R * S * C), without a copy of what is channels_last."""
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], math.prod(w.shape[1:]))  # -1 would not do without elements


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
    geometry, (_, channels, _, width) = _pairs(kernel, stride, padding, dilation), grads[0].shape
    if width > CHUNK_ROWS:
        raise UserError(f"images of {width} pixels a row are too wide; at most {CHUNK_ROWS}")

    def by_libraries() -> Tensor:
        if groups > 1:
            return reference.int8_conv_wgrad(grads, a, kernel, stride, padding, dilation, groups)
        total = int8_library.conv_wgrad(grads, a, geometry)
        return total.view(channels, *kernel, a.shape[1]).permute(0, 3, 1, 2)

    def by_tiles() -> Tensor:
        return int8_tiles_wgrad.conv_wgrad([in_channels_last(g) for g in grads], in_channels_last(a), geometry, groups)

    def by_winograd() -> Tensor | None:
        return int8_winograd.conv_wgrad([in_channels_last(g) for g in grads], in_channels_last(a), geometry[2])

    ours: dict[str, Route] = {}
    which = grads[0].shape, len(grads), a.shape, geometry, groups
    blocks, winograd = _wgrad(*which, rehearses(), torch.get_num_threads())
    if blocks:
        ours[BLOCKS] = by_tiles
    if winograd:
        ours[WINOGRAD] = by_winograd
    return _by_the_fastest("wgrad", a.shape, geometry, groups, (channels, len(grads)), ours, by_libraries)
