"""The trust mask of QuEST (Panferov et al., 2025), which Quartet takes over: what fprop clips gets no gradient.

A scale from root mean squares clips what lies at the end of a block's range or beyond. There the straight-through
estimate of the gradient is not trusted, and set to zero, in the axes that fprop rotated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.grids import Grid
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import is_channels_last


class Mask(NamedTuple):
    """bits: uint8, one bit an element in memory order, set where its gradient passes; None while autograd keeps them.
    channels_last: whether that is the order of channels_last memory."""

    bits: Tensor | None
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, how: Encoding, grid: Grid, scales: Tensor, tensor_scale: Tensor) -> Mask:
        """Of x, dense, that was quantized in the blocks of a grid with these scales (kernels.blocks.encode_blocks):
        |x| is below the end of its block's range. Where the scale is NaN, bits are set."""
        form, channels_last = how.form, is_channels_last(x)
        largest = 2 ** (form.bits - 1) - 1  # the field of the largest code: all bits but the sign's
        byte = largest | largest << 4 if form.field_bits == 4 else largest
        fields = scales.new_full((form.field_bytes(x.numel()),), byte, dtype=torch.uint8)
        layout = x.shape, channels_last, how.key, grid.sizes, grid.block
        ends = ops.decode_blocks(fields, scales, *layout, torch.float32)
        ends = ends.mul_(tensor_scale) if how.has_tensor_scale else ends
        return cls(ops.relu_(ends.sub_(x.abs())), channels_last)

    def apply(self, gradient: Tensor) -> Tensor:
        """The gradient, zero where no bit is set."""
        return ops.relu_backward(gradient, self.bits, self.channels_last)
