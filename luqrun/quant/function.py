"""The three GEMMs of a layer on codes, as one autograd Function for linear and convolution alike.

fprop: z = W a with INT4 x INT4 codes; dgrad: INT4 weight x FP4 gradient; wgrad: FP4 gradient x INT4 activation
(Eqs. 1-3). Codes are exact in int8, fp32, TF32 and bf16, and so is a sum of their products (in floating point while
it stays below 2^24); scales multiply afterwards. An operand without a quantizer enters its GEMMs in high precision.
What is kept for the backward pass are packed codes: half a byte an element.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.errors import TensorError
from luqrun.internals import is_batched, is_watched
from luqrun.quant.formats import Format
from luqrun.quant.gemms import ConvOp, LinearOp, use_int8
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import dense, is_channels_last
from luqrun.quant.quantizer import QuantizedTensor, Quantizer, health

EXACT = {torch.int8: 127, torch.bfloat16: 256, torch.float32: 2**24}  # the integers up to which each holds all
MAX_INT8_DRAWS = 2  # more int8 GEMMs than this cost more than one in floating point


class Operand(NamedTuple):
    """What enters a GEMM: codes (a sum of draws, of which `others` are more), their scale and signedness, or a
    high-precision tensor and twice None."""

    values: Tensor
    scale: Tensor | None = None
    signed: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    def has_int8(self) -> bool:
        return self.scale is not None and self.values.dtype == torch.int8

    def as_float(self, dtype: torch.dtype) -> Tensor:
        """The values as `dtype`, all draws summed."""
        total = self.values.to(dtype)
        for other in self.others:
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


class Kept(NamedTuple):
    """An operand between the passes. tensors: what autograd keeps (packed codes, scale, signed; or the tensor itself);
    the rest says how to read them."""

    tensors: tuple[Tensor, ...]
    form: Format | None = None
    shape: tuple[int, ...] = ()
    channels_last: bool = False

    def operand(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Operand:
        """The operand again, its codes as `dtype`, from the tensors that autograd kept."""
        if self.form is None:
            return Operand(tensors[0])
        fields, scale, signed = tensors[:3]
        layout, dtype = (self.shape, self.channels_last), held_by(self.form, dtype)
        return Operand(ops.unpack(fields, *layout, signed, self.form.name, dtype), scale, signed)


@dataclass
class Plan:
    """What one call of a layer does: its quantizers (None: high precision), draws and memory.

    streams: by operand, the int64 (6,) names of the draws. hindsight: by operand, the 0-dim maxima; observe is told
    the new ones and is None where they must not change. health: by operand, filled where it is a dict. keep: whether
    a backward pass may follow. share: what makes a tensor's statistics those of all processes (Quantizer.measure), for
    operands that are not the same in all of them.
    """

    weight: Quantizer | None
    activation: Quantizer | None
    gradient: Quantizer | None
    streams: dict[str, Tensor]
    hindsight: dict[str, Tensor]
    observe: Callable[[str, Tensor], None] | None = None
    health: dict | None = None
    keep: bool = True
    share: Callable[[Tensor], Tensor] | None = None

    def quantize(self, operand: str, x: Tensor, dtype: torch.dtype, packed: bool = False) -> tuple[Operand, Kept]:
        """x as an Operand with codes of `dtype` (or float32 where that cannot hold them), and as what is kept of it
        with `packed`: one draw."""
        quantizer = getattr(self, operand)
        if quantizer is None:
            return Operand(x), Kept((x,))
        form = quantizer.form
        dtype = held_by(form, dtype)
        share = None if operand == "weight" else self.share
        encoded = quantizer.run(x, self.streams[operand], self.hindsight.get(operand), dtype, packed, share)
        if operand in self.hindsight and self.observe is not None and x.numel():
            self.observe(operand, encoded.maximum)
        if self.health is not None:
            quantized = QuantizedTensor(encoded.codes, encoded.scale, encoded.signed, form)
            self.health[operand] = health(x, quantized)
        kept = Kept((encoded.fields, encoded.scale, encoded.signed), form, x.shape, is_channels_last(x))
        return Operand(encoded.codes, encoded.scale, encoded.signed), kept

    def quantize_gradient(self, g: Tensor, dtype: torch.dtype) -> tuple[Operand, Operand]:
        """The gradient for dgrad and for wgrad; the same object where one serves both.

        With two phases they are two quantizations. With N samples the wgrad operand is the sum of N draws' codes, its
        scale divided by N: one GEMM gives the average of the N weight gradients (SMP).
        """
        if self.health is not None:
            self.health["gradient_exponents"] = exponent_counts(g)
        first, _ = self.quantize("gradient", g, dtype)
        quantizer = self.gradient
        if quantizer is None or (quantizer.samples == 1 and not quantizer.two_phase):
            return first, first
        total, scale, signed, _ = first
        if quantizer.two_phase:
            half = scale / 2
            codes = quantizer.encode(g, half, signed, self.streams["gradient"], 1, total.dtype)
            return first, Operand(codes, half, signed)
        limit = quantizer.samples * max(quantizer.form.limit, quantizer.form.unsigned_limit)
        others = ()
        draws = (
            quantizer.encode(g, scale, signed, self.streams["gradient"], sample, first.values.dtype)
            for sample in range(1, quantizer.samples)
        )
        if total.dtype == torch.int8 and limit > EXACT[torch.int8] and quantizer.samples <= MAX_INT8_DRAWS:
            others = tuple(draws)
        else:
            total = total.to(total.dtype if limit <= EXACT[total.dtype] else torch.float32, copy=True)
            for codes in draws:
                total += codes
        averaged = Operand(total, scale / quantizer.samples, signed, others)
        return (averaged if quantizer.samples_scope == "both" else first), averaged


def exponent_counts(x: Tensor) -> Tensor:
    """How many elements of x have each float32 exponent: int64 (256,), bin e for 2^(e - 127) <= |x| < 2^(e - 126)."""
    exponents = (x.detach().float().reshape(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return torch.bincount(exponents, minlength=256)


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a floating-point GEMM runs in: bf16 for bf16 results, else fp32, since sums of codes leave fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _in_given_types(x: Operand) -> AbstractContextManager:
    """Within, torch multiplies what it is given as it is: autocast would make fp32 bf16."""
    device_type = x.values.device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def fprop(op: LinearOp | ConvOp, a: Operand, w: Operand, dtype: torch.dtype) -> Tensor:
    if a.has_int8() and w.has_int8() and op.int8_pays(w.values.shape)[0]:
        return op.int8_fprop(a.values, w.values, a.scale * w.scale, float_dtype(dtype), a.signed)
    compute = float_dtype(dtype)
    with _in_given_types(a):
        return rescale(op.fprop(a.as_float(compute), w.as_float(compute)), a, w)


def dgrad(op: LinearOp | ConvOp, g: Operand, w: Operand, a_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if g.has_int8() and w.has_int8() and not g.others and op.int8_pays(w.values.shape)[1]:
        return op.int8_dgrad(g.values, w.values, g.scale * w.scale, float_dtype(dtype), g.signed, a_shape)
    compute = torch.float32 if g.values.dtype == torch.float32 else float_dtype(dtype)
    with _in_given_types(g):
        return rescale(op.dgrad(g.as_float(compute), w.as_float(compute), a_shape), g, w)


def wgrad(op: LinearOp | ConvOp, g: Operand, a: Operand, w_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if g.has_int8() and a.has_int8() and op.int8_pays(w_shape)[2]:
        return rescale(op.int8_wgrad([g.values, *g.others], a.values, w_shape), g, a)
    # A sum of samples that bf16 does not hold comes as float32.
    compute = torch.float32 if g.values.dtype == torch.float32 else float_dtype(dtype)
    with _in_given_types(g):
        return rescale(op.wgrad(g.as_float(compute), a.as_float(compute), w_shape), g, a)


def code_dtype(x: Tensor, int8_pays: bool, dtype: torch.dtype) -> torch.dtype:
    """What x's codes are best written as: what the GEMM takes."""
    return torch.int8 if int8_pays and use_int8(x.device.type) else float_dtype(dtype)


