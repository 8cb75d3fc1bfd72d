"""Layers whose operands have blocks: each GEMM is that of the operands that the public `quantize` makes along the
contraction of that GEMM (tests/block_gemms.py)."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from block_gemms import LAST, PAIRS, SEED, STEP, Expected, contraction, quantized, without_mask
from torch import nn

import luqrun
from luqrun.quant.convert import set_step
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Fprop, Recipe, Wgrad
from luqrun.quant.rotation import Rotation

# More than a block along each contraction somewhere, and ends that are short.
LAYERS = {
    "linear": (lambda: nn.Linear(40, 35, bias=False), (37, 40)),
    "linear, 3-d, less than a block": (lambda: nn.Linear(12, 9, bias=False), (2, 5, 12)),
    "linear, 4-d": (lambda: nn.Linear(33, 7, bias=False), (2, 3, 4, 33)),
    "linear, one row": (lambda: nn.Linear(70, 3, bias=False), (70,)),
    "conv, stride and padding": (lambda: nn.Conv2d(20, 36, 3, 2, 1, bias=False), (3, 20, 7, 6)),
    "conv, dilation, few channels": (lambda: nn.Conv2d(3, 7, (2, 3), 1, 2, 2, bias=False), (34, 3, 5, 4)),
    "conv, groups": (lambda: nn.Conv2d(66, 34, (1, 2), groups=2, bias=False), (2, 66, 3, 5)),
    "conv, depthwise": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5, bias=False), (17, 5, 4, 3)),
    "conv, pointwise": (lambda: nn.Conv2d(48, 33, 1, 2, bias=False), (4, 48, 5, 5)),
}
SCHEMES = [
    "mxfp4", "mxfp4_rht_sr", "tetrajet", "quartet", "nvfp4", "nvfp4_nvidia", "nvfp4_46", "quartet2", "fp4_all_the_way",
]  # fmt: skip
E8M0 = Quantizer("e2m1", block=32)
DRAWN = Quantizer("e2m1", block=32, rounding="stochastic")
E4M3 = Quantizer("e2m1", block=16, scale_format="e4m3")
FP32 = Quantizer("e1m2", block=10, scale_format="fp32", rounding="stochastic")
TILE = Quantizer("e2m1", block=[16, 4], scale_format="e4m3")
INT4, LUQ_GRADIENT = Quantizer("int4", range="sawb"), Quantizer("e3m0", rounding="stochastic")
FINE = Quantizer("int8", block=32, scale_format="fp32")


def recipe_of(name):
    return without_mask(luqrun.recipe(name) if name in SCHEMES else MIXED[name])


MIXED = {
    "float32 scales": Recipe.of("float32 scales", FP32, FP32, FP32),
    "tiles": Recipe.of("tiles", TILE, TILE, TILE),
    "powers of two in blocks": Recipe.of("powers", *[Quantizer("e3m0", block=8, scale_rounding="rceil")] * 3),
    "blocks forward, LUQ's gradient": Recipe.of("mixed", E4M3, E8M0, LUQ_GRADIENT),
    "LUQ's forward, a gradient in blocks": Recipe.of("mixed", INT4, INT4, DRAWN),
    "wgrad alone": Recipe("wgrad", wgrad=Wgrad(DRAWN, E8M0)),
    "a weight alone in dgrad": Recipe("dgrad", Fprop(E8M0, E8M0), Dgrad(None, DRAWN), Wgrad(E4M3, None)),
    "samples": Recipe.of("smp", E8M0, E8M0, Quantizer("e2m1", block=16, rounding="stochastic", samples=3)),
    "samples for both": Recipe.of(
        "smp", TILE, E4M3, Quantizer("e2m1", block=16, scale_format="e4m3", rounding="stochastic", samples=2),
        samples_scope="both",
    ),
    "samples, rotated": Recipe(
        "smp", Fprop(E8M0, E8M0), Dgrad(DRAWN, E8M0, Rotation(4)), Wgrad(replace(DRAWN, samples=2), E8M0, Rotation(4))
    ),
    "rotated, one operand in high precision": Recipe(
        "half", Fprop(None, E8M0, Rotation(8)), Dgrad(DRAWN, None, Rotation(4, "drawn")), Wgrad(None, E4M3, Rotation(2))
    ),
    "rotated, per tensor": Recipe(
        "whole", Fprop(INT4, INT4, Rotation(4, "fixed")), Dgrad(LUQ_GRADIENT, INT4), Wgrad(LUQ_GRADIENT, INT4)
    ),
}  # fmt: skip


def trained(layer, x, recipe, bf16=False, g=None):
    """(output, the activation's gradient, the weight's, the output's) of the quantized layer's first pass."""
    layer, x = luqrun.quantize_model(copy.deepcopy(layer), recipe, skip=(), seed=SEED), x.clone().requires_grad_()
    set_step(layer, STEP)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = layer(x)
    g = torch.randn_like(output) * torch.rand_like(output) ** 3 * 1e-3 if g is None else g
    output.backward(g)
    return output.detach(), x.grad, layer.weight.grad, g


def inputs(name):
    """Of the layer's kind: (layer, input) contiguous, and in channels_last memory where there are four dimensions."""
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape) * torch.exp2(3 * torch.randn(shape[-1]))
    yield layer, x
    if x.dim() == 4:
        yield layer, x.to(memory_format=LAST)
    if isinstance(layer, nn.Conv2d):
        yield layer.to(memory_format=LAST), x.to(memory_format=LAST)


