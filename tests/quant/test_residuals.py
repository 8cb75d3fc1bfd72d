"""What layers keep for their backward pass: packed codes, half a byte an element, and a bit for a ReLU."""

import copy
from itertools import product

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, HINDSIGHT, INT4, LUQ, quantize
from torch import nn

from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("by_operators")  # small tensors are not packed: see test_passes
LAYERS = {
    "linear": (lambda: nn.Linear(96, 64), (50, 96)),
    "linear, odd": (lambda: nn.Linear(33, 31, bias=False), (3, 7, 33)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (4, 16, 12, 12)),
    "conv, odd": (lambda: nn.Conv2d(5, 7, 3, stride=2, bias=False), (3, 5, 11, 13)),
    "pointwise": (lambda: nn.Conv2d(32, 16, 1), (4, 32, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, groups=32), (4, 32, 8, 8)),
}


def bytes_kept(model, x, bf16=False):
    """Bytes of memory, other than the parameters', that the backward pass of model(x) holds; its output."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address might be given to another
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(x)
    return sum(kept.values()), output


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC, HINDSIGHT], ids=lambda recipe: recipe.name)
def test_half_a_byte_an_element(name, recipe, bf16):
    make, shape = LAYERS[name]
    for channels_last, requires_grad in product((False, True) if len(shape) == 4 else (False,), (True, False)):
        layer, x = quantize(make(), recipe), torch.randn(shape)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        kept, output = bytes_kept(layer, x.requires_grad_(requires_grad), bf16)
        elements = x.numel() + (layer.weight.numel() if requires_grad else 0)
        assert 0.5 * elements <= kept <= 0.55 * elements, kept / elements
        output.sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_only_what_is_needed():
    layer, x = quantize(nn.Linear(64, 64)), torch.randn(64, 64)
    layer.weight.requires_grad_(False)
    kept, _ = bytes_kept(layer, x.clone().requires_grad_())
    assert kept <= 0.55 * layer.weight.numel()
    with torch.no_grad():
        assert bytes_kept(layer, x)[0] == 0
    assert bytes_kept(layer, x)[0] == 0  # nothing needs a gradient


def test_wider_formats_take_a_byte_and_operands_without_a_quantizer_what_they_take():
    x = torch.randn(64, 128, requires_grad=True)
    elements = x.numel() + 64 * 128
    wide = Recipe.of("wide", Quantizer("int8"), Quantizer("int8"), E3M0)
    kept, _ = bytes_kept(quantize(nn.Linear(128, 64), wide), x)
    assert elements <= kept <= 1.05 * elements
    kept, _ = bytes_kept(quantize(nn.Linear(128, 64), Recipe.of("weights", weight=INT4)), x)
    assert 4 * x.numel() <= kept <= 4.6 * x.numel()


def test_a_chain_of_layers_and_relus_keeps_codes_and_bits():
    def block(channels):
        return nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(inplace=True)

    plain = nn.Sequential(*block(8), *block(32), *block(32), nn.Conv2d(32, 8, 1))
    x = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last)
    features = 4 * 16 * 16 * 32
    activations = x.numel() + 3 * features
    for bf16 in (False, True):
        model = quantize(copy.deepcopy(plain))
        weights = sum(layer.weight.numel() for layer in list(model)[2::2])  # the first has no dgrad
        kept, output = bytes_kept(model, x, bf16)
        assert kept <= 0.55 * (activations + weights) + 3 * features / 8 + 64
        expected, _ = bytes_kept(copy.deepcopy(plain), x, bf16)
        assert kept < expected / (2.5 if bf16 else 5)
        output.sum().backward()


def test_the_backward_pass_frees_what_was_kept():
    layer, x = quantize(nn.Linear(16, 8)), torch.randn(4, 16, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output = layer(x)
    first = torch.autograd.grad(output.sum(), layer.weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), layer.weight)[0], first)  # the draw has a name: it repeats
