"""The trust mask: what a range of root mean squares clips in fprop gets no gradient, in the axes that fprop rotates."""

import functools

import pytest
import torch
from block_gemms import PAIRS, SEED, STEP, contraction, without_mask
from layers import same
from test_block_layers import LAYERS, inputs, trained
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import luqrun
from luqrun.errors import UserError
from luqrun.quant.grids import Lines, grid_of_axis
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.operands import Mask
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Fprop, Recipe
from luqrun.quant.rotation import Rotation, rotate, signs_of, unrotate

RMS = Quantizer("e2m1", block=32, scale_rounding="floor", range="rms")
NVFP4 = Quantizer("e2m1", block=16, scale_format="e4m3", range="rms", headroom=0.75)
INT4 = Quantizer("int4", block=24, scale_format="fp32", range="rms")
RECIPES = {
    "quartet": luqrun.recipe("quartet"),
    "plain": Recipe("plain", Fprop(RMS, RMS, None, True)),
    "e4m3, with headroom": Recipe("e4m3", Fprop(NVFP4, NVFP4, None, True)),
    "integers, drawn signs": Recipe("int4", Fprop(INT4, INT4, Rotation(8, "drawn"), True)),
    "one operand": Recipe("half", Fprop(RMS, Quantizer("e2m1", block=32), Rotation(4, "fixed"), True)),
}
# In the others blocks are short, or few.
WHERE_SOME_CLIP = ("linear", "conv, stride and padding", "conv, groups", "conv, pointwise")


