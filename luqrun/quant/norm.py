"""The batch norm of a quantized model: torch's numbers, in less time, and with fewer passes backward where a ReLU
follows."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luqrun.internals.of_torch import autograd_alone, is_batched
from luqrun.quant.kernels import backend_for, reference
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.layers import as_leaf
from luqrun.quant.measured import Wish, remember, wish_of


@dataclass(slots=True)
class Made:
    """What a batch norm makes its output of. versions: of x and weight, as it reads them; wish: for x's gradient; mean,
    inverse: of each channel, and 1 / its standard deviation, once they are known."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    versions: tuple[int, int]
    wish: Wish
    mean: Tensor | None = None
    inverse: Tensor | None = None


def _versions(x: Tensor, weight: Tensor | None) -> tuple[int, int]:
    return x._version, 0 if weight is None else weight._version


class _Output:
    """An output, which is not held, and while it lives what it was made of."""

    def __init__(self, output: Tensor, made: Made):
        self.made, self.version = made, output._version
        mine = weakref.ref(self)  # no cycle, which would hold what was made until a garbage collection

        def forget(_) -> None:  # in whichever thread it dies
            if (own := mine()) is not None:
                own.made = None

        self.tensor = weakref.ref(output, forget)

    def is_untouched(self, output: Tensor) -> bool:
        """Whether it is this tensor, nobody changed it or what it was made of since, and nobody wants its gradient."""
        if self.tensor() is not output or self.version != output._version:
            return False
        same = self.made.versions == _versions(self.made.x, self.made.weight)
        return same and not output._backward_hooks and not output.retains_grad


class _Last(threading.local):
    output: _Output | None = None


_last = _Last()


def take_last(output: Tensor) -> Made | None:
    """What the last batch norm of this thread made this output of; None for another one, or where somebody changed it
    or wants its gradient. Only once."""
    last, _last.output = _last.output, None
    return last.made if last is not None and last.is_untouched(output) else None


def gradients(ctx, saved: tuple[Tensor, ...], grad: Tensor, mask: Tensor | None) -> list[Tensor | None]:
    """Of x, weight and bias, those that are needed. saved: x, weight, mean and inverse; mask: of a ReLU, or None."""
    # In torch's own operations: a derivative of the gradient (create_graph=True), or many gradients at once.
    in_torch = torch.is_grad_enabled() or is_batched(grad)
    kernels = reference if in_torch else backend_for(saved[0].device.type)
    found = None if in_torch else ctx.wish.begin(grad, can_do_moments=False)
    made = kernels.batch_norm_backward(grad, mask, *saved, ctx.eps, None if found is None else found[0])
    remember(made[0], ctx.wish, found)
    return [each if needed else None for each, needed in zip(made, ctx.needs_input_grad, strict=False)]


class BatchNormFunction(torch.autograd.Function):
    """The output of a batch norm in training."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, running: tuple, momentum: float, made: Made):
        output, mean, inverse = backend_for(x.device.type).batch_norm(x, weight, bias, *running, momentum, made.eps)
        made.mean, made.inverse = mean, inverse
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.wish = made.eps, made.wish
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is None:  # a ReLU's own function has taken it past this one
            return (None,) * 6
        return *gradients(ctx, ctx.saved_tensors, grad, None), None, None, None


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the same numbers, bit for bit. In training on the CPU (float32 or, beside float32 parameters,
    bf16; channels_last memory; not compiled) its backward pass is one with that of a ReLU, in place, after it."""

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        if node is not None:
            return node
        weight, bias = self.weight, self.bias  # once: a parametrization computes them
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if not self.training or not autograd_alone(input) or not _fuses(input, weight, bias, *running):
            return super().forward(input)
        momentum, eps = self.momentum, self.eps
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        made = Made(input, weight, bias, eps, _versions(input, weight), wish_of(self))
        output = BatchNormFunction.apply(input, weight, bias, running, momentum or 0.0, made)
        _last.output = _Output(output, made)
        return output


def _fuses(x: Tensor, *others: Tensor | None) -> bool:
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or not is_channels_last(x):
        return False
    # Other sizes, and one value a channel, are torch's to refuse: its function that gives mean and deviation does not
    # look.
    channels, given = x.shape[1:2], False
    for other in others:
        if other is not None:
            given = True
            if other.dtype != torch.float32 or other.shape != channels:
                return False
    return x.numel() > x.shape[1] and (x.dtype == torch.float32 or given)  # else torch has bf16 moments
