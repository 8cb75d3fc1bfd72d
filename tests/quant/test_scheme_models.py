"""Every recipe of conf/quant in whole models: a small network of convolutions and a Transformer's layer train and are
evaluated; recipes with blocks compile, are copied, checkpointed and saved as others are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import same
from torch import nn
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.config import conf_dir
from luqrun.errors import UserError
from luqrun.quant.convert import set_step
from luqrun.quant.finetune import PHASES
from luqrun.quant.layers import QuantLayer

NAMES = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))
BLOCKS = [name for name in NAMES if any(each.block is not None for each in luqrun.recipe(name).encodings)]
REPEATABLE = ("mxfp4", "nvfp4", "nvfp4_46", "nvfp4_nvidia")
REFUSED = {
    "mxfp4_rht_sr": r"weight=e2m1.*stochastic.*rounding=nearest",
    "tetrajet": r"weight=e2m1.*stochastic.*rounding=nearest",
    "mxfp4_rht": r"quant\.dgrad\.signs=drawn; allowed: none, fixed",
    "quartet": r"quant\.dgrad\.signs=drawn; allowed: none, fixed",
    "quartet_sr": r"weight=e2m1.*stochastic.*rounding=nearest",
    "quartet2": r"eden",
    "fp4_all_the_way": r"activation=e2m1.*stochastic.*rounding=nearest",
}


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 20, 3, padding=1, bias=False),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Conv2d(20, 36, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(144, 5),
        )

    def example(self):
        return torch.randn(6, 3, 8, 7).to(memory_format=torch.channels_last)


class Encoder(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(40, 4, 72, dropout=0.0, batch_first=True)

    def example(self):
        return torch.randn(3, 7, 40)


MODELS = {"convolutions": Convolutions, "encoder": Encoder}
every_model = pytest.mark.parametrize("kind", MODELS)


def made(kind, scheme):
    torch.manual_seed(2)
    model = MODELS[kind]()
    return luqrun.quantize_model(model, luqrun.recipe(scheme), skip=()), model.example()


def step(model, x, number=0, call=None, bf16=False):
    """The output, and the gradients of one step."""
    set_step(model, number)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = (model if call is None else call)(x)
    F.mse_loss(output.float(), torch.linspace(-1, 1, output.numel()).view(output.shape)).backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


@every_model
@pytest.mark.parametrize("scheme", NAMES)
def test_it_trains_and_is_evaluated(scheme, kind):
    model, x = made(kind, scheme)
    keys = set(MODELS[kind]().state_dict())
    assert {key for key in model.state_dict() if not key.endswith("_hindsight")} == keys
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for number in range(3):
        output, *gradients = step(model, x, number)
        assert all(gradient.isfinite().all() for gradient in gradients)
        losses.append(F.mse_loss(output, torch.linspace(-1, 1, output.numel()).view(output.shape)).item())
        optimizer.step()
    assert losses[2] < losses[0]
    model.eval()
    with torch.no_grad():
        first, second = model(x), model(x)
    assert first.isfinite().all()
    assert torch.equal(first, second)
    recipe = luqrun.recipe(scheme)
    assert all(str(recipe) in repr(layer) for layer in model.modules() if isinstance(layer, QuantLayer))


@every_model
@pytest.mark.parametrize("scheme", BLOCKS)
def test_a_step_is_a_function_of_its_number(scheme, kind):
    model, x = made(kind, scheme)
    twin, saved = copy.deepcopy(model), made(kind, scheme)[0]
    saved.load_state_dict(copy.deepcopy(model.state_dict()))
    first = step(model, x, 3)
    assert same(first, step(twin, x, 3))
    assert same(first, step(saved, x, 3))
    recipe = luqrun.recipe(scheme)
    drawn = any(not each.repeats for each in recipe.quantizers("gradient"))
    drawn |= recipe.dgrad.hadamard is not None  # with signs, which are drawn too
    assert same(first, step(model, x, 4)) != drawn


@every_model
@pytest.mark.parametrize("scheme", BLOCKS)
def test_memory_formats_and_bf16_change_the_rounding_of_sums_alone(scheme, kind):
    model, x = made(kind, scheme)
    exact = step(model, x)
    if kind == "convolutions":
        # Another order of summation may change a code of a later layer here and there.
        model.to(memory_format=torch.channels_last)
        for one, other in zip(exact, step(model, x.contiguous()), strict=True):
            assert (one - other).norm() <= 0.02 * one.norm() + 1e-6
    for one, other in zip(exact, step(model, x, bf16=True), strict=True):
        assert (one - other.float()).norm() <= 0.5 * one.norm() + 1e-6


@pytest.mark.parametrize("scheme", ["quartet", "quartet2"])
def test_compiled_it_gives_the_same_numbers(scheme):
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(20 * 6 * 5, 4))
    model, x = luqrun.quantize_model(plain, luqrun.recipe(scheme), skip=()), torch.randn(6, 3, 8, 7)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for number in (0, 1):
        assert same(step(model, x, number), step(twin, x, number, compiled))
    model.eval(), twin.eval()
    with torch.no_grad():
        assert torch.equal(model(x), compiled(x))


def test_many_sizes_share_a_graph():
    # A number of the encoding that the compiler saw, as headroom, would become a symbol.
    torch._dynamo.reset()
    model, graphs = luqrun.quantize_model(nn.Conv2d(5, 20, 3), luqrun.recipe("mxfp4_rht_sr"), skip=()), []
    twin = copy.deepcopy(model)
    counted = torch.compile(
        twin, backend=lambda graph, _: graphs.append(1) or graph.forward, dynamic=True, fullgraph=True
    )
    for size in (3, 5, 8):
        x = torch.randn(size, 5, 6, 4 + size)
        assert same(step(model, x), step(twin, x, 0, counted))
    assert len(graphs) <= 2


@pytest.mark.parametrize("scheme", REPEATABLE)
def test_checkpointed_it_gives_the_same_numbers(scheme):
    model, x = made("encoder", scheme)
    once = step(model, x)
    again = step(model, x, 0, lambda x: checkpoint(model, x, use_reentrant=False))
    assert same(once, again)


@pytest.mark.parametrize("scheme", REFUSED)
def test_a_forward_that_cannot_be_repeated_is_refused(scheme):
    model, x = made("encoder", scheme)
    with pytest.raises(UserError, match=f"^activation checkpointing cannot repeat .*{REFUSED[scheme]}"):
        step(model, x, 0, lambda x: checkpoint(model, x, use_reentrant=False))


@pytest.mark.parametrize("scheme", BLOCKS)
def test_the_last_phases(scheme):
    model, x = made("convolutions", scheme)
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    for phase in PHASES:
        luqrun.set_finetune(model, phase)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), evaluated), phase  # the recipe's own
        assert all(each.isfinite().all() for each in step(model.train(), x)), phase
        model.load_state_dict(made("convolutions", scheme)[0].state_dict())


def test_every_scheme_was_thought_of():
    assert set(REPEATABLE) | set(REFUSED) == set(BLOCKS)
