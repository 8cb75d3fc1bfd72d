"""Operands with blocks between the passes of a layer: what is kept of them, and what is at their edges."""

import copy
from dataclasses import replace

import pytest
import torch
from block_gemms import LAST, SEED, contraction
from test_residuals import bytes_kept
from torch import nn

import luqrun
from luqrun.quant.operands import held_in_blocks
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Fprop, Recipe, Wgrad
from luqrun.quant.rotation import Rotation

E8M0 = Quantizer("e2m1", block=32)
E4M3 = Quantizer("e2m1", block=16, scale_format="e4m3")
ODD = Quantizer("e2m1", block=32, rounding="stochastic")


def layer_of(recipe, module):
    return luqrun.quantize_model(module, recipe, skip=(), seed=SEED)


# What is kept

WHOLE = {  # contractions of whole blocks
    "linear": (lambda: nn.Linear(96, 64, bias=False), (64, 96)),
    "conv": (lambda: nn.Conv2d(32, 64, 3, padding=1, bias=False), (32, 32, 4, 5)),
    "conv, groups": (lambda: nn.Conv2d(64, 128, 3, groups=2, bias=False), (32, 64, 3, 4)),
}
BITS = {
    "mxfp4": 4.25,
    "mxfp4_rht_sr": 4.25,
    "tetrajet": 4.25,
    "quartet": 5.25,  # with its mask
    "nvfp4": 4.5,
    "nvfp4_46": 4.5,
    "quartet2": 4.5,
    "fp4_all_the_way": 4.5,
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("scheme", BITS)
def test_packed_codes_and_scales_are_all_that_is_kept(scheme, name, bf16):
    make, shape = WHOLE[name]
    for last in (False, True) if len(shape) == 4 else (False,):
        layer, x = layer_of(luqrun.recipe(scheme), make()), torch.randn(shape)
        x = x.to(memory_format=LAST) if last else x
        kept, output = bytes_kept(layer, x.requires_grad_(), bf16)
        elements, scales_of_tensors = x.numel() + layer.weight.numel(), 2 * 4
        assert 8 * (kept - scales_of_tensors) == BITS[scheme] * elements
        output.sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_a_tile_has_one_scale():
    layer, x = layer_of(luqrun.recipe("nvfp4_nvidia"), nn.Linear(96, 64, bias=False)), torch.randn(64, 96)
    kept, _ = bytes_kept(layer, x.requires_grad_())
    assert 8 * (kept - 8) == 4.5 * x.numel() + (4 + 8 / 256) * layer.weight.numel()


def test_short_blocks_have_whole_scales_and_float32_scales_take_four_bytes():
    x = torch.randn(3, 33)
    kept, _ = bytes_kept(layer_of(Recipe("short", Fprop(E8M0, E8M0), wgrad=Wgrad(ODD, E8M0)), nn.Linear(33, 5)), x)
    assert kept == 50 + 33 + 4
    wide = replace(E8M0, scale_format="fp32", scale_rounding=None)
    kept, _ = bytes_kept(layer_of(Recipe("wide", Fprop(wide, wide), wgrad=Wgrad(ODD, wide)), nn.Linear(33, 5)), x)
    assert kept == 50 + 4 * 33 + 4


def test_only_what_a_backward_pass_needs():
    recipe = luqrun.recipe("mxfp4")
    layer, x = layer_of(recipe, nn.Linear(64, 32, bias=False)), torch.randn(32, 64)
    assert bytes_kept(layer, x)[0] == 4.25 / 8 * x.numel() + 4  # no gradient of x is wanted: no weight for dgrad
    layer.weight.requires_grad_(False)
    assert bytes_kept(layer, x.clone().requires_grad_())[0] == 4.25 / 8 * layer.weight.numel() + 4
    with torch.no_grad():
        assert bytes_kept(layer, x)[0] == 0


@pytest.mark.parametrize("form", ["int8", "int6", "int5", "e2m3", "e3m2", "e2m1", "e1m2", "e3m0"])
@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3"])
def test_codes_times_scales_are_exact_in_what_holds_them(form, scale_format):
    how = Quantizer(form, block=16, scale_format=scale_format).encoding
    levels = torch.tensor(how.form.levels(), dtype=torch.float64) * how.form.unit
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = 2.0 ** torch.arange(-120.0, 120.0, dtype=torch.float64) if scale_format == "e8m0" else scales
    values = levels[:, None] * scales
    assert torch.equal(values.to(held_in_blocks(how, torch.bfloat16)).double(), values)


# Edges


def test_a_nan_takes_what_shares_its_scale_and_nothing_else():
    layer, x = layer_of(luqrun.recipe("mxfp4"), nn.Linear(70, 5, bias=False)), torch.randn(40, 70)
    x[3, 7] = torch.nan
    output = layer(x.requires_grad_())
    assert torch.equal(output.isnan().any(1), torch.arange(40) == 3)
    g = torch.randn(40, 5)
    g[35, 2] = torch.inf
    output.backward(g)
    assert torch.equal(x.grad.isnan().any(1), torch.arange(40) == 35)
    # In wgrad blocks are of the rows: column 7 of the activations, column 2 of the gradients.
    poisoned = (torch.arange(5) == 2)[:, None] | (torch.arange(70) == 7)
    assert torch.equal(layer.weight.grad.isnan(), poisoned)


def test_a_nan_under_a_scale_of_the_tensor_takes_all():
    layer, x = layer_of(luqrun.recipe("nvfp4"), nn.Linear(70, 5, bias=False)), torch.randn(40, 70)
    x[3, 7] = torch.inf
    assert layer(x).isnan().all()


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4_nvidia", "quartet", "quartet2", "tetrajet"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(33, 5), (0, 33)),
        (nn.Linear(33, 5), (2, 0, 33)),
        (nn.Conv2d(3, 5, 3, padding=1), (0, 3, 4, 4)),
        (nn.Conv2d(3, 5, 3), (1, 3, 3, 3)),
        (nn.Conv2d(3, 5, 3), (3, 3, 3)),
    ],
    ids=str,
)
def test_batches_of_none_and_of_one(scheme, module, shape):
    layer, x = (
        layer_of(luqrun.recipe(scheme), nn.Sequential(copy.deepcopy(module))),
        torch.randn(shape).requires_grad_(),
    )
    output = layer(x)
    output.sum().backward()
    assert output.shape == module(x.detach()).shape
    assert x.grad.shape == x.shape
    assert layer[0].weight.grad.isfinite().all()
    assert layer[0].weight.grad.any() == (x.numel() > 0)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "nvfp4_46", "quartet2", "quartet"])
