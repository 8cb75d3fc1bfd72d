"""Who draws what: forwards inside backward passes, activation checkpointing, copies of a layer, and ranks."""

import copy
import itertools
import pickle

import pytest
import torch
from layers import ALL_STOCHASTIC, LUQ, quantize, same, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.quant.draws import rename_copies
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.philox import LAYER, MICRO_STEP, RANK


def linear(recipe=LUQ):
    torch.manual_seed(0)
    return quantize(nn.Linear(16, 16, bias=False), recipe)


def all_differ(tensors):
    return not any(torch.equal(one, other) for one, other in itertools.combinations(tensors, 2))


# Forwards inside backward passes


class Solver(torch.autograd.Function):
    """As an adjoint or an implicit layer: its backward pass evaluates the layer some times, with gradients."""

    @staticmethod
    def forward(ctx, x, layer, found):
        ctx.save_for_backward(x)
        ctx.layer, ctx.found = layer, found
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, g):
        (start,) = ctx.saved_tensors
        for _ in range(3):
            with torch.enable_grad():
                x = start.detach().requires_grad_()
                ctx.found.append(torch.autograd.grad(ctx.layer(x), x, g)[0])
        return ctx.found[0], None, None


@pytest.mark.parametrize("recipe", [LUQ, ALL_STOCHASTIC], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("training", [True, False])
def test_each_forward_inside_a_backward_pass_draws_anew(recipe, training):
    layer, found = linear(recipe).train(training), []
    for _ in range(2):
        Solver.apply(torch.rand(8, 16, requires_grad=True), layer, found).sin().sum().backward()
    assert all_differ(found)
    assert layer.streams[0, MICRO_STEP] == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_dry_forward_between_a_checkpointed_one_and_its_backward_changes_nothing(reentrant):
    found = []
    for dry in (False, True):
        layer, x = linear(), torch.rand(4, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2):
            y = checkpoint(layer, x, use_reentrant=reentrant)
            if dry:
                with torch.no_grad():
                    layer(x)
            y.sin().sum().backward()
        found.append([layer.weight.grad, layer.streams])
    assert same(*found)
    assert layer.streams[0, MICRO_STEP] == 2


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints_count_each_forward_once(outer, inner):
    layer, x = linear(), torch.rand(4, 16, requires_grad=True)
    twin = copy.deepcopy(layer)

    def nested(x):
        return checkpoint(layer, x, use_reentrant=inner).sin()

    checkpoint(nested, x, use_reentrant=outer).sum().backward()
    twin(x).sin().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    assert torch.equal(layer.streams, twin.streams)


def test_a_solver_inside_a_checkpoint_draws_anew():
    layer, found, x = linear(), [], torch.rand(4, 16, requires_grad=True)
    checkpoint(lambda x: Solver.apply(x, layer, found), x, use_reentrant=False).sin().sum().backward()
    assert all_differ(found)


# Copies


def test_copies_of_a_layer_inside_one_model_draw_apart():
    def encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(quantize(layer), 3, enable_nested_tensor=False)

    def names(model):
        return [m.streams[0, LAYER].item() for m in model.modules() if "streams" in vars(m)]

    model, x = encoder(), torch.rand(2, 4, 8)
    train_step(model, x)
    assert len(set(names(model))) == len(names(model)) == 12
    assert names(model)[:4] == [0, 1, 2, 3]  # the first has what it had
    other = encoder()
    luqrun.set_step(other, 0)  # or so, for a compiler cannot
    assert names(other) == names(model)
    # A copy of the whole repeats it, also one that was pickled.
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = train_step(model, x)
    assert all(same(expected, train_step(twin, x)) for twin in twins)


def test_a_copy_and_its_original_in_one_model_draw_apart_wherever_they_are():
    layer, x = linear(), torch.rand(4, 16)
    online, target = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = online, target

        def forward(self, x):
            return self.target(x) + self.online(x)

    train_step(Both(), x)
    assert not torch.equal(online[0].weight.grad, target[0].weight.grad)
    before = layer.streams.clone()
    rename_copies([layer, target[0]])  # once more changes nothing
    assert torch.equal(before, layer.streams)


def test_a_copy_of_a_model_repeats_it():
    model, x = nn.Sequential(linear(), nn.ReLU(), linear()), torch.rand(4, 16)
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert same(train_step(model, x), train_step(twin, x))


# Ranks


def test_weights_draw_alike_on_every_rank_and_evaluation_everything():
    streams = torch.arange(18).view(3, 6)
    first, other = (ops.next_draws(streams.clone(), True, False, rank, 1) for rank in (0, 3))
    assert torch.equal(first[0], other[0])
    assert other[1:, RANK].tolist() == [3, 3]
    assert torch.equal(*(ops.next_draws(streams, False, True, rank, 1) for rank in (0, 3)))
