"""Quantized layers as modules: draws, evaluation, hindsight, checkpointing, copies, padding."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from layers import ALL_STOCHASTIC, BUFFERS, E3M0, HINDSIGHT, INT4, LUQ, NOTHING, mlp, quantize, same, train_step, values
from torch import nn
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.errors import UserError
from luqrun.quant.convert import set_step
from luqrun.quant.layers import QuantConv2d
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

# Layers


@pytest.mark.parametrize("recipe", [LUQ, NOTHING], ids=["luq", "no quantizer"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "stride": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "kernel_size": (2, 3)},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_padding_modes(options, recipe):
    plain = nn.Conv2d(3, 4, **{"kernel_size": 3, **options})
    layer = QuantConv2d.from_module(copy.deepcopy(plain), recipe, 0, 0)
    x = torch.randn(2, 3, 6, 7)
    if recipe is NOTHING:
        expected = plain(x)
    else:
        with torch.no_grad():
            plain.weight.copy_(values(plain.weight))
        # Padding repeats or adds zeros: the quantized padded input is the padded quantized one, up to its scale.
        padding = plain._reversed_padding_repeated_twice
        if options.get("padding_mode", "zeros") != "zeros":
            padded = F.pad(x, padding, mode=options["padding_mode"])
        else:
            padded = F.pad(x, padding) if isinstance(plain.padding, str) else x
        expected = F.conv2d(values(padded), plain.weight, plain.bias, plain.stride, 0, plain.dilation)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_unbatched_convolution():
    layer, x = quantize(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(3, 6, 7, requires_grad=True)
    output = layer(x)
    assert output.shape == (4, 6, 7)
    assert torch.equal(output, layer(x[None])[0])
    output.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("layer", "x", "positions"),
    [(nn.Linear(5, 3), torch.randn(4, 5), (0,)), (nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6), (0, 2, 3))],
    ids=["linear", "conv"],
)
def test_bias_is_added_and_its_gradient_is_not_quantized(layer, x, positions):
    layer = quantize(copy.deepcopy(layer))
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)
    torch.testing.assert_close(layer.bias.grad, g.sum(positions))
    with torch.no_grad():
        bias, layer.bias = layer.bias, None
        torch.testing.assert_close(output, layer(x) + bias.view(-1, *(1,) * (len(positions) - 1)))


# Draws


def test_consecutive_training_forwards_draw_differently():
    model, x = mlp(), torch.randn(5, 8)
    first, second = train_step(model, x), train_step(model, x)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[3], second[3])  # the last bias: nothing random before it


def test_set_step_reproduces_exactly_and_differs_between_steps():
    model, x = mlp(ALL_STOCHASTIC), torch.randn(5, 8)
    set_step(model, 7)
    first = [train_step(model, x) for _ in range(3)]  # micro-steps 0, 1, 2
    train_step(model, x)
    set_step(model, 7)
    again = [train_step(model, x) for _ in range(3)]
    assert all(map(same, first, again))
    set_step(model, 8)
    assert not any(torch.equal(train_step(model, x)[0], grads[0]) for grads in first)
    resumed = mlp(ALL_STOCHASTIC)
    set_step(resumed, 7)
    assert same(train_step(resumed, x), first[0])


def test_draws_depend_on_the_seed_and_the_layer_and_on_no_global_generator():
    x = torch.randn(5, 8)
    assert same(train_step(mlp(seed=3), x), train_step(mlp(seed=3), x))
    assert not torch.equal(train_step(mlp(seed=3), x)[0], train_step(mlp(seed=4), x)[0])
    layer = nn.Linear(8, 8, bias=False)
    twins = quantize(nn.ModuleList([copy.deepcopy(layer), copy.deepcopy(layer)]))
    state = torch.get_rng_state()
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad(twin(x), twin.weight, g)[0] for twin in twins]
    assert not torch.equal(*grads)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_quantized_by_a_second_call_draw_apart():
    # Two recipes in one model are two calls, whose layers must not share random bits.
    layer, x, g = nn.Linear(8, 8, bias=False), torch.randn(5, 8), torch.randn(5, 8)
    model = nn.ModuleDict({"encoder": copy.deepcopy(layer), "decoder": copy.deepcopy(layer)})
    luqrun.quantize_model(model, LUQ, skip=["decoder"])
    luqrun.quantize_model(model, Recipe.of("other", INT4, INT4, E3M0), skip=())
    grads = [torch.autograd.grad(model[name](x), model[name].weight, g)[0] for name in model]
    assert not torch.equal(*grads)


@pytest.mark.parametrize("recipe", [ALL_STOCHASTIC, HINDSIGHT], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_draws_and_hindsight_alone(recipe, mode):
    models, x = [mlp(recipe), mlp(recipe)], torch.randn(5, 8)
    with mode():  # before the first step too: what it makes must be of use afterwards
        models[0](x)
    assert same(*(train_step(model, x) for model in models))
    evaluated = models[0]
    buffers = {name: buffer.clone() for name, buffer in evaluated.named_buffers()}
    with mode():
        evaluated(10 * x)  # training mode without gradients: nothing is learnt
        evaluated.eval()
        outputs = [evaluated(10 * x) for _ in range(2)]
    assert torch.equal(*outputs)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in evaluated.named_buffers())
    evaluated.train()
    assert same(*(train_step(model, x) for model in models))


@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC], ids=lambda recipe: recipe.name)
def test_training_in_evaluation_mode_draws_as_training_does(recipe):
    # With batch norm frozen, or a network from from_pretrained: a gradient is wanted, and .training is False.
    models, x = [mlp(recipe), mlp(recipe).eval()], torch.randn(5, 8)
    found = []
    for step in range(3):
        for model in models:
            set_step(model, step)
        found.append(train_step(models[0], x))
        assert same(found[-1], train_step(models[1], x))
        assert same(train_step(models[0], x), train_step(models[1], x))  # the next micro-step
    assert not any(torch.equal(one[0], other[0]) for one, other in itertools.pairwise(found))


def test_a_forward_range_is_learnt_in_training_mode_and_a_gradients_in_every_backward_pass():
    model, x = mlp(HINDSIGHT).eval(), torch.randn(5, 8)
    train_step(model, x)
    assert {name.partition(".")[2] for name, buffer in model.named_buffers() if buffer > 0} == {"gradient_hindsight"}


def test_fine_tuning_learns_the_range_that_evaluation_will_use():
    model, x = mlp(HINDSIGHT), torch.randn(5, 8)
    train_step(model, x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    luqrun.set_finetune(model, True)
    train_step(model, 10 * x)
    changed = {
        name.partition(".")[2] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])
    }
    assert changed == {"activation_hindsight"}  # the weights are what they were, gradients are not quantized
    expected = 0.9 * 10 * x.abs().max() + 0.1 * x.abs().max()
    torch.testing.assert_close(model[0].activation_hindsight, expected)


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_a_forward_without_a_gradient_takes_no_draw(frozen):
    layer, x = quantize(nn.Linear(8, 8, bias=False)), torch.randn(5, 8, requires_grad=frozen == "weight")
    layer.weight.requires_grad_(frozen == "input")
    layer(x)
    assert layer.streams[:, 4].tolist() == [int(frozen != "both")] * 3


def test_a_stochastic_evaluation_is_the_same_at_every_step():
    model, x = mlp(ALL_STOCHASTIC).eval(), torch.randn(5, 8)
    with torch.no_grad():
        before = model(x)
        set_step(model, 100)
        assert torch.equal(model(x), before)


def test_hindsight_is_learnt_once_a_forward_and_used_by_the_next():
    layer = quantize(nn.Linear(6, 3, bias=False), HINDSIGHT)
    assert {name for name, _ in layer.named_buffers()} == BUFFERS
    x, g = torch.randn(4, 6), torch.randn(4, 3)
    layer(x).backward(g)
    maxima = {"activation": x, "weight": layer.weight, "gradient": g}
    for operand, tensor in maxima.items():
        assert getattr(layer, f"{operand}_hindsight") == tensor.abs().max()
    layer(3 * x).backward(g)
    largest = x.abs().max()
    torch.testing.assert_close(layer.activation_hindsight, 0.9 * (3 * largest) + 0.1 * largest)
    # What is used is the estimate: an input far beyond it is clipped to its sign times the estimate.
    clipped = x.sign() * layer.activation_hindsight
    weight = values(layer.weight, Quantizer("int4"))
    torch.testing.assert_close(layer.eval()(1e6 * x), F.linear(clipped, weight))


def test_hindsight_survives_nan():
    layer, x = quantize(nn.Linear(6, 3), HINDSIGHT), torch.randn(4, 6)
    layer(x).sum().backward()
    before = layer.activation_hindsight.clone()
    assert layer(x * torch.nan).isnan().all()
    assert torch.equal(layer.activation_hindsight, before)


def test_hindsight_of_a_tiny_gradient_in_a_half_precision_model():
    layer = quantize(nn.Linear(6, 3), HINDSIGHT).half()
    for exponent in (-20, -24):
        layer(torch.ones(4, 6, dtype=torch.float16)).backward(torch.full((4, 3), 2.0**exponent, dtype=torch.float16))
    assert layer.gradient_hindsight == pytest.approx(0.9 * 2.0**-24 + 0.1 * 2.0**-20, rel=1e-5)


# Activation checkpointing


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


class Cross(nn.Module):
    """Attention with two projections a forward."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        memory = x.flip(0)
        return self.attention(x, memory, memory, need_weights=False)[0]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.layers(x)


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", [E3M0, HINDSIGHT.gradient], ids=str)
@pytest.mark.parametrize("block", [Chain, Twice, Cross])
def test_checkpointing_changes_nothing(block, gradient, reentrant):
    plain = quantize(block(), Recipe.of("nearest forward", INT4, INT4, gradient))
    twin = Checkpointed(copy.deepcopy(plain), reentrant)
    for step in range(3):
        x = (torch.randn(5, 3, 8) * (step + 1)).requires_grad_()
        expected, found = train_step(plain, x), train_step(twin, x)
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-6)
        assert same(plain.buffers(), twin.buffers())


