"""Quantized layers under torch.compile: the draws of eager mode also with Inductor, one graph for many sizes."""

import copy

import pytest
import torch
from layers import ALL_STOCHASTIC, HINDSIGHT, LUQ, mlp, quantize, same, train_step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.quant.finetune import PHASES


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Siamese(nn.Module):
    """Two forwards of one layer in one graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.layer(x), self.layer(x)


def steps(layer, call, x, g):
    """Weight gradients of two forwards, their backward passes afterwards, and of one forward; twice; then FNT's."""
    found = []
    for step in (0, 5):
        luqrun.set_step(layer, step)
        outputs = [call(x), call(x)]
        found += [torch.autograd.grad(output, layer.weight, g)[0] for output in outputs]
        found += torch.autograd.grad(call(x), layer.weight, g)
    return found


@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC, HINDSIGHT], ids=lambda recipe: recipe.name)
def test_inductor_draws_as_eager_mode_does(recipe):
    # Inductor computes again in the backward pass what is cheap: it once read the name of a draw after it had advanced.
    layer = quantize(nn.Linear(16, 8, bias=False), recipe)
    twin, x, g = copy.deepcopy(layer), torch.rand(4, 16), torch.randn(4, 8)
    eager, compiled = steps(layer, layer, x, g), steps(twin, torch.compile(twin, fullgraph=True), x, g)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert not any(torch.equal(one, other) for i, one in enumerate(compiled) for other in compiled[:i])
    assert same([layer.streams, *layer.buffers()], [twin.streams, *twin.buffers()])


@pytest.mark.parametrize("recipe", [LUQ, HINDSIGHT], ids=lambda recipe: recipe.name)
def test_the_last_phases_in_one_compiled_model(recipe):
    model, x = mlp(recipe), torch.randn(5, 8)
    twin = copy.deepcopy(model)
    call = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for phase in (False, *PHASES, {"fprop": ["weight"]}, False):
        luqrun.set_finetune(model, phase), luqrun.set_finetune(twin, phase)
        for one, other in zip(train_step(model, x), train_step(call, x, twin), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert same(model.buffers(), twin.buffers())


@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC], ids=lambda recipe: recipe.name)
def test_a_compiled_checkpoint_draws_as_no_checkpoint_does(recipe):
    # What a checkpoint computes again in the backward pass must not read names that advanced.
    layer = quantize(nn.Linear(16, 8, bias=False), recipe)
    twin, x, g = copy.deepcopy(layer), torch.rand(4, 16), torch.randn(4, 8)
    compiled = torch.compile(lambda x: checkpoint(twin, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    for one, other in zip(steps(layer, layer, x, g), steps(twin, compiled, x, g), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.streams, twin.streams)


def test_two_forwards_in_one_graph_draw_apart():
    model = quantize(Siamese())
    twin, x, g, found = copy.deepcopy(model), torch.rand(4, 16), torch.randn(4, 8), []
    for each, call in ((model, model), (twin, torch.compile(twin, backend="aot_eager", fullgraph=True))):
        luqrun.set_step(each, 3)
        found.append([torch.autograd.grad(y, each.layer.weight, g, retain_graph=True)[0] for y in call(x)])
    assert same(*found)
    assert not torch.equal(*found[0])


def test_copies_of_a_layer_in_a_compiled_model_draw_apart():
    layer = quantize(nn.Linear(8, 8, bias=False))
    model = nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer))
    twin, x, found = copy.deepcopy(model), torch.rand(4, 8), []
    for each, call in ((model, model), (twin, torch.compile(twin, backend="aot_eager", fullgraph=True))):
        call(x).sin().sum().backward()
        found.append([*(parameter.grad for parameter in each.parameters()), each[0].streams, each[2].streams])
    assert same(*found)
    assert not torch.equal(model[0].streams, model[2].streams)


@pytest.mark.parametrize("how", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_many_sizes_are_two_graphs_at_most(kind, how):
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    if kind == "conv":
        plain = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model, graphs = quantize(plain), []
    twin = copy.deepcopy(model)
    counted = torch.compile(twin, backend=lambda graph, _: graphs.append(1) or graph.forward, **how)
    for size in (3, 5, 8, 6, 9):
        x = torch.rand(2, size, 6) if kind == "linear" else torch.rand(size, 3, 2 * size, 7 + size)
        results = []
        for each, call in ((model, model), (twin, counted)):
            each.zero_grad()
            y = call(x)
            y.square().sum().backward()
            results.append([y.detach(), *(parameter.grad for parameter in each.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


def test_blocks_that_are_alike_share_a_graph():
    model = quantize(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(3))))
    twin, graphs, x = copy.deepcopy(model), [], torch.rand(5, 4)

    def counting(graph, inputs):
        graphs.append(1)
        return graph.forward

    for block in twin:
        block.compile(backend=counting)
    found = []
    for each in (model, twin):
        each(x).sin().sum().backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert same(*found)
    assert len(graphs) <= 2  # the first one's input needs no gradient


def test_a_compiled_step_is_refused_a_second_derivative():
    layer, x = quantize(nn.Linear(4, 4)), torch.rand(2, 4, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager")(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        F.mse_loss(slope, x).backward()
