"""GEMMs under a recipe: formats, passes, what is kept and moved, and why something is in high precision."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import luqrun
from luqrun.cost.gemms import PRODUCTS_OF_ACTIVATIONS, bits_of, gemms_of
from luqrun.cost.products import ATTENTION, LAYER, Product, observe
from luqrun.quant.recipe import Recipe

# Of 6 rows, 8 inputs and 4 outputs.
LINEAR = Product("fc", LAYER, 1, 6, 8, 4, (True, True), (48, 32, 24), source=0)


def of(product=LINEAR, quant="luq", high=(), precision="fp32", **keys):
    products = product if isinstance(product, list) else [product]
    return gemms_of(products, luqrun.recipe(quant, **keys), dict(high), precision)


def test_the_three_gemms_of_a_layer():
    found = of()
    assert [gemm.gemm for gemm in found] == ["fprop", "dgrad", "wgrad"]
    assert [(gemm.rows, gemm.inner, gemm.columns) for gemm in found] == [(6, 8, 4), (6, 4, 8), (4, 6, 8)]
    assert {gemm.macs for gemm in found} == {6 * 8 * 4}
    assert {(gemm.width, gemm.why, gemm.passes) for gemm in found} == {(4, "", 1)}
    sides = [[(side.name, side.format, side.bits) for side in gemm.sides] for gemm in found]
    assert sides == [
        [("activation", "int4", 4), ("weight", "int4", 4)],
        [("gradient", "e3m0", 4), ("weight", "int4", 4)],
        [("gradient", "e3m0", 4), ("activation", "int4", 4)],
    ]


def test_what_is_kept_and_moved():
    fprop, dgrad, wgrad = of()
    assert [gemm.kept_bits for gemm in (fprop, dgrad, wgrad)] == [0, 4 * 32, 4 * 48]
    assert fprop.moved_bits == 4 * 48 + 4 * 32 + 32 * 24
    assert dgrad.moved_bits == 4 * 24 + 4 * 32 + 32 * 48
    assert wgrad.moved_bits == 4 * 24 + 4 * 48 + 32 * 32
    # Each tensor is quantized once: read in fp32, written as codes.
    assert [gemm.quantized_bits for gemm in (fprop, dgrad, wgrad)] == [36 * (48 + 32), 36 * 24, 0]
    plain = gemms_of([LINEAR], Recipe("none"), {"fc": "none"}, "bf16")
    assert [gemm.kept_bits for gemm in plain] == [0, 0, 16 * 48]
    assert plain[0].moved_bits == 16 * (48 + 32 + 24)
    assert not any(gemm.quantized_bits for gemm in plain)


def test_a_trust_mask_keeps_a_bit_an_element_whose_gradient_is_wanted():
    def kept(product, **changes):
        return [gemm.kept_bits for gemm in of(product, "quartet", **changes)]

    without = {"fprop": {"trust_mask": False}}
    assert kept(LINEAR, **without) == [0, 4.25 * 32, 4.25 * 48]
    assert kept(LINEAR) == [0, 4.25 * 32 + 48, 4.25 * 48 + 32]
    assert kept(replace(LINEAR, wants=(False, True))) == [0, 4.25 * 48 + 32]
    assert kept(LINEAR, fprop={"activation": {"range": "absmax"}}) == [0, 4.25 * 32, 4.25 * 48 + 32]
    assert [gemm.kept_bits for gemm in of(quant="quartet", high={"fc": "last"})] == [0, 0, 32 * 48]


def test_samples_are_passes():
    fprop, dgrad, wgrad = of(quant="luq_smp2")
    assert [gemm.passes for gemm in (fprop, dgrad, wgrad)] == [1, 1, 2]
    assert wgrad.macs == 6 * 8 * 4
    assert wgrad.moved_bits == 2 * (4 * 24 + 4 * 48) + 32 * 32
    assert wgrad.quantized_bits == 36 * 24  # the second draw reads the gradient once more


def test_blocks_have_a_share_of_their_scale():
    nvfp4, mxfp4 = luqrun.recipe("nvfp4_nvidia"), luqrun.recipe("mxfp4")
    assert bits_of(nvfp4.activation) == 4.5
    assert bits_of(nvfp4.weight) == 4 + 8 / 256
    assert bits_of(mxfp4.activation) == 4.25
    # Along another axis a tensor is quantized again; tiles of a weight serve both of its GEMMs.
    fprop, dgrad, wgrad = of(quant="nvfp4_nvidia")
    assert fprop.quantized_bits == 36.5 * 48 + (36 + 8 / 256) * 32
    assert (dgrad.quantized_bits, wgrad.quantized_bits) == (36.5 * 24, 36.5 * (24 + 48))


def test_layers_that_read_one_tensor_keep_it_once():
    both = [LINEAR, Product("other", LAYER, 1, 6, 8, 4, (True, True), (48, 32, 24), source=0)]
    kept = [gemm.kept_bits for gemm in of(both) if gemm.gemm == "wgrad"]
    assert kept == [4 * 48, 0]
    masked = [gemm.kept_bits for gemm in of(both, "quartet") if gemm.gemm == "dgrad"]
    assert masked == [4.25 * 32 + 48, 4.25 * 32]
    mixed = [gemm.kept_bits for gemm in of(both, high={"other": "last"}) if gemm.gemm == "wgrad"]
    assert mixed == [4 * 48, 32 * 48]


def test_why_a_gemm_is_in_high_precision():
    assert {gemm.why for gemm in of(high={"fc": "last"})} == {"last"}
    backward = of(quant="backward_only")
    assert [gemm.why for gemm in backward] == [
        "the recipe leaves the activation and weight of fprop in high precision",
        "the recipe leaves the weight of dgrad in high precision",
        "the recipe leaves the activation of wgrad in high precision",
    ]
    assert {gemm.width for gemm in backward} == {None}
    attention = Product("a", ATTENTION, 2, 5, 4, 5, (True, True), (40, 40, 50))
    found = of(attention)
    assert {gemm.why for gemm in found} == {PRODUCTS_OF_ACTIVATIONS}
    assert [gemm.kept_bits for gemm in found] == [0, 32 * 40, 32 * 40]


def test_wider_codes_take_wider_units():
    fprop, dgrad, wgrad = of(weight={"format": "int8"})
    assert [gemm.width for gemm in (fprop, dgrad, wgrad)] == [8, 8, 4]
    assert [gemm.width for gemm in of(quant="luq_xi")] == [4, 8, 8]


def test_a_first_layer_has_no_dgrad():
    first = Product("conv", LAYER, 1, 6, 8, 4, (False, True), (48, 32, 24), source=0)
    assert [gemm.gemm for gemm in of(first)] == ["fprop", "wgrad"]


@pytest.mark.usefixtures("by_operators")
def test_the_bytes_kept_are_those_that_autograd_keeps():
    recipe = luqrun.recipe("luq", skip=())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1, stride=2), nn.Flatten(), nn.Linear(64, 6))
    with torch.device("meta"):
        plain = nn.Sequential(*(type(each)(*arguments) for each, arguments in ARGUMENTS))
        x = torch.empty(5, 3, 8, 8)
    counted = sum(gemm.kept_bits for gemm in gemms_of(observe(plain, {"input": x}).products, recipe, {}))
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * (tensor.dtype == torch.uint8))
        return tensor

    quantized = luqrun.quantize_model(model, recipe)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized(torch.randn(5, 3, 8, 8).requires_grad_())
    first_weight = 3 * 8 * 9 * 4  # of an input that wants a gradient, which the images of `plain` do not
    assert 8 * sum(kept) == counted + first_weight


ARGUMENTS = [
    (nn.Conv2d(1, 1, 1), (3, 8, 3, 1, 1)),
    (nn.Conv2d(1, 1, 1), (8, 4, 1, 2)),
    (nn.Flatten(), ()),
    (nn.Linear(1, 1), (64, 6)),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_high_precision_is_that_of_the_run(precision):
    for gemm in of(high={"fc": "first"}, precision=precision):
        assert {side.format for side in gemm.sides} == {precision}