@pytest.mark.parametrize("recipe", [ALL_STOCHASTIC, HINDSIGHT], ids=lambda recipe: recipe.name)
def test_checkpointing_refuses_a_forward_that_it_cannot_repeat(recipe):
    model = Checkpointed(quantize(Chain(), recipe), reentrant=False)
    with pytest.raises(UserError, match="activation checkpointing cannot repeat"):
        model(torch.randn(5, 3, 8)).sum().backward()


# Copies, saving, two recipes


def test_two_recipes_in_one_process():
    x = torch.randn(5, 8)
    alone = [train_step(mlp(recipe), x) for recipe in (LUQ, ALL_STOCHASTIC)]
    models = [mlp(LUQ), mlp(ALL_STOCHASTIC)]
    outputs = [model(x).sin() for model in models]
    assert not torch.equal(*outputs)
    together = [train_step(mlp(recipe), x) for recipe in (LUQ, ALL_STOCHASTIC)]
    assert all(map(same, alone, together))


def test_a_deep_copy_goes_on_by_itself():
    model, x = mlp(HINDSIGHT), torch.randn(5, 8)
    train_step(model, x)
    twin = copy.deepcopy(model)
    train_step(model, 2 * x)
    assert same(train_step(twin, 2 * x), [parameter.grad for parameter in model.parameters()])
    assert same(twin.buffers(), model.buffers())
    train_step(twin, 5 * x)
    assert not torch.equal(twin[0].activation_hindsight, model[0].activation_hindsight)


def test_state_dict_round_trip_with_hindsight(tmp_path):
    model, x = mlp(HINDSIGHT), torch.randn(5, 8)
    train_step(model, x)
    keys = {f"{layer}.{name}" for layer in (0, 2) for name in {"weight", "bias", *BUFFERS}}
    assert set(model.state_dict()) == keys
    torch.save(model.state_dict(), tmp_path / "state.pt")
    resumed = mlp(HINDSIGHT)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (model, resumed):
        set_step(each, 1)
    assert same(train_step(model, 3 * x), train_step(resumed, 3 * x))
    assert same(model.buffers(), resumed.buffers())


def test_health_is_filled_by_a_training_pass():
    layer = quantize(nn.Linear(8, 3))
    layer.health = {}
    layer(torch.randn(5, 8)).sum().backward()
    assert set(layer.health) == {"weight", "activation", "gradient", "gradient_exponents"}
    assert layer.health["weight"].shape == (3,)
    assert layer.health["gradient_exponents"].sum() == 15