def ends_of(quantizer, x, axis):
    """The end of the range of each element, as float64, by the public `quantize`."""
    found = quantizer.quantize(x.contiguous(), axis=axis)
    moved = x.movedim(axis, -1)
    blocks = -(-moved.shape[-1] // quantizer.block)
    scales = found.scale.movedim(axis, -1).double().repeat_interleave(quantizer.block, -1)[..., : moved.shape[-1]]
    assert found.scale.movedim(axis, -1).shape[-1] == blocks
    return (scales * quantizer.form.limit * found.tensor_scale.double()).movedim(-1, axis)


def masked(layer, recipe, operand, x, gradient):
    """`gradient` of an operand x of a layer, without what fprop clips; and the share of that."""
    quantizer = getattr(recipe.fprop, operand)
    if quantizer is None or quantizer.range != "rms":
        return gradient, 0.0
    view, axis = contraction(layer, "fprop", operand, x.detach())
    seen, _ = contraction(layer, "fprop", operand, gradient)
    lines, rotation = Lines.along(view.shape, axis), recipe.fprop.hadamard
    signs = None if rotation is None else signs_of(rotation, make_stream(SEED, 0, 0, STEP), "fprop")
    view, seen = view.contiguous(), seen.contiguous()
    if rotation is not None:
        view, seen = (rotate(each, lines, rotation, signs) for each in (view, seen))
    passes = view.abs().double() < ends_of(quantizer, view, axis)
    seen = torch.where(passes, seen, 0.0)
    if rotation is not None:
        seen = unrotate(seen, lines, rotation, signs)
    return seen.reshape(gradient.shape), 1 - passes.float().mean().item()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", RECIPES)
def test_clipped_elements_get_no_gradient(name, scheme):
    recipe, clipped = RECIPES[scheme], []
    everywhere = without_mask(recipe)
    for layer, x in inputs(name):
        with torch.no_grad():
            layer.weight.mul_(torch.randn_like(layer.weight).exp())  # longer tails than a uniform one's
        output, grad_x, grad_w, g = trained(layer, x, recipe)
        plain, *both, _ = trained(layer, x, everywhere, g=g)
        assert torch.equal(output, plain)
        for operand, tensor, found, whole in zip(
            PAIRS["fprop"], (x, layer.weight), (grad_x, grad_w), both, strict=True
        ):
            expected, share = masked(layer, recipe, operand, tensor, whole)
            assert (found - expected).abs().max() <= 1e-5 * whole.abs().max()
            clipped.append(share)
    assert name not in WHERE_SOME_CLIP or max(clipped) > 0


def test_under_autocast_it_is_the_mask_of_the_same_elements():
    (layer, x), recipe = next(inputs("linear")), RECIPES["plain"]
    everywhere = without_mask(recipe)
    x = x.bfloat16().float()
    _, grad_x, _, g = trained(layer, x, recipe, bf16=True)
    whole = trained(layer, x, everywhere, bf16=True, g=g)[1]
    expected, share = masked(layer, recipe, "activation", x, whole)
    assert share > 0
    assert torch.equal(grad_x, expected)


def mask_of(how, x):
    grid, _ = grid_of_axis(how.encoding, x.shape, 1)
    found = how.run_blocks(x, make_stream(), grid, torch.float32)
    bits = ops.block_mask(x, found.scales, found.tensor_scale, how.encoding.key, grid.sizes, grid.block)
    assert bits.numel() == -(-x.numel() // 8)
    return Mask(bits, False).apply(torch.ones_like(x)) > 0


@pytest.mark.parametrize("how", [RMS, NVFP4, INT4], ids=str)
def test_it_passes_all_of_a_block_whose_scale_is_nan_or_zero(how):
    x = torch.randn(6, 50)
    x[2, 40], x[4] = torch.nan, 0.0
    passes = mask_of(how, x)
    poisoned = passes if how.scale_format == "e4m3" else passes[2, 40 // how.block * how.block :][: how.block]
    assert poisoned.all()
    assert passes[4].all()
    x[2] = 1e-30  # far below an e4m3 scale beside ones
    assert mask_of(how, x)[2].all()


FORMS = ["e2m1", "e1m2", "e2m3", "int4", "int8", "e3m0", "e4m0", "e3m0_div128"]


@pytest.mark.parametrize("form", FORMS)
def test_it_ends_at_the_largest_code_of_each_format(form):
    how = Quantizer(form, block=32, scale_rounding="floor", range="rms")
    x = torch.randn(64, 32) * torch.exp2(torch.randn(64, 32))
    assert torch.equal(mask_of(how, x), x.abs().double() < ends_of(how, x, 1))


def test_weights_of_zeros_learn():
    for how in (RMS, NVFP4, INT4):
        layer = torch.nn.Linear(32, 4, bias=False)
        torch.nn.init.zeros_(layer.weight)
        model = luqrun.quantize_model(torch.nn.Sequential(layer), Recipe("mask", Fprop(None, how, None, True)), skip=())
        model(torch.randn(8, 32)).sum().backward()
        assert layer.weight.grad.all()


def test_an_input_whose_gradient_nobody_wants_has_no_mask():
    layer = luqrun.quantize_model(torch.nn.Linear(40, 8, bias=False), RECIPES["plain"], skip=())
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x
        return x

    def masks(x):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(x)
        return sum(each.dtype == torch.uint8 and each.numel() in (40, 37 * 5) for each in kept.values())

    assert masks(torch.randn(37, 40)) == 1
    assert masks(torch.randn(37, 40, requires_grad=True)) == 2


def test_a_phase_masks_what_its_fprop_quantizes(monkeypatch):
    applied, real = [], Mask.apply
    monkeypatch.setattr(Mask, "apply", lambda mask, gradient: applied.append(gradient.shape) or real(mask, gradient))
    layer, x = next(inputs("linear"))
    model = luqrun.quantize_model(torch.nn.Sequential(layer), RECIPES["quartet"], skip=())
    both, weight = [layer.weight.shape, x.shape], [layer.weight.shape]
    for phase, expected in {False: both, "fnt": weight, "forward_high": [], "qaf": both}.items():
        luqrun.set_finetune(model, phase)
        applied.clear()
        model(x.clone().requires_grad_()).sum().backward()
        assert sorted(applied) == sorted(expected), phase


@pytest.mark.parametrize("policy", CheckpointPolicy)
def test_checkpointing_changes_nothing(policy):
    recipe = luqrun.recipe("mxfp4", weight={"range": "rms"}, fprop={"hadamard": 8, "trust_mask": True})
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *what, **how: policy)
    layer, x = next(inputs("linear"))
    model, found = luqrun.quantize_model(layer, recipe, skip=()), []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)):
        model.zero_grad()
        x = x.detach().requires_grad_()
        call(x).square().sum().backward()
        found.append((x.grad, model.weight.grad.clone()))
    assert same(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fprop": {"trust_mask": 1}}, r"quant\.fprop\.trust_mask=1 must be true or false$"),
        ({"fprop": {"trust_mask": True}}, r"quant\.fprop\.trust_mask is for range=rms of .*allowed: false$"),
        ({"dgrad": {"trust_mask": True}}, r"quant\.dgrad\.trust_mask is not a key; allowed: gradient, .*"),
    ],
)
def test_what_it_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        luqrun.recipe("mxfp4", **changes)
