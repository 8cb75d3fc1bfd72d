"""The last phase of a training: what each GEMM takes in high precision, what evaluation sees, what is remembered."""

import copy

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, HINDSIGHT, INT4, INT4_SR, LUQ, mlp, quantize, same, train_step, values
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant.convert import quantized_layers, set_finetune
from luqrun.quant.finetune import PHASES
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Fprop, Recipe, Wgrad

RDN = Quantizer("e3m0", rounding="nearest")  # draws nothing, so that it can be computed again
NEAREST = Recipe.of("nearest", INT4, INT4, RDN)
SAMPLES = Recipe.of("samples", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=2))
APART = Recipe(  # each GEMM its own
    "apart", Fprop(INT4, INT4), Dgrad(E3M0, Quantizer("int3")), Wgrad(Quantizer("e2m0", rounding="stochastic"), INT4_SR)
)
# What stays quantized in training: fprop's activation, weight; dgrad's gradient, weight; wgrad's gradient, activation.
KEPT = {
    False: ((1, 1), (1, 1), (1, 1)),
    True: ((0, 1), (0, 1), (0, 0)),
    "fnt": ((0, 1), (0, 1), (0, 0)),
    "forward_high": ((0, 0), (1, 1), (1, 1)),
    "qaf": ((1, 1), (0, 0), (0, 0)),
}
OWN = {"fprop": ["weight"], "wgrad": ("activation",)}
ALL = [*KEPT.items(), (OWN, ((1, 0), (1, 1), (1, 0))), ({"dgrad": ["gradient"]}, ((1, 1), (0, 1), (1, 1)))]


@pytest.mark.parametrize(("phase", "kept"), ALL, ids=str)
def test_what_each_gemm_takes(phase, kept):
    layer = quantize(nn.Linear(6, 4, bias=False), NEAREST)
    set_finetune(layer, phase)
    x, g = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    weight, quantizers = layer.weight.detach(), {"a": INT4, "w": INT4, "g": RDN}

    def operands(gemm, **tensors):
        flags = zip(tensors.items(), kept[gemm], strict=True)
        return [values(tensor, quantizers[name]) if quantized else tensor for (name, tensor), quantized in flags]

    output = layer(x)
    output.backward(g)
    a, w = operands(0, a=x.detach(), w=weight)
    torch.testing.assert_close(output, a @ w.t(), rtol=1e-5, atol=1e-6)
    dy, w = operands(1, g=g, w=weight)
    torch.testing.assert_close(x.grad, dy @ w, rtol=1e-5, atol=1e-6)
    dy, a = operands(2, g=g, a=x.detach())
    torch.testing.assert_close(layer.weight.grad, dy.t() @ a, rtol=1e-5, atol=1e-6)


def without(recipe, kept):
    """The recipe with null for what is not kept."""
    pairs = recipe.fprop, recipe.dgrad, recipe.wgrad
    return Recipe(
        recipe.name,
        *(
            type(pair)(*(each if flag else None for each, flag in zip(pair.operands, flags, strict=True)))
            for pair, flags in zip(pairs, kept, strict=True)
        ),
    )


def network(kind):
    torch.manual_seed(2)
    if kind == "attention":
        return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)
    if kind == "convolution":
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(16, 3)), torch.randn(2, 3, 6, 6)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)


@pytest.mark.parametrize("recipe", [LUQ, SAMPLES, ALL_STOCHASTIC, APART], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(("phase", "kept"), [(name, KEPT[name]) for name in PHASES] + ALL[-2:], ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution", "attention"])
def test_a_step_has_the_bits_of_a_recipe_with_null_for_these_operands(kind, phase, kept, recipe):
    plain, x = network(kind)
    model, twin = quantize(copy.deepcopy(plain), recipe), quantize(plain, without(recipe, kept))
    before = train_step(copy.deepcopy(model), x)
    set_finetune(model, phase)
    for step in (0, 3):
        luqrun.set_step(model, step), luqrun.set_step(twin, step)
        assert torch.equal(model(x), twin(x))
        assert same(train_step(model, x), train_step(twin, x))
    luqrun.set_step(model, 0)
    assert not same(train_step(model, x), before)
    set_finetune(model, False)
    luqrun.set_step(model, 0)
    assert same(train_step(model, x), before)


@pytest.mark.parametrize("phase", [True, *PHASES, OWN], ids=str)
@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC, HINDSIGHT], ids=lambda recipe: recipe.name)
def test_evaluation_is_the_recipe_s(recipe, phase):
    model, x = mlp(recipe), torch.randn(5, 8)
    train_step(model, x)
    with torch.no_grad():
        before = model.eval()(x)
        in_training = model.train()(x)
        set_finetune(model, phase)
        assert torch.equal(model.eval()(x), before)
        changed = "fprop" in (
            PHASES["fnt"] if phase is True else PHASES.get(phase) if isinstance(phase, str) else phase
        )
        assert torch.equal(model.train()(x), in_training) != changed


