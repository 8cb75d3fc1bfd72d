"""The ReLU and ReLU6 of a quantized model: they keep one bit an element for their backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luqrun.internals.of_torch import autograd_alone, is_batched, is_view
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import dense, in_channels_last, is_channels_last
from luqrun.quant.layers import as_leaf
from luqrun.quant.measured import remember, wish_of
from luqrun.quant.norm import Made, gradients, take_last

Found = tuple[Tensor, bool] | tuple[()]  # where what is measured goes, and whether with moments; or nothing is


class MaskedReLUFunction(torch.autograd.Function):
    """max(x, 0), or min(max(x, 0), most), keeping a mask of one bit an element."""

    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool, most: float | None, found: Found):
        if inplace:
            ctx.mark_dirty(x)
        else:
            x = dense(x).clone(memory_format=torch.preserve_format)
        ctx.channels_last = is_channels_last(x)
        ctx.save_for_backward(ops.relu_(x, most, *found))
        return x

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (mask,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_batched(grad_output):
            return ops.relu_backward(grad_output, mask, ctx.channels_last), None, None, None
        return _where_it_passes(grad_output, mask, ctx.channels_last), None, None, None


class NormedReLUFunction(torch.autograd.Function):
    """MaskedReLUFunction, in place, of a batch norm's output. The gradient goes to what the batch norm was given."""

    @staticmethod
    def forward(ctx, x, weight, bias, output: Tensor, made: Made, most: float | None, found: Found):
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, weight, made.mean, made.inverse, ops.relu_(output, most, *found))
        ctx.eps, ctx.wish = made.eps, made.wish
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        x, *saved, mask = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        saved = in_channels_last(x), *saved  # as the mask is, whatever hooks of saved tensors give back
        if torch.is_grad_enabled() or is_batched(grad_output):
            grad_output, mask = _where_it_passes(grad_output, mask, True), None
        return *gradients(ctx, saved, grad_output, mask), None, None, None, None


def _where_it_passes(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """ops.relu_backward in torch's own operations: for a derivative of the gradient (create_graph=True), or many
    gradients at once."""
    with torch.no_grad():
        ones = torch.ones(grad.shape, dtype=grad.dtype, device=grad.device)
        passes = ops.relu_backward(ones, mask, channels_last) > 0
    return torch.where(passes, grad, 0)


class MaskedReLU(nn.ReLU):
    """nn.ReLU that keeps one bit an element for its backward pass, where nn.ReLU keeps its output.

    The layer after it keeps packed codes instead of that output, so nothing else would hold it. Compiled, it is
    nn.ReLU: there the compiler fuses it with its neighbours and chooses what to keep.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _rectified(self, input, None, super().forward)


class MaskedReLU6(nn.ReLU6):
    """As MaskedReLU, of nn.ReLU6, which keeps its input. The gradient passes at a NaN, as that of nn.ReLU; torch's
    passes at some of them."""

    def forward(self, input: Tensor) -> Tensor:
        return _rectified(self, input, 6.0, super().forward)


def _rectified(module: nn.Module, input: Tensor, most: float | None, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
    node = as_leaf(module, input)
    if node is not None:
        return node
    # A dispatch mode may keep the clone, and would find it changed.
    if input.is_nested or input.dtype not in (torch.float32, torch.bfloat16) or not autograd_alone(input):
        return otherwise(input)
    if module.inplace and (is_view(input) or dense(input) is not input):
        return otherwise(input)
    # Not where the batch norm's own output stays, and somebody may yet ask for its gradient.
    made = take_last(input) if module.inplace else None
    wish = wish_of(module)
    found = wish.begin(input)
    if made is not None:
        output = NormedReLUFunction.apply(made.x, made.weight, made.bias, input, made, most, found or ())
    else:
        output = MaskedReLUFunction.apply(input, module.inplace, most, found or ())
    remember(output, wish, found)
    return output
