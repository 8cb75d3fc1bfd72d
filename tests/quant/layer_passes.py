"""Layers whose passes are one call each, and what their steps give."""

import copy

import torch
from layers import quantize
from torch import nn

import luqrun
from luqrun.quant.convert import set_step
from luqrun.quant.kernels.cpu import pass_kinds
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

LAST = torch.channels_last

LAYERS = {
    "linear": (lambda: nn.Linear(33, 20), (6, 33)),
    "linear, batches": (lambda: nn.Linear(64, 48, bias=False), (3, 7, 64)),
    "3 x 3": (lambda: nn.Conv2d(16, 24, 3, padding=1, bias=False), (3, 16, 9, 8)),
    "strided": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 11, 9)),
    "some pixels get nothing": (lambda: nn.Conv2d(8, 16, 1, stride=2, bias=False), (2, 8, 6, 7)),
    "pointwise": (lambda: nn.Conv2d(32, 16, 1), (2, 32, 5, 5)),
    "uneven": (lambda: nn.Conv2d(3, 40, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 3, 7, 4)),
    "dilated": (lambda: nn.Conv2d(8, 8, (3, 1), dilation=(2, 1)), (2, 8, 9, 4)),
    "groups": (lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2, bias=False), (2, 32, 6, 6)),
}
RECIPES = {
    "luq": luqrun.recipe("luq"),
    "biased": luqrun.recipe("biased_log"),
    "integers": Recipe.of("integers", Quantizer("int3"), Quantizer("int5"), Quantizer("int4", rounding="stochastic")),
}


def made(name, recipe="luq", dtype=torch.float32):
    """A layer and what it reads, in the memory format of training."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x = quantize(make().to(dtype), RECIPES[recipe]), torch.randn(shape).to(dtype)
    return (layer.to(memory_format=LAST), x.to(memory_format=LAST)) if len(shape) == 4 else (layer, x)


def trained(layer, x, steps=3, bf16=False, contiguous=False):
    """Outputs and gradients of some steps."""
    layer, found = copy.deepcopy(layer), []
    for step in range(steps):
        set_step(layer, step)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        read = leaf.view_as(leaf)  # whose gradient keeps the strides it comes with
        read.register_hook(found.append)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = layer(read)
        g = torch.linspace(-1, 1, y.numel()).sin().view(y.shape).to(y.dtype)
        y.backward(g if contiguous or g.dim() < 4 else g.to(memory_format=LAST))
        found += [y.detach(), *(parameter.grad for parameter in layer.parameters())]
    return found


def assert_alike(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def one_by_one(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(pass_kinds, "MOST", 0)
        return call()