def test_zeros_and_extremes_stay_finite(scheme):
    for x in (torch.zeros(4, 40), torch.full((4, 40), 2.0**-149), torch.full((4, 40), 1e36)):
        layer = layer_of(luqrun.recipe(scheme), nn.Linear(40, 5, bias=False))
        output = layer(x.requires_grad_())
        output.backward(torch.zeros(4, 5))
        assert output.isfinite().all()
        assert not x.grad.any()
        assert not layer.weight.grad.any()


def test_a_float32_scale_that_is_half_of_nothing_codes_zeros():
    # Its unit, half of the smallest subnormal, is rounded to zero.
    x = torch.zeros(2, 32)
    x[0, 0], x[1] = 6 * 2.0**-149, 1
    recipe = Recipe("subnormal", Fprop(Quantizer("e2m1", block=32, scale_format="fp32")))
    output = layer_of(recipe, nn.Linear(32, 3, bias=False))(x)
    assert output.isfinite().all()


# What is told of them


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "quartet"])
def test_health_is_that_of_each_operand_in_its_first_gemm(scheme):
    recipe = replace(luqrun.recipe(scheme), fprop=luqrun.recipe(scheme).fprop._replace(hadamard=None))
    for last in (False, True):
        conv = nn.Conv2d(35, 40, 3, bias=False)
        layer = layer_of(recipe, conv)
        layer.health = {}
        x = torch.randn(3, 35, 4, 5) * torch.rand(3, 35, 4, 5) ** 6
        x = x.to(memory_format=LAST) if last else x
        layer(x).sum().backward()
        for operand, tensor in (("activation", x), ("weight", layer.weight.detach())):
            quantizer = getattr(recipe.fprop, operand)
            view, axis = contraction(conv, "fprop", operand, tensor)
            found = quantizer.quantize(view, axis=axis)
            values, most = found.dequantize().double(), found.most(view.shape)
            clipped, underflow, error = layer.health[operand].tolist()
            assert clipped == pytest.approx((view.abs() > most * (1 + 1e-6)).double().mean().item())
            assert underflow == pytest.approx(((values == 0) & (view != 0)).sum().item() / (view != 0).sum().item())
            assert error == pytest.approx(((values - view).norm() / view.norm()).item(), rel=1e-5)
        assert set(layer.health) == {"activation", "weight", "gradient", "gradient_exponents"}


def test_what_is_rotated_is_measured_rotated():
    outlier = torch.zeros(4, 32)
    outlier[:, 5] = 1
    recipe = Recipe("rotated", Fprop(E8M0, None, Rotation(32)), Dgrad(), Wgrad())
    layer = layer_of(recipe, nn.Linear(32, 3, bias=False))
    layer.health = {}
    layer(outlier)
    # 32 elements of one magnitude, which lies between 4 and 6 times its scale of 2^-5; as it was, 1 is a value.
    assert layer.health["activation"].tolist() == pytest.approx([0, 0, 6 * 2**-5 * 32**0.5 - 1])
