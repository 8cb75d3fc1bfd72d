"""dgrad and wgrad without multiplications, of linear layers and convolutions (LUQRUN_KERNELS=mfbprop).

A convolution is its GEMM on the pixels that each tap sees, which are only moved for it, and added where taps overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from luqrun.errors import UserError
from luqrun.quant import kernels
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.kernels import backend_for, mfbprop
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.operands import Operand, rescale
from luqrun.quant.recipe import Recipe

BACKWARD = ("dgrad", "wgrad")


def is_chosen(device_type: str) -> bool:
    """Whether the backward pass of layers on this device type is to run here."""
    return backend_for(device_type).__name__ == kernels.MODULES["mfbprop"]


def check(recipe: Recipe) -> None:
    """Raise UserError where a recipe quantizes both operands of a GEMM of the backward pass otherwise than to int4 and
    e3m0, each with one scale and as at most as many samples as are kept apart."""
    for gemm in BACKWARD:
        pair = getattr(recipe, gemm)
        if any(each is None for each in pair.operands):
            continue  # in high precision, whatever the multiplier
        gradient, other = pair.operands
        if not mfbprop.accepts(gradient.form, other.form) or gradient.block is not None or other.block is not None:
            name = pair._fields[1]
            raise UserError(
                f"LUQRUN_KERNELS=mfbprop multiplies int4 by e3m0, with one scale a tensor; {gemm} of "
                f"quant={recipe.name} has gradient={gradient}, {name}={other}"
            )
        if gradient.samples > 2:
            raise UserError(
                f"LUQRUN_KERNELS=mfbprop keeps 2 samples of a gradient apart; quant.gradient.samples={gradient.samples}"
            )


def dgrad(op: LinearOp | ConvOp, g: Operand, w: Operand, a_shape: Sequence[int]) -> Tensor:
    """The gradient of the input, float32: codes of g and w in, scales applied to exact sums."""
    signed = bool(w.signed)  # an emulation may wait for the device
    sums = sum(_dgrad_of_codes(op, draw, w.codes, signed, a_shape) for draw in g.draws)
    last = isinstance(op, ConvOp) and (is_channels_last(g.draws[0]) or is_channels_last(w.codes))
    layout = torch.channels_last if last else torch.contiguous_format
    return rescale(sums.float().contiguous(memory_format=layout), g, w)


def wgrad(op: LinearOp | ConvOp, g: Operand, a: Operand, w_shape: Sequence[int]) -> Tensor:
    """The gradient of the weight, float32."""
    signed = bool(a.signed)
    sums = sum(_wgrad_of_codes(op, draw, a.codes, signed, w_shape) for draw in g.draws)
    return rescale(sums.float(), g, a)


def _product(gradient: Tensor, other: Tensor, signed: bool) -> Tensor:
    """(rows, inner) codes of e3m0 x (inner, columns) of int4, int64."""
    return mfbprop.gemm(other.t(), gradient.t(), signed).t()


def _dgrad_of_codes(op: LinearOp | ConvOp, g: Tensor, w: Tensor, signed: bool, a_shape: Sequence[int]) -> Tensor:
    if isinstance(op, LinearOp):
        return _product(_rows(g), w, signed).reshape(tuple(a_shape))
    channels, found = g.shape[1] // op.groups, []
    for group in range(op.groups):
        part = slice(group * channels, (group + 1) * channels)
        pixels = _rows(g[:, part].permute(0, 2, 3, 1))
        taps = _product(pixels, w[part].reshape(channels, -1), signed)
        columns = taps.unflatten(0, (g.shape[0], -1)).transpose(1, 2)
        # fold only adds what overlaps; float64 holds the sums.
        found.append(F.fold(columns.double(), a_shape[2:], w.shape[2:], op.dilation, op.padding, op.stride))
    return torch.cat(found, 1)


def _wgrad_of_codes(op: LinearOp | ConvOp, g: Tensor, a: Tensor, signed: bool, w_shape: Sequence[int]) -> Tensor:
    if isinstance(op, LinearOp):
        return _product(_rows(g).t(), _rows(a), signed)
    channels, inputs, found = g.shape[1] // op.groups, a.shape[1] // op.groups, []
    for group in range(op.groups):
        gradient = _rows(g[:, group * channels : (group + 1) * channels].permute(0, 2, 3, 1)).t()
        images = a[:, group * inputs : (group + 1) * inputs].float()
        columns = F.unfold(images, tuple(w_shape[2:]), op.dilation, op.padding, op.stride)
        found.append(_product(gradient, _rows(columns.transpose(1, 2)).to(torch.int8), signed))
    return torch.cat(found).reshape(tuple(w_shape))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
