"""The three GEMMs of a layer on codes, as one autograd Function for linear and convolution alike.

fprop: z = W a with INT4 x INT4 codes; dgrad: INT4 weight x FP4 gradient; wgrad: FP4 gradient x INT4 activation
(Eqs. 1-3). Codes are exact in fp32, TF32 and bf16, and so is a sum of their products while it stays below 2^24;
scales multiply afterwards. An operand without a quantizer enters its GEMMs in high precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luqrun.quantizer import QuantizedTensor, Quantizer, health

EXACT_IN_BF16 = 256  # integers up to this have a bf16 of their own


@dataclass(frozen=True)
class LinearOp:
    """a (..., in) and w (out, in) -> (..., out)."""

    def fprop(self, a: Tensor, w: Tensor) -> Tensor:
        return F.linear(a, w)

    def backward(self, g: Tensor, a: Tensor, w: Tensor, dgrad: bool, wgrad: bool):
        """(gradient of a or None, gradient of w or None)."""
        rows = g.reshape(-1, g.shape[-1])
        return (g @ w if dgrad else None), (rows.t() @ a.reshape(-1, a.shape[-1]) if wgrad else None)


@dataclass(frozen=True)
class ConvOp:
    """a (N, C, H, W) and w (K, C / groups, R, S) -> (N, K, H', W')."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def fprop(self, a: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(a, w, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, g: Tensor, a: Tensor, w: Tensor, dgrad: bool, wgrad: bool):
        """(gradient of a or None, gradient of w or None)."""
        grad_a, grad_w, _ = torch.ops.aten.convolution_backward(
            g, a, w, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups, (dgrad, wgrad, False)
        )
        return grad_a if dgrad else None, grad_w if wgrad else None


class Operand(NamedTuple):
    """What enters a GEMM: codes with scale and signedness, or a high-precision tensor and twice None."""

    values: Tensor
    scale: Tensor | None = None
    signed: Tensor | None = None


def rescale(product: Tensor | None, *operands: Operand) -> Tensor | None:
    """Multiply a GEMM's result by the scales of its operands: one pass, in place."""
    scales = [operand.scale for operand in operands if operand.scale is not None]
    if product is not None and scales:
        product.mul_(scales[0] if len(scales) == 1 else scales[0] * scales[1])
    return product


@dataclass
class Plan:
    """What one call of a layer does: its quantizers (None: high precision), draws and memory.

    streams: by operand, the int64 (6,) names of the draws. hindsight: by operand, the 0-dim maxima; observe is told
    the new ones and is None where they must not change. health: by operand, filled where it is a dict.
    """

    weight: Quantizer | None
    activation: Quantizer | None
    gradient: Quantizer | None
    streams: dict[str, Tensor]
    hindsight: dict[str, Tensor]
    observe: object = None
    health: dict | None = None

    def quantize(self, operand: str, x: Tensor) -> Operand:
        """x as an Operand: one draw."""
        quantizer = getattr(self, operand)
        if quantizer is None:
            return Operand(x)
        hindsight = self.hindsight.get(operand)
        scale, signed, maximum = quantizer.measure(x, hindsight)
        codes = quantizer.encode(x, scale, signed, self.streams[operand])
        if hindsight is not None and self.observe is not None:
            self.observe(operand, maximum)
        if self.health is not None:
            self.health[operand] = health(x, QuantizedTensor(codes, scale, signed, quantizer.form))
        return Operand(codes, scale, signed)

    def quantize_gradient(self, g: Tensor) -> tuple[Operand, Operand]:
        """The gradient for dgrad and for wgrad; the same object where one serves both.

        With N samples the wgrad operand is the sum of N draws' codes, its scale divided by N: one GEMM gives the
        average of the N weight gradients (SMP).
        """
        if self.health is not None:
            self.health["gradient_exponents"] = exponent_counts(g)
        first = self.quantize("gradient", g)
        quantizer = self.gradient
        if quantizer is None or quantizer.samples == 1:
            return first, first
        total = first.values.to(torch.float32)
        for sample in range(1, quantizer.samples):
            total += quantizer.encode(g, first.scale, first.signed, self.streams["gradient"], sample)
        averaged = Operand(total, first.scale / quantizer.samples, first.signed)
        return (averaged if quantizer.samples_scope == "both" else first), averaged

    def gemm_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bf16 for bf16 results; fp32 for all others, since sums of codes leave fp16's range."""
        return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def wgrad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As gemm_dtype, but fp32 where the sum of samples would not be exact in bf16."""
        samples = 1 if self.gradient is None else self.gradient.samples
        if samples > 1 and samples * max(self.gradient.form.limit, self.gradient.form.unsigned_limit) > EXACT_IN_BF16:
            return torch.float32
        return self.gemm_dtype(dtype)


def exponent_counts(x: Tensor) -> Tensor:
    """How many elements of x have each float32 exponent: int64 (256,), bin e for 2^(e - 127) <= |x| < 2^(e - 126)."""
    exponents = (x.detach().float().reshape(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return torch.bincount(exponents, minlength=256)


class QuantizedGemm(torch.autograd.Function):
    """fprop, and in the backward pass dgrad and wgrad, each on the operands that the plan quantizes.

    Straight-through for weight and activation; the gradient is quantized once (a draw each sample) for both GEMMs.
    """

    @staticmethod
    def forward(ctx, activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype):
        a, w = plan.quantize("activation", activation), plan.quantize("weight", weight)
        ctx.save_for_backward(*a, *w)
        ctx.op, ctx.plan, ctx.dtypes = op, plan, (activation.dtype, weight.dtype)
        compute = plan.gemm_dtype(dtype)
        with torch.autocast(activation.device.type, enabled=False):
            product = op.fprop(a.values.to(compute), w.values.to(compute))
            return rescale(product, a, w).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        a, w = Operand(*saved[:3]), Operand(*saved[3:])
        op, plan = ctx.op, ctx.plan
        need_dgrad, need_wgrad = ctx.needs_input_grad[:2]
        for_dgrad, for_wgrad = plan.quantize_gradient(grad_output)
        dgrad_dtype, wgrad_dtype = plan.gemm_dtype(grad_output.dtype), plan.wgrad_dtype(grad_output.dtype)

        def gemms(g: Operand, dtype: torch.dtype, dgrad: bool, wgrad: bool):
            grads = op.backward(g.values.to(dtype), a.values.to(dtype), w.values.to(dtype), dgrad, wgrad)
            return rescale(grads[0], g, w), rescale(grads[1], g, a)

        with torch.autocast(grad_output.device.type, enabled=False):
            if for_dgrad is for_wgrad:
                grad_a, grad_w = gemms(for_wgrad, wgrad_dtype, need_dgrad, need_wgrad)
            else:
                grad_a = gemms(for_dgrad, dgrad_dtype, True, False)[0] if need_dgrad else None
                grad_w = gemms(for_wgrad, wgrad_dtype, False, True)[1] if need_wgrad else None
        activation_dtype, weight_dtype = ctx.dtypes
        grad_a = None if grad_a is None else grad_a.to(activation_dtype)
        grad_w = None if grad_w is None else grad_w.to(weight_dtype)
        return grad_a, grad_w, None, None, None