def check(layer, x, recipe, bf16=False):
    output, grad_x, grad_w, g = trained(layer, x, recipe, bf16)
    cast = torch.bfloat16 if bf16 else torch.float32
    expected = Expected(layer, recipe, {"activation": x, "weight": layer.weight, "gradient": g})
    assert output.dtype == cast
    for gemm, found in zip(PAIRS, (output, grad_x, grad_w), strict=True):
        expected.check(gemm, found, 2.5 * 2**-8 if bf16 else 0.0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", [*SCHEMES, *MIXED])
def test_each_gemm_takes_blocks_along_its_contraction(name, scheme):
    for layer, x in inputs(name):
        check(layer, x, recipe_of(scheme))


@pytest.mark.parametrize("name", ["linear", "conv, groups"])
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4_46", "tiles", "blocks forward, LUQ's gradient"])
def test_under_autocast_results_alone_are_rounded(name, scheme):
    for layer, x in inputs(name):
        check(layer, x, recipe_of(scheme), bf16=True)


@pytest.mark.parametrize("name", ["linear", "conv, groups"])
def test_what_bf16_would_round_is_multiplied_in_fp32(name):
    fine = Quantizer("e2m1", block=16, scale_format="fp32")
    recipe = Recipe.of("fp32 scales", fine, fine, fine)
    for layer, x in inputs(name):
        exact = trained(layer, x, recipe)
        found = trained(layer, x.bfloat16().float(), recipe, bf16=True, g=exact[3].bfloat16().float())
        expected = trained(layer, x.bfloat16().float(), recipe, g=exact[3].bfloat16().float())
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(one.bfloat16(), other.bfloat16())


# Which operands are one quantization, and which are two


def seen_as_operands(recipe, weight):
    """What fprop and dgrad of a linear layer take of this square weight: they multiply it by ones and zeros."""
    layer = nn.Linear(*weight.shape, bias=False)
    layer.weight = nn.Parameter(weight)
    output, grad_x, *_ = trained(layer, torch.eye(len(weight)), recipe, g=torch.eye(len(weight)))
    return output.t(), grad_x


def test_a_tile_has_the_same_codes_in_fprop_and_dgrad_and_a_block_has_not():
    weight = torch.randn(40, 40)
    for tile in (TILE, replace(TILE, rounding="stochastic"), replace(TILE, block=[3, 32], scale_format="e8m0")):
        once, again = seen_as_operands(Recipe("tiles", Fprop(None, tile), Dgrad(None, tile)), weight)
        assert torch.equal(once, again)
    once, again = seen_as_operands(Recipe("blocks", Fprop(None, E8M0), Dgrad(None, E8M0)), weight)
    assert torch.equal(once, quantized(E8M0, weight, 1))
    assert torch.equal(again, quantized(E8M0, weight, 0))
    assert not torch.equal(once, again)


@pytest.mark.parametrize("blocks", [E8M0, replace(E4M3, four_over_six="mse")], ids=str)
def test_requantized_is_what_fprop_made_of_it(blocks):
    weight = torch.randn(40, 40)
    second = replace(E8M0, requantize=True)
    once, again = seen_as_operands(Recipe("again", Fprop(None, blocks), Dgrad(None, second)), weight)
    assert torch.equal(once, quantized(blocks, weight, 1))
    assert torch.equal(again, quantized(E8M0, once, 0))
    assert not torch.equal(again, quantized(E8M0, weight, 0))
    _, alone = seen_as_operands(Recipe("alone", Fprop(None, None), Dgrad(None, second)), weight)
    assert torch.equal(alone, quantized(E8M0, weight, 0))  # nothing was made of it before


def counted(monkeypatch):
    """How often a tensor of each shape is quantized in blocks from now on."""
    found, real = Counter(), Quantizer.run_blocks

    def run_blocks(quantizer, x, *how, **more):
        found[x.shape] += 1
        return real(quantizer, x, *how, **more)

    monkeypatch.setattr(Quantizer, "run_blocks", run_blocks)
    return found


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("mxfp4", {"weight": 2, "activation": 2, "gradient": 2}),
        ("nvfp4_nvidia", {"weight": 1, "activation": 2, "gradient": 2}),
        ("tiles", {"weight": 1, "activation": 1, "gradient": 1}),
        ("mxfp4_rht_sr", {"weight": 1, "activation": 1, "gradient": 2}),
        ("samples", {"weight": 2, "activation": 2, "gradient": 4}),
        ("blocks forward, LUQ's gradient", {"weight": 2, "activation": 2}),
    ],
)
def test_how_often_an_operand_is_quantized(scheme, expected, monkeypatch):
    layer, x = next(inputs("conv, pointwise"))
    sizes = {layer.weight.shape: "weight", x.shape: "activation", (4, 33, 3, 3): "gradient"}
    found = counted(monkeypatch)
    trained(layer, x, recipe_of(scheme))
    assert {sizes[shape]: times for shape, times in found.items()} == expected


