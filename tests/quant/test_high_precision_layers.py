"""Which layers a recipe leaves in high precision, and why: what quantize_model does, told beforehand."""

import pytest
import torch
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant.convert import NO_QUANTIZERS, high_precision_layers, quantized_layers
from luqrun.tasks.classification.networks import ModelConfig, build_model


def model(name="resnet8"):
    return build_model(ModelConfig(name), 10, 3, 32)


def layers(network):
    return {name for name, each in network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize("quant", ["luq", "nvfp4_nvidia"])
def test_what_is_not_quantized_is_there_with_its_reason(quant):
    network, recipe = model(), luqrun.recipe(quant)
    before = {name: type(each) for name, each in network.named_modules()}
    found = high_precision_layers(network, recipe)
    assert {name: type(each) for name, each in network.named_modules()} == before
    quantized = {name for name, _ in quantized_layers(luqrun.quantize_model(network, recipe))}
    assert set(found) == layers(network) - quantized
    assert (found["conv1"], found["fc"]) == ("first", "last")
    assert {found[name] for name in found if "downsample" in name} == {"shortcut"}
    assert ("last 15%" in found.values()) == (quant == "nvfp4_nvidia")


def test_a_recipe_without_quantizers_leaves_all():
    network = model()
    assert high_precision_layers(network, luqrun.recipe("fp32")) == dict.fromkeys(layers(network), NO_QUANTIZERS)


def test_patterns_patches_and_other_kinds():
    network = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(3, 3, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    network[2].forward = network[2].forward
    found = high_precision_layers(network, luqrun.recipe("luq", skip=("0",)))
    assert found == {
        "0": "0",
        "1": "luqrun does not quantize layers of the kind ConvTranspose2d",
        "2": "its forward is patched",
    }
    with pytest.raises(UserError, match="matches no layer"):
        high_precision_layers(network, luqrun.recipe("luq", skip=("x",)))
    with pytest.raises(UserError, match="has no shape yet"):
        high_precision_layers(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), luqrun.recipe("luq", skip=()))


def test_attention_that_is_left_takes_its_output_projection_along():
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    found = high_precision_layers(network, luqrun.recipe("luq", skip=("0.self_attn",)))
    assert found == {"0.self_attn": "0.self_attn", "0.self_attn.out_proj": "its attention is not quantized"}


def test_the_meta_device_does():
    with torch.device("meta"):
        assert high_precision_layers(model(), luqrun.recipe("luq"))["conv1"] == "first"