@pytest.mark.parametrize("phase", PHASES)
def test_a_backward_pass_in_evaluation_mode_has_the_recipe_s_weights_and_activations(phase):
    layer = quantize(nn.Linear(6, 4, bias=False), NEAREST).eval()
    set_finetune(layer, phase)
    x, g = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    layer(x).backward(g)
    dy = values(g, RDN) if phase == "forward_high" else g
    torch.testing.assert_close(x.grad, dy @ values(layer.weight.detach()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ values(x.detach()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_range_is_learnt_once_a_step_where_evaluation_needs_it(phase, frozen):
    layer = quantize(nn.Linear(8, 16, bias=False), HINDSIGHT)
    x, g = torch.randn(5, 8, requires_grad=frozen != "input"), torch.randn(5, 16)
    layer(x).backward(g)
    before = {"weight": layer.weight.abs().max(), "activation": x.abs().max(), "gradient": g.abs().max()}
    set_finetune(layer, phase)
    layer.weight.requires_grad_(frozen != "weight")
    with torch.no_grad():
        layer.weight.mul_(3)
    layer(10 * x).backward(2 * g)
    learnt = {
        "weight": (0.9 * 3 + 0.1) * before["weight"],
        "activation": (0.9 * 10 + 0.1) * before["activation"],
        "gradient": before["gradient"] * ((0.9 * 2 + 0.1) if phase == "forward_high" else 1),
    }
    for operand, maximum in learnt.items():
        torch.testing.assert_close(getattr(layer, f"{operand}_hindsight"), maximum.detach(), msg=operand)


@pytest.mark.parametrize("phase", PHASES)
def test_evaluation_in_the_phase_learns_nothing(phase):
    model, x = mlp(HINDSIGHT), torch.randn(5, 8)
    train_step(model, x)
    set_finetune(model, phase)
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        model(9 * x), model.eval()(9 * x)
    assert same(model.buffers(), before)


def test_layers_of_one_recipe_share_the_phase_and_other_recipes_have_their_own():
    model = nn.Sequential(mlp(LUQ), mlp(NEAREST))
    set_finetune(model, "qaf")
    found = [layer.finetune for _, layer in quantized_layers(model)]
    assert found[0] is found[1]
    assert found[2] is found[3]
    assert [phase.training.fprop for phase in found] == [LUQ.fprop] * 2 + [NEAREST.fprop] * 2
    assert all(phase.training.dgrad == Dgrad() for phase in found)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("qat", ("phase='qat'", "fnt, forward_high, qaf")),
        (None, ("phase=None", "fnt, forward_high, qaf")),
        (1, ("phase=1", "operands by GEMM")),
        (["fprop"], ("phase=['fprop']", "operands by GEMM")),
        ({"forward": ["weight"]}, ("phase=forward", "fprop, dgrad, wgrad")),
        ({"fprop": ["weights"]}, ("phase.fprop=weights", "activation, weight")),
        ({"fprop": ["gradient"]}, ("phase.fprop=gradient", "activation, weight")),
        ({"dgrad": "gradient"}, ("phase.dgrad='gradient'", "a list", "gradient, weight")),
        ({"wgrad": None}, ("phase.wgrad=None", "a list", "gradient, activation")),
    ],
    ids=str,
)
def test_a_wrong_phase_is_named_with_what_is_allowed(phase, words):
    model = mlp()
    with pytest.raises(UserError) as refusal:
        set_finetune(model, phase)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(layer.finetune is None for _, layer in quantized_layers(model))