def test_layers_that_read_one_tensor_share_its_blocks_where_nothing_is_drawn(monkeypatch):
    made, x = counted(monkeypatch), torch.randn(33, 40)
    own_signs = {"dgrad": None, "gradient": None, "wgrad": {"gradient": None, "hadamard": 16, "signs": "drawn"}}
    cases = ("mxfp4", {}, 2), ("nvfp4_nvidia", {}, 2), ("tetrajet", {}, 6), ("quartet2", {}, 6), ("mxfp4", own_signs, 6)
    for scheme, changes, times in cases:
        layers = nn.ModuleList([nn.Linear(40, 5) for _ in range(3)])
        luqrun.quantize_model(layers, luqrun.recipe(scheme, **changes), skip=())
        made.clear()
        for layer in layers:
            layer(x)
        assert made[x.shape] == times, scheme


# Rotations


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signs", ["none", "fixed", "drawn"])
def test_a_rotation_leaves_the_product_and_changes_its_rounding(name, signs):
    plain = Recipe.of("fine", FINE, FINE, FINE)
    size = 4 if signs == "fixed" else 2
    parts = {gemm: getattr(plain, gemm)._replace(hadamard=Rotation(size, signs)) for gemm in PAIRS}
    for layer, x in inputs(name):
        straight = trained(layer, x, plain)
        turned = trained(layer, x, replace(plain, **parts), g=straight[3])
        exact = trained(layer, x, Recipe("high precision"), g=straight[3])
        for gemm, one, other, true in zip(PAIRS, straight, turned, exact, strict=False):
            assert (one - true).norm() < 0.03 * true.norm(), gemm
            assert (other - true).norm() < 0.03 * true.norm(), gemm
            view, axis = contraction(layer, gemm, PAIRS[gemm][0], straight[3] if gemm != "fprop" else x)
            assert torch.equal(one, other) == (view.shape[axis] == 1), gemm  # of one element a sign is left
