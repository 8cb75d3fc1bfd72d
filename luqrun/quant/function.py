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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luqrun.errors import TensorError
from luqrun.internals.of_torch import has_saved_hooks, is_batched
from luqrun.quant import mfbprop_gemms
from luqrun.quant.gemms import ConvOp, LinearOp, use_int8
from luqrun.quant.kernels import fuses, ops
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.operators import directly, is_direct
from luqrun.quant.operands import Operand, Stored, rescale
from luqrun.quant.plan import Plan
from luqrun.quant.routes import chosen, fastest, size_class
from luqrun.quant.sharing import forget, forget_others, reads_alone

if TYPE_CHECKING:
    from luqrun.quant.kernels.cpu.passes import LayerPass

INTEGERS, FLOATS = "int8", "floating point"


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a floating-point GEMM runs in: bf16 for bf16 results, else fp32, since sums of codes leave fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _computed_in(dtype: torch.dtype, first: Operand, other: Operand, gradient: bool = False) -> torch.dtype:
    """What a floating-point GEMM with results of `dtype` runs in: fp32 where bf16 would round blocks, or where the
    first is a gradient and float32, such as a sum of samples."""
    wide = first.is_wide() or other.is_wide() or (gradient and first.dtype == torch.float32)
    return torch.float32 if wide else float_dtype(dtype)


def _in_given_types(x: Operand) -> AbstractContextManager:
    """Within, torch multiplies what it is given as it is: autocast would make fp32 bf16."""
    device_type = x.draws[0].device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def fprop(op: LinearOp | ConvOp, a: Operand, w: Operand, dtype: torch.dtype) -> Tensor:
    def in_floats() -> Tensor:
        compute = _computed_in(dtype, a, w)
        with _in_given_types(a):
            return rescale(op.fprop(a.as_float(compute), w.as_float(compute)), a, w)

    def in_integers() -> Tensor:
        return op.int8_fprop(a.codes, w.codes, a.scale * w.scale, float_dtype(dtype), a.signed)

    pays = a.has_int8() and w.has_int8() and op.int8_pays(w.codes.shape, dtype)[0]
    return _route("fprop", op, (a.draws[0].shape, w.draws[0].shape), pays, in_integers, in_floats)


def _route(
    gemm: str,
    op: LinearOp | ConvOp,
    shapes: tuple,
    pays: bool,
    in_integers: Callable[[], Tensor],
    in_floats: Callable[[], Tensor],
) -> Tensor:
    """shapes: of the activation, and what else the time depends on; pays: see `int8_pays`."""
    if pays and op.groups > 1:
        return fastest(_key(gemm, op, shapes), {INTEGERS: in_integers, FLOATS: in_floats})
    return in_integers() if pays else in_floats()


def _key(gemm: str, op: LinearOp | ConvOp, shapes: tuple) -> tuple:
    return gemm, op, size_class(shapes[0]), *shapes[1:]


