"""Layers that read one tensor quantize it once, and their numbers stay what they are."""

import functools
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from layers import ALL_STOCHASTIC, HINDSIGHT, LUQ, quantize
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luqrun.quant import quantizer, sharing
from luqrun.quant.convert import quantized_layers, set_step
from luqrun.quant.recipe import Recipe

ABSMAX = quantizer.Quantizer("int4")


class Projections(nn.Module):
    """Queries, keys and values of separate layers, and a layer after them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, again=lambda x: x):
        return self.out(self.query(x) * self.key(again(x)) + self.value(again(x)))


@pytest.fixture
def count(monkeypatch):
    """How many activations were quantized since it was last asked."""
    seen, run = [], quantizer.Quantizer.run

    def counted(self, x, *rest):
        seen.append(x.shape)
        return run(self, x, *rest)

    monkeypatch.setattr(quantizer.Quantizer, "run", counted)

    def asked() -> int:
        found = sum(shape == (5, 8) for shape in seen)
        seen.clear()
        return found

    return asked


def step(model, x, **how):
    set_step(model, 3)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **how)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(each.grad.clone() for each in model.parameters())]


@pytest.mark.usefixtures("by_operators")
def test_three_projections_quantize_their_input_once_with_the_numbers_of_three(count):
    torch.manual_seed(1)
    model, x = quantize(Projections(), LUQ), torch.randn(5, 8)
    shared = step(model, x)
    assert count() == 2 + 4  # the input and what `out` reads; and four gradients, of the same shape
    apart = step(model, x, again=torch.clone)
    assert count() == 4 + 4
    assert all(torch.equal(*pair) for pair in zip(shared, apart, strict=True))


def test_what_has_changed_in_place_is_quantized_again(count):
    model, x = quantize(Projections(), LUQ), torch.randn(5, 8)
    with torch.no_grad():
        first = model.query(x)
        x.mul_(-3)
        assert not torch.equal(model.query(x), first)
    assert count() == 2


@pytest.mark.parametrize("recipe", [ALL_STOCHASTIC, HINDSIGHT], ids=["stochastic", "hindsight"])
def test_an_input_whose_codes_differ_from_layer_to_layer_is_not_shared(recipe, count):
    model = quantize(Projections(), recipe)
    step(model, torch.randn(5, 8))
    assert count() >= 4 + 4


def test_layers_of_two_recipes_do_not_share(count):
    first, second = quantize(nn.Linear(8, 8), LUQ), quantize(nn.Linear(8, 8), Recipe.of("absmax", ABSMAX, ABSMAX))
    x = torch.randn(5, 8)
    with torch.no_grad():
        first(x), second(x), first(x)
    assert count() == 3


def test_a_layer_that_records_its_health_quantizes_for_itself(count):
    model, x = quantize(Projections(), LUQ), torch.randn(5, 8)
    for _, layer in quantized_layers(model):
        layer.health = {}
    step(model, x)
    assert count() == 4 + 4
    assert all("activation" in layer.health for _, layer in quantized_layers(model))


def test_nothing_is_held_longer_than_the_tensor():
    model = quantize(Projections(), LUQ)
    x = torch.randn(5, 8)
    with torch.no_grad():
        model.query(x)
    held = weakref.ref(sharing._last.made.value[0].codes)
    assert held() is not None
    tensors = [x]
    del x
    thread = threading.Thread(target=tensors.clear)  # as of a GPU's backward pass
    thread.start()
    thread.join()
    gc.collect()
    assert held() is None


@pytest.mark.usefixtures("by_operators")
def test_a_backward_pass_holds_no_codes_of_the_forward():
    model, x = quantize(Projections(), LUQ), torch.randn(5, 8)
    y = model(x)
    assert sharing._last.made is not None
    y.sum().backward()
    assert sharing._last.made is None


CHANGES = {
    "numpy": lambda x: np.multiply(x.numpy(), -5, out=x.numpy()),
    "data": lambda x: x.data.mul_(-5),
    "other data": lambda x: setattr(x, "data", -5 * x.data),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_is_called_again_sees_changes_that_torch_does_not_count(change):
    model, x = quantize(nn.Linear(8, 8), LUQ), torch.randn(5, 8)
    with torch.no_grad():
        first = model(x)
        change(x)
        assert not torch.equal(model(x), first)
        assert torch.equal(model(x), model(x.clone()))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_may_begin_between_two_readers(policy):
    torch.manual_seed(1)
    model, x = quantize(Projections(), LUQ), torch.randn(5, 8)

    def forward(h):
        contexts = functools.partial(create_selective_checkpoint_contexts, lambda *what, **how: policy)
        inside = checkpoint(lambda h: model.out(model.key(h)), h, use_reentrant=False, context_fn=contexts)
        return model.query(h) + inside

    def gradients(forward):
        set_step(model, 2)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        forward(leaf * 1.0).square().sum().backward()
        return [leaf.grad, *(each.grad for each in model.parameters() if each.grad is not None)]

    found = gradients(forward)
    expected = gradients(lambda h: model.query(h) + model.out(model.key(h)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_who_reads_alone_is_known():
    first, second, third = nn.Identity(), nn.Identity(), nn.Identity()
    assert not sharing.reads_alone(first)  # nobody has looked yet
    x = torch.ones(3)
    sharing.made_once(x, "key", first, lambda: 1)
    assert sharing.reads_alone(first)
    sharing.made_once(x, "key", second, lambda: 2)
    assert not sharing.reads_alone(first)
    assert not sharing.reads_alone(second)
    sharing.made_once(x + 1, "key", third, lambda: 3)
    assert sharing.reads_alone(third)
