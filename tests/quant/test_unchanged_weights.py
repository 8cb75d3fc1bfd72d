"""Weights that do not change are quantized once, and nothing but the time of it is another."""

import copy

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, HINDSIGHT, INT4, INT4_SR, LUQ, quantize
from torch import nn
from torch.nn.utils import parametrize

import luqrun
from luqrun.quant.convert import set_step, unchanged_weights
from luqrun.quant.layers import QuantLayer
from luqrun.quant.plan import Plan
from luqrun.quant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("backend")

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "attention": (lambda: Attention(), (2, 5, 8)),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x.flip(1), x * 2)[0]  # three inputs, and so three parts of one weight


@pytest.fixture
def made(monkeypatch):
    """The operands that were quantized for a forward, in order."""
    found, real = [], Plan._quantize_forward

    def spy(plan, operand, *rest):
        found.append(operand)
        return real(plan, operand, *rest)

    monkeypatch.setattr(Plan, "_quantize_forward", spy)
    return found


def two_passes(model, shape):
    """Outputs and summed gradients of two micro-batches, and outputs of two evaluations."""
    set_step(model, 3)
    model.zero_grad()
    outputs = []
    for number in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        outputs.append(model.train()(x.requires_grad_()))
        outputs[-1].square().sum().backward()
        with torch.no_grad():
            outputs.append(model.eval()(x))
    return [*(each.detach() for each in outputs), *(each.grad.clone() for each in model.parameters())]


@pytest.mark.parametrize("scheme", ["luq", "mxfp4", "nvfp4_nvidia", "quartet2", "forward_only"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_are_the_same(name, scheme):
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    model = quantize(make(), luqrun.recipe(scheme))
    expected = two_passes(copy.deepcopy(model), shape)
    with unchanged_weights(model):
        found = two_passes(model, shape)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("by_operators")
@pytest.mark.parametrize(("name", "weights"), [("linear", 1), ("conv", 1), ("attention", 4)])
def test_each_weight_is_quantized_once_for_training_and_once_for_evaluation(name, weights, made):
    make, shape = LAYERS[name]
    model = quantize(make())
    two_passes(model, shape)
    assert made.count("weight") == 4 * weights
    made.clear()
    with unchanged_weights(model):
        two_passes(model, shape)
    assert made.count("weight") == 2 * weights
    assert made.count("activation") == 4 * weights


@pytest.mark.parametrize(
    "recipe",
    [ALL_STOCHASTIC, HINDSIGHT, Recipe.of("weights", weight=INT4_SR), luqrun.recipe("mxfp4_rht_sr")],
    ids=lambda recipe: recipe.name,
)
def test_weights_that_are_drawn_or_learn_their_range_are_quantized_each_time(recipe, made):
    model = quantize(nn.Linear(64, 6), recipe)
    twin = copy.deepcopy(model)
    with unchanged_weights(model):
        found = two_passes(model, (5, 64))
    assert made.count("weight") == 4
    assert all(torch.equal(one, other) for one, other in zip(found, two_passes(twin, (5, 64)), strict=True))


def test_a_change_counts_afterwards_and_an_error_ends_it():
    model, x = quantize(nn.Linear(8, 6)), torch.randn(3, 8)
    with pytest.raises(RuntimeError), unchanged_weights(model):  # noqa: PT012
        before = model(x)
        raise RuntimeError
    with torch.no_grad():
        model.weight.mul_(-1)
        model.bias.mul_(-1)
    assert torch.equal(model(x), -before)
    assert all(layer.kept is None for layer in model.modules() if isinstance(layer, QuantLayer))


def test_other_precisions_and_phases_are_kept_apart():
    model, x = quantize(nn.Linear(8, 6), Recipe.of("luq", INT4, INT4, E3M0)), torch.randn(3, 8)
    twin = copy.deepcopy(model)
    with unchanged_weights(model), torch.no_grad():
        for half in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                assert torch.equal(model(x), twin(x))
        for each in (model, twin):
            luqrun.set_finetune(each, "forward_high")
            each.train()
        assert torch.equal(model(x), twin(x))


def test_what_is_computed_from_parameters_is_quantized_each_time(made):
    layer = nn.Linear(8, 6)
    model = quantize(layer, LUQ)
    parametrize.register_parametrization(model, "weight", nn.Identity())
    parametrize.register_parametrization(model, "weight", Doubled())
    with unchanged_weights(model), torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 8))
    assert made.count("weight") == 3


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight
