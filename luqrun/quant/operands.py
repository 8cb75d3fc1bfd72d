"""What enters a GEMM, and what is kept of it for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.internals.of_torch import is_watched
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.cpu import sizes
from luqrun.quant.kernels.layout import from_memory_order, in_memory_order

EXACT = {torch.int8: 127, torch.bfloat16: 256, torch.float32: 2**24}  # the integers up to which each holds all


class Operand(NamedTuple):
    """What enters a GEMM: draws of codes whose sum it is (one, but for re-sampling), their scale and signedness; or
    codes times the scales of their blocks, and the scale that is left or None; or a high-precision tensor and twice
    None."""

    draws: tuple[Tensor, ...]
    scale: Tensor | None = None
    signed: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """The only draw."""
        assert len(self.draws) == 1
        return self.draws[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.draws[0].dtype

    def has_int8(self) -> bool:
        return self.scale is not None and self.dtype == torch.int8

    def is_wide(self) -> bool:
        """Whether these are codes times the scales of their blocks that bf16 would round; codes alone it never does."""
        return self.scale is not None and self.signed is None and self.dtype == torch.float32

    def as_float(self, dtype: torch.dtype) -> Tensor:
        """The values as `dtype`, all draws summed."""
        first, *others = self.draws
        total = first.to(dtype)
        for other in others:
            total = total + other.to(dtype)
        return total

    def dequantized(self) -> Tensor:
        """The values, float32."""
        total = self.as_float(torch.float32)
        return total if self.scale is None else total * self.scale


def rescale(product: Tensor, *operands: Operand) -> Tensor:
    """A GEMM's result times the scales of its operands: one pass, in place where nobody keeps the product."""
    scales = [operand.scale for operand in operands if operand.scale is not None]
    if not scales:
        return product
    scale = scales[0] if len(scales) == 1 else scales[0] * scales[1]
    # A GPU would round a 0-dim float32 scale to the product's bf16 first; one with a dimension it multiplies as
    # float32. The CPU does so with both, but is slower with the second.
    scale = scale if product.is_cpu else scale.view(1)
    if is_watched():  # selective activation checkpointing keeps products
        return (product * scale).to(product.dtype)
    return product.mul_(scale)


def held_by(form: Format, dtype: torch.dtype) -> torch.dtype:
    """dtype, or float32 where that is int8 and too small for the codes of `form`."""
    return torch.float32 if dtype == torch.int8 and form.code_dtype != torch.int8 else dtype


def keeps_codes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the codes of x, of this dtype, are kept between the passes as they are."""
    return dtype == torch.int8 and not torch.compiler.is_compiling() and x.numel() <= sizes.FEW


class Mask(NamedTuple):
    """The trust mask of QuEST (Panferov et al., 2025), which Quartet takes over: where fprop clips, a gradient passed
    straight through is not trusted, and set to zero.

    bits: see ops.block_mask; None while autograd keeps them. channels_last: whether they are in the order of such
    memory.
    """

    bits: Tensor | None
    channels_last: bool

    def apply(self, gradient: Tensor) -> Tensor:
        """The gradient, zero where no bit is set."""
        return ops.relu_backward(gradient, self.bits, self.channels_last)


class Stored(NamedTuple):
    """An operand between the passes. tensors: what autograd keeps (packed codes, or of a few elements int8, scale,
    signed; in blocks packed codes, their scales, the tensor's scale; or the tensor itself); the rest says how to read
    them.

    gemm, operand: whose the blocks are, which says where they lie (`op.grid`). mask: of what fprop clipped, or None.
    """

    tensors: tuple[Tensor, ...]
    encoding: Encoding | None = None
    shape: tuple[int, ...] = ()
    channels_last: bool = False
    gemm: str = ""
    operand: str = ""
    mask: Mask | None = None

    def read(self, op: LinearOp | ConvOp, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Operand:
        """The operand again, its codes as `dtype`, from the tensors that autograd kept."""
        how, layout = self.encoding, (self.shape, self.channels_last)
        if how is None:
            return Operand(tensors[:1])
        if how.block is None:
            kept, scale, signed = tensors[:3]
            if kept.dtype == torch.int8:  # with the strides of unpacked ones, which decide how a library adds floats up
                flat = kept if kept.dim() == 1 else in_memory_order(kept).view(-1)
                codes = from_memory_order(flat, *layout).to(dtype)
            else:
                codes = ops.unpack(kept, *layout, signed, how.form.name, held_by(how.form, dtype))
            return Operand((codes,), scale, signed)
        fields, scales, tensor_scale = tensors[:3]
        grid = op.grid(self.gemm, self.operand, *layout, how)
        dtype = held_in_blocks(how, dtype)
        values = ops.decode_blocks(fields, scales, *layout, how.key, grid.sizes, grid.block, dtype)
        return Operand((values,), scale_beside(how, tensor_scale))


def held_in_blocks(how: Encoding, dtype: torch.dtype) -> torch.dtype:
    """What codes times their block's scale are held as: dtype, or float32 where that would round them."""
    significant = how.form.significant_bits + (4 if how.scale_format == "e4m3" else 0)
    rounds = dtype == torch.bfloat16 and significant > 8
    return torch.float32 if dtype == torch.int8 or how.scale_format == "fp32" or rounds else dtype


def scale_beside(how: Encoding, tensor_scale: Tensor) -> Tensor | None:
    """The scale that is left beside the blocks' own; None where it is 1, unless it tells them from a high-precision
    tensor (Operand.is_wide)."""
    return tensor_scale if how.has_tensor_scale or how.scale_format == "fp32" else None
