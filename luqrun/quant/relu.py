"""The ReLU and ReLU6 of a quantized model: they keep one bit an element for their backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luqrun.internals.of_torch import PLAIN, has_modes, has_tangent, is_batched, is_transformed, is_view
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import dense, is_channels_last
from luqrun.quant.layers import as_leaf
from luqrun.quant.norm import NormedReLUFunction, take_last


class MaskedReLUFunction(torch.autograd.Function):
    """max(x, 0), or min(max(x, 0), most), keeping a mask of one bit an element."""

    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool, most: float | None):
        if inplace:
            ctx.mark_dirty(x)
        else:
            x = dense(x).clone(memory_format=torch.preserve_format)
        ctx.channels_last = is_channels_last(x)
        ctx.save_for_backward(ops.relu_(x, most))
        return x

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (mask,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_batched(grad_output):
            return ops.relu_backward(grad_output, mask, ctx.channels_last), None, None
        # In torch's own operations: a derivative of the gradient (create_graph=True), or many gradients at once.
        with torch.no_grad():
            ones = torch.ones(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)
            passes = ops.relu_backward(ones, mask, ctx.channels_last) > 0
        return torch.where(passes, grad_output, 0), None, None


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
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not input.requires_grad:
        return otherwise(input)
    if input.dtype not in (torch.float32, torch.bfloat16) or type(input) not in PLAIN or input.is_nested:
        return otherwise(input)
    # Who keeps the clone would find it changed; or it is no plain tensor.
    if has_modes() or is_transformed() or has_tangent(input) or torch.jit.is_tracing():
        return otherwise(input)
    if module.inplace and (is_view(input) or dense(input) is not input):
        return otherwise(input)
    # Not where the batch norm's own output stays, and somebody may yet ask for its gradient.
    made = take_last(input) if module.inplace else None
    if made is not None:
        return NormedReLUFunction.apply(made.x, made.weight, made.bias, input, made, most)
    return MaskedReLUFunction.apply(input, module.inplace, most)
