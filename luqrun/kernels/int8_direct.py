"""oneDNN's own convolution of int8 codes, without patches: what it can do here, and where it is exact."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-100
EXACT_FLOATS = 1 << 24  # up to which float32 holds every integer


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has AMX's matrix units, which oneDNN's convolution uses."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


@functools.cache
def has_direct_conv() -> bool:
    """Whether this torch has oneDNN's int8 convolution, which nobody promised, and it does what it did."""
    a, w = torch.tensor([-3, 5, 7, 1]).view(1, 4, 1, 1).char(), torch.tensor([2, -7, 1, 0]).view(1, 4, 1, 1).char()
    try:
        return direct_conv(a, w, torch.tensor(0.5), ((1, 1), (0, 0), (1, 1)), torch.float32, True).item() == -17.0
    except (AttributeError, RuntimeError, TypeError):
        return False


@functools.cache
def _ones_and_zeros(channels: int) -> tuple[Tensor, Tensor]:
    """What oneDNN takes for the scales and zero points of a weight."""
    return torch.ones(channels), torch.zeros(channels, dtype=torch.int64)


def suits_direct_conv(matrix: Tensor, scale: Tensor, padding: Sequence[int], signed: Tensor) -> bool:
    """Whether `direct_conv` does here exactly what int8.conv promises; its `matrix`, as there."""
    # oneDNN's own scaling loses subnormal bf16 results, and it has no padding below 0.
    if min(padding) < 0 or not scale.item() >= SMALLEST_SCALE:
        return False
    if not (signed.item() and has_amx()) or len(matrix) * 255 * 128 <= EXACT_FLOATS:
        return True
    # With AMX it makes float32 of the sums of shifted codes before it takes the shift out again.
    least, most = matrix.aminmax()
    return len(matrix) * 255 * max(-least.item(), most.item()) <= EXACT_FLOATS


def direct_conv(a: Tensor, w: Tensor, scale: Tensor, geometry, dtype: torch.dtype, signed: bool) -> Tensor:
    """scale * conv2d(a, w) as int8.conv, of a int8 (N, C, H, W) and w int8 (K, C, R, S); geometry: stride, padding and
    dilation. oneDNN takes unsigned activations with a zero point."""
    stride, padding, dilation = geometry
    shift = 128 if signed else 0
    shifted = a.view(torch.uint8) ^ shift if signed else a.view(torch.uint8)  # a + shift
    ones, zeros = _ones_and_zeros(w.shape[0])
    onednn = torch.ops.onednn
    packed = onednn.qconv_prepack(w, ones, 1.0, 0, stride, padding, dilation, 1, None)
    how = packed, ones, zeros, None, stride, padding, dilation, 1, 1.0, 0, dtype, "none", [], None
    return onednn.qconv2d_pointwise(shifted, scale.item(), shift, *how)
