"""What quantization did to a tensor, in three numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from luqrun.quant.grids import Grid, expanded
from luqrun.quant.kernels.layout import in_memory_order
from luqrun.quant.quantizer import SMALLEST, Blocks, QuantizedTensor, Quantizer
from luqrun.quant.scale_formats import from_bytes


def health(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """What quantization did to x: float32 (3,) of clipped share, underflow share, relative error ||x_q - x|| / ||x||.

    Clipped: beyond the largest code. Underflow: of the non-zero elements, those that became zero.
    """
    limit = torch.where(quantized.signed, quantized.form.limit, quantized.form.unsigned_limit)
    return _health(x, quantized.codes.double() * quantized.scale.double(), quantized.scale.double() * limit)


def health_of_blocks(x: Tensor, blocks: Blocks, quantizer: Quantizer, grid: Grid) -> Tensor:
    """`health` of what was quantized in the blocks of a grid."""
    scales = from_bytes(blocks.scales, quantizer.scale_format).double() * blocks.tensor_scale.double()
    most = expanded(scales * quantizer.form.limit * quantizer.form.unit, grid)
    flat = in_memory_order(x.detach()).reshape(-1)
    return _health(flat, in_memory_order(blocks.values).reshape(-1).double() * blocks.tensor_scale.double(), most)


def _health(x: Tensor, values: Tensor, most: Tensor) -> Tensor:
    x = x.detach().double()  # squares of tiny and huge gradients leave float32
    clipped = (x.abs() > most * (1 + 1e-6)).float().mean()
    nonzero = x != 0
    underflow = ((values == 0) & nonzero).sum() / nonzero.sum().clamp(min=1)
    error = (values - x).norm() / x.norm().clamp(min=SMALLEST)
    return torch.stack([clipped, underflow, error.float()])
