"""A layer's passes in one call each have the bits, and the strides, of its operators' one by one."""

import copy
import functools

import pytest
import torch
from int8_inputs import prepared_anew
from layer_passes import LAYERS, RECIPES, assert_alike, made, one_by_one, trained
from layers import E3M0, HINDSIGHT, INT4, quantize
from torch import nn

import luqrun
from luqrun.quant import routes
from luqrun.quant.convert import set_step, unchanged_weights
from luqrun.quant.kernels.cpu import driver, int8_tiles, pass_kinds, passes, sizes
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

pytestmark = pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "groups"])
def test_small_layers(name, recipe, contiguous, counted, monkeypatch):
    layer, x = made(name, recipe)
    found = trained(layer, x, contiguous=contiguous)
    assert counted == [3, 3]
    assert_alike(found, one_by_one(monkeypatch, lambda: trained(layer, x, contiguous=contiguous)))
    assert counted == [3, 3]


@pytest.mark.parametrize("few_products", [0, 1 << 30])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYERS)
def test_larger_layers_from_the_step_on_in_which_their_gemms_are_known(
    name, recipe, few_products, counted, blocks_win, monkeypatch
):
    monkeypatch.setattr(sizes, "FEW", 0)  # they pack what they keep
    monkeypatch.setattr(pass_kinds, "FEW_PRODUCTS", few_products)  # of linear layers, blocks or a library
    layer, x = made(name, recipe)
    found = trained(layer, x)
    assert counted == [2, 2]
    assert_alike(found, one_by_one(monkeypatch, lambda: trained(layer, x)))


@pytest.mark.parametrize("name", ["linear", "3 x 3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_more_threads_and_bf16(name, threads, counted, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        prepared_anew()
        layer, x = made(name, dtype=dtype)
        x = x.bfloat16() if autocast else x
        counted[:] = [0, 0]
        found = trained(layer, x, bf16=autocast)
        assert counted == [3, 3]
        alone = functools.partial(trained, layer, x, bf16=autocast)
        assert_alike(found, one_by_one(monkeypatch, alone))


@pytest.mark.parametrize("positive", [False, True], ids=["signed weights", "unsigned weights"])
@pytest.mark.parametrize("name", ["linear", "strided"])
def test_numbers_without_end_zeros_and_signs(name, positive, counted, monkeypatch):
    layer, x = made(name)
    if positive:
        layer.weight.data.abs_()
    nan = x.clone()
    nan[(1,) * x.dim()] = torch.nan
    for each in (torch.zeros_like(x), nan, x.abs(), x):
        assert_alike(trained(layer, each), one_by_one(monkeypatch, functools.partial(trained, layer, each)))
    assert counted == [12, 12]


def test_what_is_larger_is_not_settled_by_a_slower_way(counted, blocks_win, monkeypatch):
    monkeypatch.setattr(sizes, "FEW", 0)
    layer, x = made("3 x 3")
    trained(layer, x, steps=1)
    key = next(key for key in routes._chosen if key[0][0] == "dgrad")
    routes._chosen[key] = ["libraries", "blocks of ours"]
    trained(layer, x)
    assert counted == [0, 0]


def test_layers_that_read_one_tensor_quantize_it_once(counted, blocks_win, monkeypatch):
    monkeypatch.setattr(sizes, "FEW", 0)
    layers = quantize(nn.ModuleList([nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 8)]), RECIPES["luq"])
    for step in range(3):
        set_step(layers, step)
        x = torch.randn(9, 16, requires_grad=True)
        layers[2](layers[0](x) + layers[1](x)).sum().backward()
    assert counted == [2, 2]  # of the third


def test_health_is_told(counted, monkeypatch):
    def told():
        layer, x = made("linear")
        layer.health = {}
        layer(x.requires_grad_()).square().sum().backward()
        return layer.health

    found = told()
    assert counted == [1, 1]
    expected = one_by_one(monkeypatch, told)
    assert set(found) == set(expected) == {"activation", "weight", "gradient", "gradient_exponents"}
    for name, value in expected.items():
        assert str(found[name]) == str(value)


@pytest.mark.parametrize("few", [0, sizes.FEW])
def test_what_is_kept(few, counted, blocks_win, monkeypatch):
    """A byte an element of small tensors, half a byte of others."""
    monkeypatch.setattr(sizes, "FEW", few)
    monkeypatch.setattr(pass_kinds, "FEW_PRODUCTS", 1 << 30)
    kept, forward = [], passes.LayerPass.forward

    def spy(self, *arguments):
        found = forward(self, *arguments)
        kept.append(found[1].numel())
        return found

    monkeypatch.setattr(passes.LayerPass, "forward", spy)
    torch.manual_seed(1)
    layer, x = quantize(nn.Linear(96, 64), RECIPES["luq"]), torch.randn(50, 96)
    trained(layer, x)
    elements = 96 * (64 + 50)
    for each in kept:
        assert (1 if few else 0.5) <= each / elements <= (1.05 if few else 0.55)
    assert kept


def test_operators_keep_a_byte_of_small_tensors_too(monkeypatch):
    monkeypatch.setattr(pass_kinds, "MOST", 0)
    layer, x = made("linear")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        output = layer(x.requires_grad_())
    codes = [each.numel() for each in kept if each.dim()]
    assert codes == [x.numel(), layer.weight.numel()]
    monkeypatch.setattr(sizes, "FEW", 0)  # packed, it gives the same
    output.sum().backward()
    grad, packed = x.grad, copy.deepcopy(layer)
    packed.zero_grad()
    x.grad = None
    set_step(packed, 0)
    packed(x).sum().backward()
    assert torch.equal(x.grad, grad)
    assert torch.equal(packed.weight.grad, layer.weight.grad)


def test_what_it_is_not_for(counted):
    linear = lambda: nn.Linear(12, 8)  # noqa: E731
    x = torch.randn(5, 12)
    smp = Recipe.of("smp", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=2))
    drawn = Recipe.of("drawn", Quantizer("int4", rounding="stochastic"), INT4, E3M0)
    for recipe in (HINDSIGHT, smp, drawn, Recipe.of("weights", weight=INT4), luqrun.recipe("mxfp4_rht_sr")):
        trained(quantize(linear(), recipe), x)
    layer = quantize(linear(), RECIPES["luq"])
    trained(layer.double(), x.double())
    layer = layer.float()
    with unchanged_weights(layer):
        trained(layer, x)
    with torch.no_grad():
        layer(x)
    layer(x)  # whose gradient nobody wants
    layer.weight.requires_grad_(False)
    layer(x.clone().requires_grad_()).sum().backward()
    trained(quantize(nn.Conv2d(1, 1, 3), RECIPES["luq"]), torch.randn(2, 1, 6, 6))  # in either memory order
    contiguous, images = made("3 x 3")
    trained(contiguous.to(memory_format=torch.contiguous_format), images.contiguous())
    assert counted == [0, 0]


def test_a_rehearsal_has_its_loops_and_computes_nothing(counted):
    layer, x = made("linear")
    with driver.rehearsal() as found:
        layer(x.clone().requires_grad_()).sum().backward()
    names = {each.driver.__name__ for each in found}
    assert {"follow", "quantize", "pack_weight", "convolve", "convolve_for_weight", "add_tasks"} <= names
    assert counted == [0, 0]
