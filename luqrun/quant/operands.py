"""What enters a GEMM, and what is kept of it for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.internals.of_torch import is_watched
from luqrun.quant.formats import Format
from luqrun.quant.kernels import ops

EXACT = {torch.int8: 127, torch.bfloat16: 256, torch.float32: 2**24}  # the integers up to which each holds all


class Operand(NamedTuple):
    """What enters a GEMM: draws of codes whose sum it is (one, but for re-sampling), their scale and signedness; or a
    high-precision tensor and twice None."""

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

    def as_float(self, dtype: torch.dtype) -> Tensor:
        """The values as `dtype`, all draws summed."""
        first, *others = self.draws
        total = first.to(dtype)
        for other in others:
            total = total + other.to(dtype)
        return total


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


class Stored(NamedTuple):
    """An operand between the passes. tensors: what autograd keeps (packed codes, scale, signed; or the tensor itself);
    the rest says how to read them."""

    tensors: tuple[Tensor, ...]
    form: Format | None = None
    shape: tuple[int, ...] = ()
    channels_last: bool = False

    def operand(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Operand:
        """The operand again, its codes as `dtype`, from the tensors that autograd kept."""
        if self.form is None:
            return Operand(tensors[:1])
        fields, scale, signed = tensors[:3]
        layout, dtype = (self.shape, self.channels_last), held_by(self.form, dtype)
        return Operand((ops.unpack(fields, *layout, signed, self.form.name, dtype),), scale, signed)
