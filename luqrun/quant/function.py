"""The three GEMMs of a layer on codes, as one autograd Function for linear and convolution alike.

fprop: z = W a; dgrad: weight x gradient; wgrad: gradient x activation (Eqs. 1-3), each on what its own quantizers make
of its two operands: INT4 weights and activations and FP4 gradients with LUQ. Codes are exact in int8, fp32, TF32 and
bf16, and so is a sum of their products (in floating point while it stays below 2^24); scales multiply afterwards. An
operand without a quantizer enters its GEMMs in high precision. What is kept for the backward pass are packed codes:
half a byte an element.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.errors import TensorError
from luqrun.internals.of_torch import is_batched, is_watched
from luqrun.quant.formats import Format
from luqrun.quant.gemms import ConvOp, LinearOp, use_int8
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import of_gemm
from luqrun.quant.quantizer import QuantizedTensor, Quantizer, health
from luqrun.quant.recipe import Dgrad, Fprop, Wgrad
from luqrun.quant.sharing import forget, made_once

EXACT = {torch.int8: 127, torch.bfloat16: 256, torch.float32: 2**24}  # the integers up to which each holds all
MAX_INT8_DRAWS = 2  # more int8 GEMMs than this cost more than one in floating point


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


@dataclass
class Plan:
    """What one call of a layer does: the quantizers of its GEMMs (None: high precision), draws and memory.

    streams: by operand, the int64 (6,) names of the draws. hindsight: by operand, the 0-dim maxima; observe is told
    the new ones and is None where they must not change. health: by operand, filled where it is a dict. keep: whether
    a backward pass may follow. reader: names the layer (luqrun.quant.sharing). share: what makes a tensor's statistics
    those of all processes (Quantizer.measure), for operands that are not the same in all of them.
    """

    fprop: Fprop
    dgrad: Dgrad
    wgrad: Wgrad
    streams: dict[str, Tensor]
    hindsight: dict[str, Tensor]
    observe: Callable[[str, Tensor], None] | None = None
    health: dict | None = None
    keep: bool = True
    reader: int = 0
    share: Callable[[Tensor], Tensor] | None = None

    def quantize(
        self, operand: str, x: Tensor, quantizer: Quantizer | None, dtype: torch.dtype, packed: bool = False
    ) -> tuple[Operand, Stored]:
        """x as an Operand with one draw of codes of `dtype` (or float32 where that cannot hold them), and as what is
        kept of it with `packed`, for the first GEMM that quantizes it."""
        if quantizer is None:
            return Operand((x,)), Stored((x,))
        first, stored, maximum = self._encode(operand, x, quantizer, self.streams[operand], dtype, packed)
        if operand in self.hindsight and self.observe is not None and x.numel():
            self.observe(operand, maximum)
        if self.health is not None:
            self.health[operand] = health(x, QuantizedTensor(first.codes, first.scale, first.signed, quantizer.form))
        return first, stored

    def quantize_once_more(
        self, gemm: str, operand: str, x: Tensor, quantizer: Quantizer | None, dtype: torch.dtype, packed: bool = False
    ) -> tuple[Operand, Stored]:
        """`quantize`, for a second GEMM that does it in another way: with a draw of its own."""
        if quantizer is None:
            return Operand((x,)), Stored((x,))
        stream = self.streams[operand]
        stream = of_gemm(stream, gemm) if quantizer.is_stochastic else stream
        return self._encode(operand, x, quantizer, stream, dtype, packed)[:2]

    def _encode(self, operand, x, quantizer, stream, dtype, packed) -> tuple[Operand, Stored, Tensor]:
        share = None if operand == "weight" else self.share
        dtype = held_by(quantizer.form, dtype)
        codes, scale, signed, fields, maximum = quantizer.run(
            x, stream, self.hindsight.get(operand), dtype, packed, share
        )
        stored = Stored((fields, scale, signed), quantizer.form, x.shape, is_channels_last(x))
        return Operand((codes,), scale, signed), stored, maximum

    def quantize_forward(
        self, operand: str, x: Tensor, gemms: dict[str, Quantizer | None], dtype: torch.dtype, keep: bool
    ) -> tuple[Operand, Stored]:
        """x for fprop, and with `keep` what the backward pass takes of it for the other of its two `gemms`.

        Where several layers read one activation, the first of them quantizes it for all.
        """
        first, second = gemms.values()
        alone = self.share is not None or self.health is not None  # what belongs to this layer is done in it
        needed = (first, second) if keep else (first,)
        if operand == "activation" and not alone and all(each is not None and each.repeats for each in needed):
            key = (first, second, dtype, keep)
            return made_once(x, key, self.reader, lambda: self._quantize_forward(operand, x, gemms, dtype, keep))
        return self._quantize_forward(operand, x, gemms, dtype, keep)

    def _quantize_forward(
        self, operand: str, x: Tensor, gemms: dict[str, Quantizer | None], dtype: torch.dtype, keep: bool
    ) -> tuple[Operand, Stored]:
        (_, first), (gemm, second) = gemms.items()
        same = in_same_codes(first, second)
        if first is None and second is not None and keep:
            return Operand((x,)), self.quantize(operand, x, second, dtype, packed=True)[1]
        other = None
        if keep and not same:  # before the first, which may change what a hindsight range remembers
            other = self.quantize_once_more(gemm, operand, x, second, dtype, packed=True)[1]
        found, stored = self.quantize(operand, x, first, dtype, packed=keep and same)
        return found, other or stored

    def quantize_gradient(self, g: Tensor, dtype: torch.dtype) -> tuple[Operand, Operand]:
        """The gradient for dgrad and for wgrad; the same object where one serves both.

        With N samples an operand is the sum of N draws' codes, its scale divided by N: one GEMM gives the average of
        the N products (SMP). The first draw serves both GEMMs where they encode alike.
        """
        if self.health is not None:
            self.health["gradient_exponents"] = exponent_counts(g)
        for_dgrad, for_wgrad = self.dgrad.gradient, self.wgrad.gradient
        apart, other = for_dgrad is not None and not in_same_codes(for_dgrad, for_wgrad), None
        if apart:  # before the first, which may change what a hindsight range remembers
            other, _ = self.quantize_once_more("wgrad", "gradient", g, for_wgrad, dtype)
        one, _ = self.quantize("gradient", g, for_dgrad or for_wgrad, dtype)
        if apart:
            return self._average(g, for_dgrad, one), self._average(g, for_wgrad, other, "wgrad")
        if in_same_codes(for_dgrad, for_wgrad):
            first = self._average(g, for_dgrad, one)
            alike = for_dgrad is None or for_dgrad.samples == for_wgrad.samples
            return first, first if alike else self._average(g, for_wgrad, one)
        return Operand((g,)), self._average(g, for_wgrad, one)

    def _average(self, g: Tensor, quantizer: Quantizer | None, one: Operand, gemm: str | None = None) -> Operand:
        """`one` and the further samples of the quantizer; gemm: whose draws are its own."""
        if quantizer is None or quantizer.samples == 1:
            return one
        (total,), scale, signed = one
        stream = self.streams["gradient"] if gemm is None else of_gemm(self.streams["gradient"], gemm)
        limit = quantizer.samples * max(quantizer.form.limit, quantizer.form.unsigned_limit)
        further = (
            quantizer.encode(g, scale, signed, stream, sample, total.dtype) for sample in range(1, quantizer.samples)
        )
        if total.dtype == torch.int8 and limit > EXACT[torch.int8] and quantizer.samples <= MAX_INT8_DRAWS:
            draws = total, *further
        else:
            total = total.to(total.dtype if limit <= EXACT[total.dtype] else torch.float32, copy=True)
            for codes in further:
                total += codes
            draws = (total,)
        return Operand(draws, scale / quantizer.samples, signed)


def in_same_codes(first: Quantizer | None, second: Quantizer | None) -> bool:
    """Whether two GEMMs can share one quantization of a tensor: all but the number of samples is the same."""
    if first is None or second is None:
        return first is second
    return first.encoding == second.encoding


def exponent_counts(x: Tensor) -> Tensor:
    """How many elements of x have each float32 exponent: int64 (256,), bin e for 2^(e - 127) <= |x| < 2^(e - 126)."""
    exponents = (x.detach().float().reshape(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return torch.bincount(exponents, minlength=256)


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a floating-point GEMM runs in: bf16 for bf16 results, else fp32, since sums of codes leave fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _in_given_types(x: Operand) -> AbstractContextManager:
    """Within, torch multiplies what it is given as it is: autocast would make fp32 bf16."""
    device_type = x.draws[0].device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def fprop(op: LinearOp | ConvOp, a: Operand, w: Operand, dtype: torch.dtype) -> Tensor:
    if a.has_int8() and w.has_int8() and op.int8_pays(w.codes.shape)[0]:
        return op.int8_fprop(a.codes, w.codes, a.scale * w.scale, float_dtype(dtype), a.signed)
    compute = float_dtype(dtype)
    with _in_given_types(a):
        return rescale(op.fprop(a.as_float(compute), w.as_float(compute)), a, w)


def dgrad(op: LinearOp | ConvOp, g: Operand, w: Operand, a_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if g.has_int8() and w.has_int8() and len(g.draws) == 1 and op.int8_pays(w.codes.shape)[1]:
        return op.int8_dgrad(g.codes, w.codes, g.scale * w.scale, float_dtype(dtype), g.signed, a_shape)
    compute = torch.float32 if g.dtype == torch.float32 else float_dtype(dtype)
    with _in_given_types(g):
        return rescale(op.dgrad(g.as_float(compute), w.as_float(compute), a_shape), g, w)


def wgrad(op: LinearOp | ConvOp, g: Operand, a: Operand, w_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if g.has_int8() and a.has_int8() and op.int8_pays(w_shape)[2]:
        return rescale(op.int8_wgrad(g.draws, a.codes, w_shape), g, a)
    # A sum of samples that bf16 does not hold comes as float32.
    compute = torch.float32 if g.dtype == torch.float32 else float_dtype(dtype)
    with _in_given_types(g):
        return rescale(op.wgrad(g.as_float(compute), a.as_float(compute), w_shape), g, a)


def code_dtype(x: Tensor, int8_pays: bool, dtype: torch.dtype) -> torch.dtype:
    """What x's codes are best written as: what the GEMM takes."""
    return torch.int8 if int8_pays and use_int8(x.device.type) else float_dtype(dtype)


