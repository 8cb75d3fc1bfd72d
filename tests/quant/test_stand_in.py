"""Every recipe trains to the same bits with torch operations standing in for the CPU's kernels."""

import copy

import pytest
import torch
from torch import nn

import luqrun
from luqrun.config import conf_dir
from luqrun.quant.convert import set_step
from luqrun.quant.kernels.stand_in import StandIn

NAMES = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(6, 20, 3, padding=1, bias=False),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.Conv2d(20, 32, (3, 2), stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(32, 36, 3, padding=3, groups=4),
        nn.Conv2d(36, 8, 1, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    ), torch.randn(6, 6, 8, 7)


def encoder():
    return nn.TransformerEncoderLayer(40, 4, 72, dropout=0.0, batch_first=True), torch.randn(3, 7, 40)


def steps(model, x, bf16):
    """The outputs of two training passes, and the gradients after them."""
    found, x = [], x.clone().requires_grad_()
    for number in range(2):
        set_step(model, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x)
        (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append(output.detach())
    return [*found, x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [convolutions, encoder])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains_to_the_same_bits(name, make, bf16):
    torch.manual_seed(4)
    model, x = make()
    for laid in (x, x.to(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        quantized = luqrun.quantize_model(copy.deepcopy(model), luqrun.recipe(name), skip=())
        if laid is not x:
            quantized = quantized.to(memory_format=torch.channels_last)
        expected = steps(copy.deepcopy(quantized), laid, bf16)
        with StandIn(lambda: False).serving():
            found = steps(quantized, laid, bf16)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
