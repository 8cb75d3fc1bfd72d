"""Each GEMM takes the operands that its own quantizers make, and what two encode alike is made once."""

import copy
from dataclasses import replace

import pytest
import torch
from test_function import E3M0, INT4, LAYERS, LUQ, close, drawn, gemm, gradients, quantized, values
from torch import nn

from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Fprop, Recipe, Wgrad

E2M0_SR, INT8 = Quantizer("e2m0", rounding="stochastic"), Quantizer("int8")


@pytest.mark.parametrize("name", ["linear", "conv, stride and padding"])
@pytest.mark.parametrize("high", [(), ("fprop",), ("dgrad",), ("wgrad",), ("fprop", "dgrad"), ("fprop", "wgrad")])
def test_each_gemm_takes_the_operands_that_its_own_quantizers_make(name, high):
    recipe = Recipe("mixed", Fprop(INT4, INT8), Dgrad(E3M0, INT4), Wgrad(E2M0_SR, INT8))
    empty = {"fprop": Fprop(), "dgrad": Dgrad(), "wgrad": Wgrad()}
    recipe = replace(recipe, **{gemm: empty[gemm] for gemm in high})
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape, requires_grad=True)
    layer = quantized(copy.deepcopy(plain), recipe)
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)

    def operand(gemm, kind, tensor):
        quantizer = getattr(getattr(recipe, gemm), kind)
        if quantizer is None:
            return tensor.detach().double()
        if not quantizer.is_stochastic:
            return values(quantizer, tensor)
        # wgrad's own draw, where dgrad has drawn in another way before it.
        return drawn(quantizer, g, gemm="wgrad" if gemm == "wgrad" and recipe.dgrad.gradient else None)

    of = {gemm: lambda kind, tensor, gemm=gemm: operand(gemm, kind, tensor) for gemm in ("fprop", "dgrad", "wgrad")}
    close(output, gemm(plain, of["fprop"]("activation", x), of["fprop"]("weight", plain.weight)))
    close(x.grad, gradients(plain, x, of["dgrad"]("weight", plain.weight), of["dgrad"]("gradient", g))[0])
    close(
        layer.weight.grad, gradients(plain, of["wgrad"]("activation", x), plain.weight, of["wgrad"]("gradient", g))[1]
    )


def test_two_quantizers_of_an_operand_take_the_range_of_earlier_steps_alike():
    """A hindsight range is that of the steps before for both GEMMs; the present maximum counts in the next step."""
    nearest = Quantizer("e3m0_radix4", "hindsight", hindsight_momentum=0.0)
    int4, int8 = (Quantizer(name, "hindsight", hindsight_momentum=0.0) for name in ("int4", "int8"))
    recipe = Recipe("two", Fprop(int4, None), Dgrad(nearest), Wgrad(replace(nearest, largest=8192), int8))
    layer = quantized(nn.Linear(8, 8, bias=False), recipe)
    seen, run = [], Quantizer.run

    def spy(self, x, stream, hindsight, *rest):
        seen.append((self, hindsight.item()))
        return run(self, x, stream, hindsight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantizer, "run", spy)
        for size, before in ((1.0, 0.0), (8.0, 1.0), (2.0, 8.0)):
            x, g = size * torch.eye(8), size * torch.ones(8, 8)
            seen.clear()
            layer(x.requires_grad_()).backward(g)
            assert sorted(map(str, (quantizer for quantizer, _ in seen))) == sorted(
                map(str, (int4, int8, nearest, recipe.wgrad.gradient))
            )
            assert {estimate for _, estimate in seen} == {before}
    assert layer.gradient_hindsight == layer.activation_hindsight == 2.0


@pytest.mark.usefixtures("by_operators")
@pytest.mark.parametrize(
    ("recipe", "calls"),
    [
        (LUQ, ["activation", "weight", "gradient"]),
        (Recipe.of("smp", INT4, INT4, replace(E3M0, samples=3)), ["activation", "weight", "gradient"]),
        (replace(LUQ, dgrad=Dgrad(E3M0, INT8)), ["activation", "weight", "weight", "gradient"]),
        (replace(LUQ, wgrad=Wgrad(E2M0_SR, INT8)), ["activation", "activation", "weight", "gradient", "gradient"]),
    ],
    ids=["luq", "smp", "other weight", "other wgrad"],
)
def test_a_tensor_is_measured_once_where_two_gemms_encode_it_alike(recipe, calls, monkeypatch):
    x, layer = torch.randn(5, 40, requires_grad=True), quantized(nn.Linear(40, 24, bias=False), recipe)
    sizes, made, run = {200: "activation", 960: "weight", 120: "gradient"}, [], Quantizer.run

    def spy(self, tensor, *rest):
        made.append(sizes[tensor.numel()])
        return run(self, tensor, *rest)

    monkeypatch.setattr(Quantizer, "run", spy)
    layer(x).sum().backward()
    assert made == calls
