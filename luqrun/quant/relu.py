"""The ReLU and ReLU6 of a quantized model: they keep one bit an element for their backward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from luqrun.errors import UserError
from luqrun.internals.of_torch import autograd_alone, is_batched, is_view
from luqrun.quant.kernels import backend_for, ops
from luqrun.quant.kernels.layout import dense, in_channels_last, is_channels_last
from luqrun.quant.layers import as_leaf
from luqrun.quant.measured import Wish, remember, wish_of
from luqrun.quant.norm import Made, gradients, take_last

Found = tuple[Tensor, bool] | tuple[()]  # where what is measured goes, and whether with moments; or nothing is


class Taken:
    """A batch norm's output that is rectified already, and whether the ReLU after it has taken it as it is."""

    def __init__(self, most: float | None):
        self.most, self.done = most, False

    def wait_for(self, output: Tensor) -> None:
        self.output, self.version, _waiting.taken = weakref.ref(output), output._version, self

    @staticmethod
    def take(x: Tensor, most: float | None) -> bool:
        """Whether x is the last of these, unchanged. Only once."""
        last = _waiting.taken
        if last is None or last.output() is not x or last.version != x._version or last.most != most:
            return False
        last.done, _waiting.taken = True, None
        return True


class _Waiting(threading.local):
    taken: Taken | None = None


_waiting = _Waiting()


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
        return *_past_both(ctx, grad_output), None, None, None, None


class BatchNormReLUFunction(torch.autograd.Function):
    """A batch norm in training and the ReLU after it, in one pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, running: tuple, momentum: float, eps: float, wish: Wish, taken: Taken, found):
        kernels = backend_for(x.device.type)
        made = kernels.batch_norm_relu(x, weight, bias, *running, momentum, eps, taken.most, *found)
        output, mean, inverse, mask = made
        ctx.save_for_backward(x, weight, mean, inverse, mask)
        ctx.eps, ctx.wish, ctx.taken = eps, wish, taken
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if not ctx.taken.done:
            raise UserError(
                "a batch norm's output was not read by the ReLU that read it when the model was quantized, and is "
                "rectified all the same: quantize_model(..., fuse=False), or fuse=false on the command line"
            )
        return *_past_both(ctx, grad_output), None, None, None, None, None, None


def _past_both(ctx, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of what the batch norm before a ReLU was given."""
    x, *saved, mask = ctx.saved_tensors  # once: activation checkpointing unpacks only once
    saved = in_channels_last(x), *saved  # as the mask is, whatever hooks of saved tensors give back
    if torch.is_grad_enabled() or is_batched(grad_output):
        grad_output, mask = _where_it_passes(grad_output, mask, True), None
    return gradients(ctx, saved, grad_output, mask)


def _where_it_passes(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """ops.relu_backward in torch's own operations: for a derivative of the gradient (create_graph=True), or many
    gradients at once."""
    with torch.no_grad():
        ones = torch.ones(grad.shape, dtype=grad.dtype, device=grad.device)
        passes = ops.relu_backward(ones, mask, channels_last) > 0
    return torch.where(passes, grad, 0)


class _AfterBatchNorm:
    """A ReLU as luqrun.quant.norm knows it. most: the largest value that it lets pass."""

    most: float | None = None

    def of_batch_norm(self, x, weight, bias, running: tuple, momentum: float, eps: float, wish: Wish) -> Tensor:
        """What a batch norm of x, in training, and this one after it give. wish: for x's gradient."""
        own, taken = wish_of(self), Taken(self.most)
        found = own.begin(x)
        output = BatchNormReLUFunction.apply(x, weight, bias, running, momentum, eps, wish, taken, found or ())
        taken.wait_for(output)
        remember(output, own, found)
        return output


class MaskedReLU(_AfterBatchNorm, nn.ReLU):
    """nn.ReLU that keeps one bit an element for its backward pass, where nn.ReLU keeps its output.

    The layer after it keeps packed codes instead of that output, so nothing else would hold it. Compiled, it is
    nn.ReLU: there the compiler fuses it with its neighbours and chooses what to keep.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _rectified(self, input, super().forward)


class MaskedReLU6(_AfterBatchNorm, nn.ReLU6):
    """As MaskedReLU, of nn.ReLU6, which keeps its input. The gradient passes at a NaN, as that of nn.ReLU; torch's
    passes at some of them."""

    most = 6.0

    def forward(self, input: Tensor) -> Tensor:
        return _rectified(self, input, super().forward)


def _rectified(module: _AfterBatchNorm, input: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
    node = as_leaf(module, input)
    if node is not None:
        return node
    most = module.most
    if not torch.compiler.is_compiling() and Taken.take(input, most):
        return input
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
