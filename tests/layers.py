"""Recipes and small helpers for the tests of quantized layers."""

import torch
from torch import nn

import luqrun
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

INT4 = Quantizer("int4", range="sawb")
INT4_SR = Quantizer("int4", rounding="stochastic")
E3M0 = Quantizer("e3m0", rounding="stochastic")
LUQ = Recipe.of("luq", INT4, INT4, E3M0)
NOTHING = Recipe.of("nothing")
ALL_STOCHASTIC = Recipe.of("stochastic", INT4_SR, INT4_SR, E3M0)
HINDSIGHT = Recipe.of(
    "hindsight",
    Quantizer("int4", range="hindsight"),
    Quantizer("int4", range="hindsight"),
    Quantizer("e3m0", range="hindsight", rounding="stochastic"),
)
BUFFERS = {"weight_hindsight", "activation_hindsight", "gradient_hindsight"}


def quantize(model, recipe=LUQ, **options):
    return luqrun.quantize_model(model, recipe, skip=(), **options)


def mlp(recipe=LUQ, seed=0):
    torch.manual_seed(1)
    return quantize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), recipe, seed=seed)


def train_step(call, x, model=None):
    """Gradients of one training pass of `call`: a model, or what calls `model`."""
    model = call if model is None else model
    model.zero_grad()
    y = call(x)
    (y * torch.arange(1, y.numel() + 1).view_as(y)).sin().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def values(x, quantizer=INT4):
    return quantizer.quantize(x).dequantize()
