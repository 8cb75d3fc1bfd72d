"""What quantize_model takes and what it refuses: models, layers in unusual states, arguments."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from luqrun.errors import UserError
from luqrun.quant.convert import quantize_model, quantized_layers
from tests.layers import INT4, LUQ

REFUSED = {
    "a class in skip": (
        nn.Sequential(nn.Linear(2, 2)),
        {"skip": [nn.Linear]},
        "Linear is not a string; allowed: first",
    ),
    "a layer in skip": (nn.Sequential(nn.Linear(2, 2)), {"skip": [nn.ReLU()]}, r"ReLU\(\) is not a string"),
    "skip is a class": (nn.Sequential(nn.Linear(2, 2)), {"skip": nn.Linear}, "must be a list"),
    "skip is a dict": (nn.Sequential(nn.Linear(2, 2)), {"skip": {"first": True}}, "must be a list"),
    "a seed of text": (nn.Sequential(nn.Linear(2, 2)), {"seed": "1"}, "seed='1' must be an integer"),
    "a list": ([nn.Linear(2, 2)], {}, r"Module, not list: nn.Sequential\(\*layers\)"),
    "a class": (nn.Sequential, {}, r"a model, not its class: Sequential\(...\)"),
    "None": (None, {}, "Module, not NoneType"),
    "a function": (F.relu, {}, "Module, not function"),
    "lazy": (nn.Sequential(nn.LazyLinear(3)), {}, r"0 \(LazyLinear\) has no shape yet: call the model once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_in_a_sentence(name):
    model, options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        quantize_model(model, LUQ, **{"skip": (), **options})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(UserError, match="ScriptModule"):
        quantize_model(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), LUQ)


def test_lazy_layers_that_have_been_called_are_quantized():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(2, 1))
    model[0](torch.randn(1, 2))
    quantize_model(model, LUQ, skip=["1"])
    assert [name for name, _ in quantized_layers(model)] == ["0"]


def held_as(kind, layer):
    """The layer with its weight as a `kind` of attribute, and no bias."""
    weight = layer.weight.detach()
    del layer.weight
    if kind == "buffer":
        layer.register_buffer("weight", weight)
    else:
        layer.weight = weight
    return layer


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(lambda: nn.Linear(6, 4, bias=False), (3, 6)), (lambda: nn.Conv2d(2, 4, 3, bias=False), (2, 2, 5, 5))],
    ids=["linear", "conv"],
)
def test_a_weight_need_not_be_a_parameter(layer, shape, kind):
    layer, x = layer(), torch.randn(shape, requires_grad=True)
    expected = quantize_model(copy.deepcopy(layer), LUQ, skip=())(x)
    keys = list(layer.state_dict()) if kind == "buffer" else []
    for model in (nn.Sequential(held_as(kind, copy.deepcopy(layer))), held_as(kind, copy.deepcopy(layer))):
        model = quantize_model(model, LUQ, skip=())
        assert [key.removeprefix("0.") for key in model.state_dict()] == keys
        x.grad = None
        output = model(x)
        assert torch.equal(output, expected)
        output.sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
)
def test_weights_that_a_hook_computes_are_quantized(change):
    model = quantize_model(nn.Sequential(change(nn.Linear(6, 4))), LUQ, skip=()).eval()
    x = torch.randn(3, 6)
    output = model(x)
    a, w = (INT4.quantize(t.detach()).dequantize() for t in (x, model[0].weight))
    torch.testing.assert_close(output, F.linear(a, w, model[0].bias), rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