def traced_gemm(activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype) -> Tensor:
    """What QuantizedGemm computes, without a backward pass: torch.jit.trace cannot follow its arguments."""
    codes = code_dtype(activation, op.int8_pays(weight.shape)[0], dtype)
    (a, _), (w, _) = plan.quantize("activation", activation, codes), plan.quantize("weight", weight, codes)
    return ops.forward_only(fprop(op, a, w, dtype).to(dtype), activation, weight)


class QuantizedGemm(torch.autograd.Function):
    """fprop, and in the backward pass dgrad and wgrad, each on the operands that the plan quantizes.

    Straight-through for weight and activation; the gradient is quantized once (a draw each sample) for both GEMMs.
    """

    @staticmethod
    def forward(ctx, activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype):
        codes = code_dtype(activation, op.int8_pays(weight.shape)[0], dtype)
        need_a, need_w = plan.keep and ctx.needs_input_grad[1], plan.keep and ctx.needs_input_grad[0]
        a, kept_a = plan.quantize("activation", activation, codes, packed=need_a)
        w, kept_w = plan.quantize("weight", weight, codes, packed=need_w)
        kept = (*(kept_a.tensors if need_a else ()), *(kept_w.tensors if need_w else ()))
        if torch.compiler.is_compiling():  # it makes constants of sizes that no tensor holds
            kept = (*kept, activation.new_empty(()).expand(activation.shape))
        else:
            ctx.a_shape = activation.shape
        ctx.save_for_backward(*kept)
        # Without the tensors: autograd alone may hold them, so that they are freed with the graph.
        ctx.kept_a, ctx.kept_w = kept_a._replace(tensors=(), shape=()), kept_w._replace(tensors=())
        ctx.op, ctx.plan, ctx.needs, ctx.split = op, plan, (need_a, need_w), len(kept_a.tensors)
        ctx.a_dtype, ctx.like_w = activation.dtype, (weight.shape, weight.dtype)
        return fprop(op, a, w, dtype).to(dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:  # create_graph=True
            raise TensorError(
                "a gradient through quantized layers has no derivative (create_graph=True, as for a gradient penalty): "
                "leave these layers in high precision with skip"
            )
        if not compiling and is_batched(grad_output):
            raise TensorError("quantized layers take one gradient at a time, not is_grads_batched or vectorize=True")
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        need_a, need_w = ctx.needs
        dtype = grad_output.dtype
        a_shape, (w_shape, w_dtype) = saved[-1].shape if compiling else ctx.a_shape, ctx.like_w
        _, int8_dgrad, int8_wgrad = ctx.op.int8_pays(w_shape)
        codes = code_dtype(grad_output, int8_dgrad or int8_wgrad, dtype)
        for_dgrad, for_wgrad = ctx.plan.quantize_gradient(grad_output, codes)
        grad_a = grad_w = None
        if need_w:
            codes = code_dtype(grad_output, int8_dgrad, dtype)
            w = ctx.kept_w.operand(saved[ctx.split if need_a else 0 :], codes)
            grad_a = dgrad(ctx.op, for_dgrad, w, a_shape, dtype).to(ctx.a_dtype)
        if need_a:
            codes = code_dtype(grad_output, int8_wgrad, dtype)
            a = ctx.kept_a._replace(shape=a_shape).operand(saved[: ctx.split], codes)
            grad_w = wgrad(ctx.op, for_wgrad, a, w_shape, dtype).to(w_dtype)
        return grad_a, grad_w, None, None, None


class MaskedReLUFunction(torch.autograd.Function):
    """max(x, 0), keeping a mask of one bit an element."""

    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool):
        if inplace:
            ctx.mark_dirty(x)
        else:
            x = dense(x).clone(memory_format=torch.preserve_format)
        ctx.channels_last = is_channels_last(x)
        ctx.save_for_backward(ops.relu_(x))
        return x

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (mask,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_batched(grad_output):
            return ops.relu_backward(grad_output, mask, ctx.channels_last), None
        # In torch's own operations: a derivative of the gradient (create_graph=True), or many gradients at once.
        with torch.no_grad():
            ones = torch.ones(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)
            passes = ops.relu_backward(ones, mask, ctx.channels_last) > 0
        return torch.where(passes, grad_output, 0), None