def traced_gemm(activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype) -> Tensor:
    """What QuantizedGemm computes, without a backward pass: torch.jit.trace cannot follow its arguments."""
    codes = code_dtype(activation, op.int8_pays(weight.shape)[0], dtype)
    a, _ = plan.quantize("activation", activation, plan.fprop.activation, codes)
    w, _ = plan.quantize("weight", weight, plan.fprop.weight, codes)
    return ops.forward_only(fprop(op, a, w, dtype).to(dtype), activation, weight)


class QuantizedGemm(torch.autograd.Function):
    """fprop, and in the backward pass dgrad and wgrad, each on the operands that the plan quantizes.

    Straight-through for weight and activation.
    """

    @staticmethod
    def forward(ctx, activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype):
        codes = code_dtype(activation, op.int8_pays(weight.shape)[0], dtype)
        need_a, need_w = plan.keep and ctx.needs_input_grad[1], plan.keep and ctx.needs_input_grad[0]
        gemms = {"fprop": plan.fprop.activation, "wgrad": plan.wgrad.activation}
        a, stored_a = plan.quantize_forward("activation", activation, gemms, codes, need_a)
        gemms = {"fprop": plan.fprop.weight, "dgrad": plan.dgrad.weight}
        w, stored_w = plan.quantize_forward("weight", weight, gemms, codes, need_w)
        kept = (*(stored_a.tensors if need_a else ()), *(stored_w.tensors if need_w else ()))
        if torch.compiler.is_compiling():  # it makes constants of sizes that no tensor holds
            kept = (*kept, activation.new_empty(()).expand(activation.shape))
        else:
            ctx.a_shape = activation.shape
        ctx.save_for_backward(*kept)
        # Without the tensors: autograd alone may hold them, so that they are freed with the graph.
        ctx.stored_a, ctx.stored_w = stored_a._replace(tensors=(), shape=()), stored_w._replace(tensors=())
        ctx.op, ctx.plan, ctx.needs, ctx.split = op, plan, (need_a, need_w), len(stored_a.tensors)
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
        if not compiling:
            forget()
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
            w = ctx.stored_w.operand(saved[ctx.split if need_a else 0 :], codes)
            grad_a = dgrad(ctx.op, for_dgrad, w, a_shape, dtype).to(ctx.a_dtype)
        if need_a:
            codes = code_dtype(grad_output, int8_wgrad, dtype)
            a = ctx.stored_a._replace(shape=a_shape).operand(saved[: ctx.split], codes)
            grad_w = wgrad(ctx.op, for_wgrad, a, w_shape, dtype).to(w_dtype)
        return grad_a, grad_w, None, None, None
