"""LUQ as one would write it down from the paper: its formulas in torch operations, and fake quantization.

What luqrun's kernels and layers are compared with. Nothing here is used for training.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.recipe import Recipe

LEVELS = 6  # E3M0: magnitudes alpha, 2 alpha, ..., 2^6 alpha
C1, C2 = 12.1, 12.2  # SAWB at 4 bits
SMALLEST = torch.finfo(torch.float32).tiny


def stochastic_underflow(x: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 10: |x| < alpha becomes sign(x) alpha with probability |x| / alpha, else 0."""
    up = torch.rand_like(x) < x.abs() / alpha
    pruned = torch.where(up, torch.sign(x) * alpha, torch.zeros_like(x))
    return torch.where(x.abs() < alpha, pruned, x)


def logarithmic_rounding(x: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 12: a magnitude between 2^(n-1) alpha and 2^n alpha goes up with the probability that keeps its mean."""
    magnitude = x.abs() / alpha
    low = torch.pow(2.0, torch.floor(torch.log2(magnitude)))  # 0 for 0
    up = torch.rand_like(x) < (magnitude - low) / low
    return torch.sign(x) * torch.where(up, 2 * low, low) * alpha


def luq(x: Tensor) -> Tensor:
    """x on the grid of E3M0, unbiased (Eqs. 10 to 16): values of x's shape and dtype."""
    values = x.float()
    alpha = (values.abs().max() / 2.0**LEVELS).clamp(min=SMALLEST)  # all zeros stay zeros
    return logarithmic_rounding(stochastic_underflow(values, alpha), alpha).to(x.dtype)


def sawb_int4(x: Tensor) -> Tensor:
    """x on the uniform INT4 grid, rounded to nearest, with SAWB's range: values of x's shape and dtype.

    The grid is 0..15 where x has no negative value, else -7..7.
    """
    values = x.float()
    clip = C1 * values.square().mean().sqrt() - C2 * values.abs().mean()
    largest = values.abs().max()
    clip = torch.where(clip > 0, torch.minimum(clip, largest), largest)
    signed = (values < 0).any()
    limit = torch.where(signed, 7.0, 15.0)
    scale = (clip / limit).clamp(min=SMALLEST)
    codes = torch.round(values / scale).clamp(torch.where(signed, -7.0, 0.0), limit)
    return (codes * scale).to(x.dtype)


class QuantizedOperand(torch.autograd.Function):
    """Straight-through: the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return sawb_int4(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        return grad_output


class QuantizedGradient(torch.autograd.Function):
    """The identity, whose gradient is quantized."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> Tensor:
        return luq(grad_output)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = QuantizedGradient.apply(F.linear(QuantizedOperand.apply(x), QuantizedOperand.apply(weight)))
    return output if bias is None else output + bias.to(output.dtype)


class FormulaLinear(nn.Linear):
    """nn.Linear with fake-quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.weight, self.bias)


class FormulaConv2d(nn.Conv2d):
    """nn.Conv2d with fake-quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        product = self._conv_forward(QuantizedOperand.apply(input), QuantizedOperand.apply(self.weight), None)
        output = QuantizedGradient.apply(product)
        return output if self.bias is None else output + self.bias.to(output.dtype).view(-1, 1, 1)


class FormulaAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with fake-quantized projections: self-attention, batch first, without masks."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, None]:
        assert query is key is value
        assert self.batch_first
        assert not options.get("need_weights", True)
        projected = _linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2) for x in projected)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(-3, -2).flatten(-2)), None


_TWINS = {nn.Linear: FormulaLinear, nn.Conv2d: FormulaConv2d, nn.MultiheadAttention: FormulaAttention}


def formula_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`model` with the layers that `recipe` would quantize made ones of the formulas, in place."""
    twin = quantize_model(copy.deepcopy(model), recipe)
    names = {name for name, _ in quantized_layers(twin)}
    for name, module in model.named_modules():
        if name in names:
            module.__class__ = next(new for old, new in _TWINS.items() if isinstance(module, old))
    return model
