"""Memory order: the kernels work on tensors that are dense in contiguous or channels_last memory, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x is (N, C, H, W) in (N, H, W, C) memory, and not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself where its memory is contiguous or channels_last, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def in_channels_last(x: Tensor) -> Tensor:
    """x (N, C, H, W) in channels_last memory, without a copy of what is."""
    return x.contiguous(memory_format=torch.channels_last)


def in_memory_order(x: Tensor) -> Tensor:
    """A contiguous view (or copy, of what is not dense) of x whose row-major order is x's memory order."""
    return x.permute(0, 2, 3, 1) if is_channels_last(x) else x.contiguous()


def pixels_of(x: Tensor) -> tuple[int, int, int]:
    """(images, pixels of one, channels) of a channels_last x; zeros of others."""
    images, channels, height, width = x.shape if is_channels_last(x) else (0, 0, 0, 0)
    return images, height * width, channels


def empty(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in contiguous or channels_last memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def from_memory_order(flat: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The tensor of this shape whose elements in memory order are `flat`: the inverse of in_memory_order."""
    flat = flat.contiguous()  # reshape may have taken a view with gaps, as of blocks of a single column
    if not channels_last:
        return flat.view(shape)
    images, channels, height, width = shape
    return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