def dgrad(op: LinearOp | ConvOp, g: Operand, w: Operand, a_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    def in_floats() -> Tensor:
        compute = _computed_in(dtype, g, w, gradient=True)
        exact = g.scale is not None and w.scale is not None
        with _in_given_types(g):
            return rescale(op.dgrad(g.as_float(compute), w.as_float(compute), a_shape, exact), g, w)

    def in_integers() -> Tensor:
        return op.int8_dgrad(g.codes, w.codes, g.scale * w.scale, float_dtype(dtype), g.signed, a_shape)

    pays = g.has_int8() and w.has_int8() and len(g.draws) == 1 and op.int8_pays(w.codes.shape, dtype)[1]
    return _route("dgrad", op, (a_shape, w.draws[0].shape), pays, in_integers, in_floats)


def wgrad(op: LinearOp | ConvOp, g: Operand, a: Operand, w_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    def in_floats() -> Tensor:
        compute = _computed_in(dtype, g, a, gradient=True)
        with _in_given_types(g):
            return rescale(op.wgrad(g.as_float(compute), a.as_float(compute), w_shape), g, a)

    def in_integers() -> Tensor:
        return rescale(op.int8_wgrad(g.draws, a.codes, w_shape), g, a)

    pays = g.has_int8() and a.has_int8() and op.int8_pays(w_shape, dtype)[2]
    return _route("wgrad", op, (a.draws[0].shape, w_shape, len(g.draws)), pays, in_integers, in_floats)


def code_dtype(x: Tensor, int8_pays: bool, dtype: torch.dtype) -> torch.dtype:
    """What x's codes are best written as: what the GEMM takes."""
    return torch.int8 if int8_pays and use_int8(x.device.type) else float_dtype(dtype)


def _of_codes(first: Operand, other: Operand) -> bool:
    """Whether neither is in high precision."""
    return first.scale is not None and other.scale is not None


def traced_gemm(activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype) -> Tensor:
    """What QuantizedGemm computes, without a backward pass: torch.jit.trace cannot follow its arguments."""
    codes = code_dtype(activation, not plan.has_blocks("fprop") and op.int8_pays(weight.shape, dtype)[0], dtype)
    a, _ = plan.quantize("fprop", "activation", activation, codes)
    w, _ = plan.quantize("fprop", "weight", weight, codes)
    return ops.forward_only(fprop(op, a, w, dtype).to(dtype), activation, weight)


def _trusted(ctx, saved: tuple[Tensor, ...], operand: str, gradient: Tensor) -> Tensor:
    """The gradient of an operand, without what a mask takes from it."""
    if operand not in ctx.masks:
        return gradient
    place, mask = ctx.masks[operand]
    return ctx.plan.trusted(operand, gradient, mask._replace(bits=saved[place]))


def _at_once(
    op: LinearOp | ConvOp, plan: Plan, activation: Tensor, weight: Tensor, dtype: torch.dtype
) -> LayerPass | None:
    """What makes each pass in one call of compiled code, where tensors are small; or None."""
    encodings, device = plan.at_once, activation.device.type
    # With hooks this may be a checkpoint, whose second forward must keep what the first one kept: as many tensors,
    # whoever watches one of them and whatever is known by then.
    if encodings is None or activation.dtype != dtype or not is_direct() or has_saved_hooks():
        return None
    if not (use_int8(device) and fuses(device) and weight.is_cpu):
        return None
    if op.groups > 1 and not _integers_pay(op, activation.shape, weight.shape, dtype):
        return None
    return op.layer_pass(activation, weight, encodings, only_small=not reads_alone(plan.reader))


def _integers_pay(op: ConvOp, a_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `_route` was seen to take integers for all three GEMMs of a convolution with groups."""
    if not all(op.int8_pays(w_shape, dtype)):
        return False
    rests = ("fprop", w_shape), ("dgrad", w_shape), ("wgrad", w_shape, 1)
    return all(chosen(_key(gemm, op, (a_shape, *rest)), (INTEGERS, FLOATS)) == INTEGERS for gemm, *rest in rests)


class QuantizedGemm(torch.autograd.Function):
    """fprop, and in the backward pass dgrad and wgrad, each on the operands that the plan quantizes.

    Straight-through for weight and activation; with a trust mask, for what fprop does not clip of them.
    """

    @staticmethod
    def forward(ctx, activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype):
        if torch.compiler.is_compiling():
            return QuantizedGemm._forward(ctx, activation, weight, op, plan, dtype)
        with directly(activation, weight):
            return QuantizedGemm._forward(ctx, activation, weight, op, plan, dtype)

    @staticmethod
    def _forward(ctx, activation: Tensor, weight: Tensor, op: LinearOp | ConvOp, plan: Plan, dtype: torch.dtype):
        need_a, need_w = plan.keep and ctx.needs_input_grad[1], plan.keep and ctx.needs_input_grad[0]
        compiling = torch.compiler.is_compiling()
        ctx.at_once = _at_once(op, plan, activation, weight, dtype) if need_a and need_w and not compiling else None
        if ctx.at_once is not None:
            forget_others(activation)
            known = plan.known("activation", activation, weight)
            output, kept = ctx.at_once.forward(activation, weight, known, plan.streams)
            ctx.save_for_backward(kept)
            ctx.stored_a, ctx.stored_w = (
                Stored((), how, x.shape, is_channels_last(x))
                for x, how in zip((activation, weight), plan.at_once, strict=False)
            )
            ctx.op, ctx.plan, ctx.needs, ctx.split, ctx.masks = op, plan, (True, True), 3, {}
            ctx.a_shape, ctx.a_dtype, ctx.like_w = activation.shape, activation.dtype, (weight.shape, weight.dtype)
            return output
        codes = code_dtype(activation, not plan.has_blocks("fprop") and op.int8_pays(weight.shape, dtype)[0], dtype)
        a, stored_a = plan.quantize_forward("activation", activation, codes, keep=need_a, learns=need_w)
        w, stored_w = plan.quantize_forward("weight", weight, codes, keep=need_w, learns=need_a)
        kept = (*(stored_a.tensors if need_a else ()), *(stored_w.tensors if need_w else ()))
        ctx.masks = {}  # by operand: where its bits are in what is kept, and how they lie
        for operand, mask in (("activation", stored_a.mask), ("weight", stored_w.mask)):
            if mask is not None:
                ctx.masks[operand] = len(kept), mask._replace(bits=None)
                kept = (*kept, mask.bits)
        if compiling:  # it makes constants of sizes that no tensor holds
            kept = (*kept, activation.new_empty(()).expand(activation.shape))
        else:
            ctx.a_shape = activation.shape
        ctx.save_for_backward(*kept)
        # Without the tensors: autograd alone may hold them, so that they are freed with the graph.
        ctx.stored_a = stored_a._replace(tensors=(), shape=(), mask=None)
        ctx.stored_w = stored_w._replace(tensors=(), mask=None)
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
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        if compiling:
            return QuantizedGemm._backward(ctx, saved, grad_output)
        forget()
        with directly(grad_output, *saved):
            if ctx.at_once is not None:
                at_once = ctx.at_once.with_threads_of_now()
                if at_once is not None and is_direct():
                    return QuantizedGemm._backward_at_once(ctx, at_once, saved[0], grad_output)
                saved = ctx.at_once.tensors(saved[0])  # who watches the backward pass alone sees its operators
            return QuantizedGemm._backward(ctx, saved, grad_output)

    @staticmethod
    def _backward_at_once(ctx, at_once: LayerPass, kept: Tensor, grad_output: Tensor):
        plan = ctx.plan
        known = plan.known("gradient", grad_output)
        grad_a, grad_w = at_once.backward(grad_output, kept, ctx.a_shape, known, plan.stream("gradient"))
        if grad_a.dim() == 4 and not (ctx.stored_w.channels_last or is_channels_last(grad_output)):
            grad_a = torch.empty(grad_a.shape, dtype=grad_a.dtype, device="cpu").copy_(grad_a)  # as torch's would be
        return grad_a, grad_w.to(ctx.like_w[1]), None, None, None

    @staticmethod
    def _backward(ctx, saved: tuple[Tensor, ...], grad_output: Tensor):
        compiling = torch.compiler.is_compiling()
        need_a, need_w = ctx.needs
        dtype = grad_output.dtype
        a_shape, (w_shape, w_dtype) = saved[-1].shape if compiling else ctx.a_shape, ctx.like_w
        _, int8_dgrad, int8_wgrad = ctx.op.int8_pays(w_shape, dtype)
        int8_dgrad = int8_dgrad and not ctx.plan.has_blocks("dgrad")
        int8_wgrad = int8_wgrad and not ctx.plan.has_blocks("wgrad")
        free = ctx.plan.multiplication_free  # such GEMMs take int8 codes, whatever the units
        codes = torch.int8 if free else code_dtype(grad_output, int8_dgrad or int8_wgrad, dtype)
        for_dgrad, for_wgrad = ctx.plan.quantize_gradient(grad_output, codes)
        grad_a = grad_w = None
        if need_w:
            codes = torch.int8 if free else code_dtype(grad_output, int8_dgrad, dtype)
            w = ctx.stored_w.read(ctx.op, saved[ctx.split if need_a else 0 :], codes)
            if free and _of_codes(for_dgrad, w):
                grad_a = mfbprop_gemms.dgrad(ctx.op, for_dgrad, w, a_shape)
            else:
                grad_a = dgrad(ctx.op, for_dgrad, w, a_shape, dtype)
            grad_a = _trusted(ctx, saved, "activation", grad_a).to(ctx.a_dtype)
        if need_a:
            codes = torch.int8 if free else code_dtype(grad_output, int8_wgrad, dtype)
            a = ctx.stored_a._replace(shape=a_shape).read(ctx.op, saved[: ctx.split], codes)
            if free and _of_codes(for_wgrad, a):
                grad_w = mfbprop_gemms.wgrad(ctx.op, for_wgrad, a, w_shape)
            else:
                grad_w = wgrad(ctx.op, for_wgrad, a, w_shape, dtype)
            grad_w = _trusted(ctx, saved, "weight", grad_w).to(w_dtype)
        return grad_a, grad_w, None, None, None
