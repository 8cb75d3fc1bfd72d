"""What a layer whose operands have blocks must compute: its GEMMs in float64, each on operands that the public
`quantize` made along the contraction of that GEMM."""

from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from luqrun.quant import quantizer as quantizers
from luqrun.quant.grids import Lines
from luqrun.quant.kernels.philox import make_stream, of_gemm
from luqrun.quant.recipe import OPERANDS
from luqrun.quant.rotation import rotate, signs_of, unrotate

LAST = torch.channels_last
SEED, STEP = 11, 5
FIRST = {"weight": "fprop", "activation": "fprop", "gradient": "dgrad"}  # the GEMM that takes an operand first
EPS = 2.0**-24


def without_mask(recipe):
    """The recipe, whose gradients are those of its GEMMs: test_trust_mask.py has what a trust mask takes from them."""
    return replace(recipe, fprop=recipe.fprop._replace(trust_mask=False))


def streams(step=STEP, layer=0):
    """By operand, the names of the draws of the first forward of a step."""
    return {name: make_stream(SEED, layer, number, step) for number, name in enumerate(OPERANDS)}


def contraction(layer, gemm, operand, x):
    """(x as a view, the axis in it along which the GEMM sums): input channels at each tap in fprop, output channels in
    dgrad, of a group; the images at each pixel in wgrad, or the rows of a linear layer."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]), 0 if gemm == "wgrad" or (gemm, operand) == ("dgrad", "weight") else 1
    if gemm == "wgrad":
        return x, 0
    if operand == "weight":
        return (x, 1) if gemm == "fprop" else (x.unflatten(0, (layer.groups, -1)), 1)
    return x.unflatten(1, (layer.groups, -1)), 2


def tiled(layer, operand, x):
    """x with the two axes of a tile last: output by input channels of a group at each tap, or images by channels."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if operand == "weight":
        return x.unflatten(0, (layer.groups, -1)).permute(3, 4, 0, 1, 2)
    return x.unflatten(1, (layer.groups, -1)).permute(3, 4, 1, 0, 2)


def untiled(layer, operand, values, shape):
    """The inverse of `tiled`."""
    if isinstance(layer, nn.Linear):
        return values.reshape(shape)
    order = (2, 3, 4, 0, 1) if operand == "weight" else (3, 2, 4, 0, 1)
    return values.permute(order).reshape(shape)


def quantized(quantizer, x, axis=-1, stream=None, sample=0):
    """The values (float32) of the public `quantize`, of the draw that `stream` names."""
    with mock.patch.object(quantizers, "make_stream", return_value=make_stream() if stream is None else stream):
        return quantizer.quantize(x, sample=sample, axis=axis).dequantize()


class Expected:
    """The operands of a layer's GEMMs, and these. tensors: by operand, in float32 or bf16. mean: what is drawn is left
    as it was before its draw, which is its expectation where the draw is unbiased."""

    def __init__(self, layer, recipe, tensors, mean=False):
        self.layer, self.recipe, self.tensors = layer, recipe, {key: x.detach() for key, x in tensors.items()}
        self.names, self.mean = streams(), mean

    def _rotation(self, gemm):
        pair = getattr(self.recipe, gemm)
        return pair.hadamard if any(each is not None for each in pair.operands) else None

    def _stream(self, gemm, operand):
        """That of the operand; a GEMM's own, where the GEMM before it has quantized the operand in another way."""
        name, first, quantizer = self.names[operand], FIRST[operand], getattr(getattr(self.recipe, gemm), operand)
        before = getattr(getattr(self.recipe, first), operand)
        if gemm == first or before is None:
            return name
        rotated = self._rotation(gemm) is not None or self._rotation(first) is not None
        again = before.encoding != quantizer.encoding or not quantizer.lies_alike or quantizer.requantize or rotated
        return of_gemm(name, gemm) if again else name

    def operand(self, gemm, operand, rotated=False):
        """Its values, float32; where the GEMM rotates it, in the rotated axes, or back with rotated=False."""
        quantizer, x = getattr(getattr(self.recipe, gemm), operand), self.tensors[operand]
        if quantizer is not None and quantizer.requantize and getattr(self.recipe.fprop, operand) is not None:
            x = self.operand("fprop", operand)
        view, axis = contraction(self.layer, gemm, operand, x)
        rotation = self._rotation(gemm)
        lines = Lines.along(view.shape, axis)
        signs = None if rotation is None else signs_of(rotation, self.names["weight"], gemm)
        if rotation is not None:
            view = rotate(view.contiguous(), lines, rotation, signs)
        values = view.float()
        quantizer = None if quantizer is not None and quantizer.is_stochastic and self.mean else quantizer
        if quantizer is not None and quantizer.encoding.tile is not None:
            assert not quantizer.is_stochastic, "draws are numbered by the elements of x, not of its tiles"
            found = quantized(quantizer, tiled(self.layer, operand, view.reshape(x.shape)))
            values = untiled(self.layer, operand, found, x.shape).reshape(view.shape)
        elif quantizer is not None:
            name = self._stream(gemm, operand)
            draws = [quantized(quantizer, view, axis, name, sample) for sample in range(quantizer.samples)]
            values = sum(each.double() for each in draws) / quantizer.samples if len(draws) > 1 else draws[0]
        if rotation is not None and not rotated:
            values = unrotate(values.float().contiguous(), lines, rotation, signs)
        return values.reshape(x.shape)

    def product(self, gemm, transform=lambda x: x):
        """Of the two operands as `transform` has them, in float64."""
        one, other = (transform(self.operand(gemm, each, rotated=True).double()) for each in PAIRS[gemm])
        a, w = (transform(self.tensors[each].double()) for each in ("activation", "weight"))
        if gemm == "fprop":
            return forward(self.layer, one, other)
        if gemm == "dgrad":
            return torch.autograd.grad(forward(self.layer, a.requires_grad_(), other), a, one)[0]
        return torch.autograd.grad(forward(self.layer, other, w.requires_grad_()), w, one)[0]

    def check(self, gemm, found, precision=0.0):
        """Assert that `found` is that GEMM to the rounding of its float32 sum, and `precision` of each result."""
        assert not torch.is_autocast_enabled("cpu")
        exact, magnitude = self.product(gemm), self.product(gemm, torch.abs)
        assert found.shape == exact.shape, gemm
        weight, gradient = self.layer.weight, self.tensors["gradient"]
        terms = {"fprop": weight[0].numel(), "dgrad": weight[:, 0].numel(), "wgrad": gradient.numel() // len(weight)}
        bound = (terms[gemm] + 16) * EPS * magnitude + precision * exact.abs() + 1e-38
        error = (found.double() - exact).abs()
        assert (error <= bound).all(), (gemm, (error / bound).max())
        assert exact.abs().max() > 0 or not exact.numel(), gemm


PAIRS = {"fprop": ("activation", "weight"), "dgrad": ("gradient", "weight"), "wgrad": ("gradient", "activation")}


def forward(layer, a, w):
    """The layer's product of a and w, without its bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(a, w)
    return F.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
