"""Convolutions and linear layers on int8 codes with int32 sums: exact whatever the order, and on a CPU with VNNI
instructions faster than the bf16 units, let alone fp32's.

A convolution is a GEMM on its patches (im2col), made a few images' rows at a time so that they stay in the cache; a
linear layer is the 1x1 convolution of (rows, features, 1, 1). Groups are left to the floating-point units.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.errors import UserError
from luqrun.kernels.layout import empty

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22  # of patches at a time
PRODUCT_BYTES = 1 << 20  # of products at a time
DIRECT_BYTES = 1 << 22  # of patches, from which a convolution without them is faster in spite of its preparations
SMALLEST_SCALE = 2.0**-100
CHUNK_ROWS = 1 << 17  # a sum of so many products of two int8 codes stays in int32


@functools.cache
def is_fast() -> bool:
    """Whether this CPU multiplies int8 by itself (VNNI), through oneDNN."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    if has_vnni is None:
        log.warning("this torch does not say whether the CPU has VNNI: GEMMs run in floating point, slower")
        return False
    return torch.backends.mkldnn.is_available() and has_vnni()


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


_memory = threading.local()


def _scratch(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for a block of patches (or their sums) or of products, each thread's own: fresh memory would cost more
    than filling it."""
    size = rows * columns * dtype.itemsize
    block = getattr(_memory, name, None)
    if block is None or block.numel() < size:
        block = torch.empty(size, dtype=torch.int8)
        setattr(_memory, name, block)
    return block[:size].view(dtype).view(rows, columns)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The integer product of int8 matrices, in scratch memory: int32."""
    return torch._int_mm(a, b, out=_scratch("products", a.shape[0], b.shape[1], torch.int32))


def _rescale(sums: Tensor, scale: Tensor, out: Tensor) -> None:
    """out <- sums * scale in one pass, where torch makes two copies. sums: int32; out: float32 or bf16."""
    from luqrun.kernels import numba_loops  # compiled code is loaded when it is first needed

    assert sums.is_contiguous()
    assert out.is_contiguous()
    assert out.dtype in (torch.float32, torch.bfloat16)
    half = int(out.dtype == torch.bfloat16)
    numba_loops.rescale(sums.numel(), sums.data_ptr(), out.data_ptr(), half, scale.data_ptr())


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C), without a copy of what is channels_last."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Patches:
    """The rows of the im2col matrix of a (N, C, H, W) int8: iterating gives (slice of rows, int8 (rows, R * S * C)).

    columns: how many products each row gets, where these should fit the cache too.
    """

    def __init__(self, a: Tensor, kernel, stride, padding, dilation, columns: int = 0):
        images, channels, height, width = a.shape
        self.size = images, height, width, channels
        self.geometry = tuple(tuple(map(int, pair)) for pair in (kernel, stride, padding, dilation))
        self.pointwise = self.geometry == ((1, 1), (1, 1), (0, 0), (1, 1))
        ends = zip((height, width), *self.geometry, strict=True)
        self.out_height, self.out_width = (out_size(*end) for end in ends)
        self.lines = images * self.out_height
        self.depth = kernel[0] * kernel[1] * channels
        self.a = a
        self.columns = columns

    def bytes(self) -> int:
        """The size of the whole im2col matrix; 0 for a pointwise convolution, which needs none."""
        return 0 if self.pointwise else self.lines * self.out_width * self.depth

    def __iter__(self):
        if self.lines == 0 or self.depth == 0:
            return
        a = _pixels(self.a).reshape(-1)
        line = max(self.out_width, 1)
        step = min(CHUNK_BYTES // (line * self.depth), CHUNK_ROWS // line)
        if self.columns:
            step = min(step, PRODUCT_BYTES // (4 * line * self.columns))
        step = max(1, step)
        step = -(-self.lines // -(-self.lines // step))  # as many blocks, of one size
        for first in range(0, self.lines, step):
            count = min(step, self.lines - first)
            rows = slice(first * line, (first + count) * line)
            if self.pointwise:
                yield rows, a[rows.start * self.depth : rows.stop * self.depth].view(-1, self.depth)
            else:
                block = _scratch("patches", count * line, self.depth, torch.int8)
                self._fill(block, a, first)
                yield rows, block

    def _fill(self, block: Tensor, a: Tensor, first: int) -> None:
        from luqrun.kernels import numba_loops  # compiled code is loaded when it is first needed

        out_size = self.out_height, self.out_width
        address = block.data_ptr(), a.data_ptr()
        numba_loops.patches(block.numel(), *address, first, self.size, out_size, *self.geometry)


@functools.cache
def has_direct_conv() -> bool:
    """Whether this torch has oneDNN's int8 convolution, which nobody promised, and it does what it did."""
    a, w = torch.tensor([-3, 5, 7, 1]).view(1, 4, 1, 1).char(), torch.tensor([2, -7, 1, 0]).view(1, 4, 1, 1).char()
    try:
        return _direct_conv(a, w, torch.tensor(0.5), ((1, 1), (0, 0), (1, 1)), torch.float32, True).item() == -17.0
    except (AttributeError, RuntimeError, TypeError):
        return False


def _direct_conv(a: Tensor, w: Tensor, scale: Tensor, geometry, dtype: torch.dtype, signed: bool) -> Tensor:
    """As `conv`, without patches: oneDNN's, which takes unsigned activations with a zero point."""
    stride, padding, dilation = ([int(size) for size in pair] for pair in geometry)
    shift = 128 if signed else 0
    shifted = a.view(torch.uint8) ^ shift if signed else a.view(torch.uint8)  # a + shift
    ones, zeros = torch.ones(w.shape[0]), torch.zeros(w.shape[0], dtype=torch.int64)
    onednn = torch.ops.onednn
    packed = onednn.qconv_prepack(w, ones, 1.0, 0, stride, padding, dilation, 1, None)
    how = packed, ones, zeros, None, stride, padding, dilation, 1, 1.0, 0, dtype, "none", [], None
    return onednn.qconv2d_pointwise(shifted, scale.item(), shift, *how)


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
) -> Tensor:
    """scale * conv2d(a, w): the exact integers as float32, times scale, as `dtype`.

    (N, K, H', W') in channels_last or contiguous memory.

    a: int8 (N, C, H, W); matrix: int8 (R * S * C, K), w in the order of the patches; scale: 0-dim float32;
    signed: 0-dim bool, false where no element of a is negative.
    """
    channels = matrix.shape[1]
    patches = _Patches(a, kernel, stride, padding, dilation, channels)
    # oneDNN's own scaling loses subnormal bf16 results, and it has no padding below 0.
    possible = min(padding) >= 0 and not scale.item() < SMALLEST_SCALE
    if patches.bytes() > DIRECT_BYTES and possible and has_direct_conv():
        weight = matrix.t().view(channels, *kernel, a.shape[1]).permute(0, 3, 1, 2)
        out = _direct_conv(a, weight, scale, (stride, padding, dilation), dtype, signed.item())
        return out if channels_last else _contiguous(out)
    out = empty((a.shape[0], channels, patches.out_height, patches.out_width), True, dtype, a.device)
    flat = out.permute(0, 2, 3, 1).reshape(-1, channels)
    if patches.depth == 0:
        out.zero_()
    for rows, block in patches:
        _rescale(_multiply(block, matrix), scale, flat[rows])
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
) -> Tensor:
    """scale * the gradient of conv2d for its (N, C, H, W) input, any stride: exact integers as float32, times scale.

    `dtype` (N, C, H, W) in channels_last or contiguous memory.

    g: int8 (N, K, H', W'); matrix: int8 (K, R * S * C), the weight; scale: 0-dim float32; shape: (N, C, H, W).
    """
    from luqrun.kernels import numba_loops  # as in _Patches

    images, channels, height, width = map(int, shape)
    geometry = tuple(tuple(map(int, pair)) for pair in (kernel, stride, padding, dilation))
    out = empty(shape, True, dtype, g.device)
    flat, rows, pixels = out.permute(0, 2, 3, 1), _pixels(g), g.shape[2] * g.shape[3]
    step = max(1, PRODUCT_BYTES // max(4 * pixels * matrix.shape[1], 1))  # images whose products stay in the cache
    for first in range(0, images, step):
        count = min(step, images - first)
        products = _multiply(rows[first * pixels : (first + count) * pixels], matrix)
        sums = _scratch("patches", count * height * width, channels, torch.int32)
        address, size = (sums.data_ptr(), products.data_ptr()), (count, height, width, channels)
        numba_loops.fold(sums.numel(), *address, tuple(g.shape[2:]), size, *geometry)
        _rescale(sums, scale, flat[first : first + count])
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
) -> Tensor:
    """The weight gradient of conv2d, summed over `grads`: float32 (K, C, R, S), the exact integer rounded once.

    grads: int8 (N, K, H', W') each; a: int8 (N, C, H, W). Where stride leaves pixels over, they have no gradient.
    """
    patches = _Patches(a, kernel, stride, padding, dilation)
    flat = [_pixels(g) for g in grads]
    if patches.out_width > CHUNK_ROWS:
        raise UserError(f"images of {patches.out_width} pixels a row are too wide; at most {CHUNK_ROWS}")
    # int32 holds the sums of CHUNK_ROWS rows, and so mostly the whole.
    fits = patches.lines * patches.out_width * len(grads) <= CHUNK_ROWS
    total = None
    for rows, block in patches:
        for g in flat:
            product = torch._int_mm(g[rows].t(), block)
            if total is None:
                total = product if fits else product.long()
            else:
                total += product
    if total is None:
        total = torch.zeros(grads[0].shape[1], patches.depth, dtype=torch.int32)
    shape = (grads[0].shape[1], *kernel, a.shape[1])
    return total.float().view(shape).permute(0, 3, 1, 2)
