"""Which layers are first and last: traced, observed with an example, or, where neither shows it, by registration."""

import copy
import logging
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from luqrun.config import ModelConfig
from luqrun.errors import UserError
from luqrun.quant.convert import TWINS, quantize_model, quantized_layers
from luqrun.quant.coverage import unquantized_layers
from luqrun.quant.dataflow import EMBEDDINGS, find_ends
from luqrun.tasks.classification.networks import MODELS, build_model
from tests.layers import LUQ


def layers_of(model):
    others = {name: other.module for name, other in unquantized_layers(model, TWINS).items()}
    return {name: each for name, each in model.named_modules() if type(each) in TWINS or name in others}


def ends(model, example=None):
    layers = layers_of(model)
    embeddings = {name: each for name, each in model.named_modules() if isinstance(each, EMBEDDINGS)}
    return find_ends(model, {**layers, **embeddings}, list(layers), example)


def linear():
    return nn.Linear(4, 4)


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which they compute, and has an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.auxiliary, self.head, self.body, self.stem = linear(), linear(), linear(), linear()

    def forward(self, x, mask=None):
        x = self.stem(x)
        x = x + self.body(x)
        if mask is not None:
            x = x * mask
        return {"out": self.head(x), "auxiliary": self.auxiliary(x)}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.joint, self.table = linear(), linear(), linear(), linear()

    def forward(self, x, y):
        bias = self.table(torch.ones(4))  # sees no input
        return self.joint(self.left(x) + self.right(y) + bias)


class ReadsWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.stem = linear(), linear()

    def forward(self, x):
        return F.linear(F.linear(x, self.stem.weight).relu(), self.head.weight, self.head.bias)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.cell, self.into = linear(), linear(), linear()

    def forward(self, x):
        state = x = self.into(x)
        for _ in range(3):
            state = state + self.out(self.cell(state).relu())
        return state


class LooksAtItsInput(nn.Module):
    """What fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = linear(), linear()

    def forward(self, x):
        x = self.stem(x)
        return self.head(x) if x.sum() > -1e9 else x


class WithEmbedding(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.head, self.embedding, self.norm = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        return self.head(x + self.attention(x, x, x)[0])


class StartsWithConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body, self.stem = linear(), linear(), nn.Conv1d(2, 2, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class BesideAnEmbedding(nn.Module):
    """Numbers and a category, as in tables."""

    def __init__(self):
        super().__init__()
        self.head, self.joint, self.kinds = nn.Linear(4, 2), nn.Linear(6, 4), nn.Embedding(3, 2)

    def forward(self, numbers, kind):
        return self.head(self.joint(torch.cat([numbers, self.kinds(kind)], 1)))


X = torch.rand(2, 4)
CASES = {
    "backwards": (Backwards, (X,), ["stem"], ["auxiliary", "head"]),
    "two inputs": (TwoInputs, (X, X), ["left", "right"], ["joint"]),
    "reads weights": (ReadsWeights, (X,), ["stem"], ["head"]),
    "loop": (Loop, (X,), ["into"], ["out"]),
    "tied embedding": (WithEmbedding, (torch.tensor([[1, 2]]),), ["embedding"], ["head"]),
    "beside an embedding": (BesideAnEmbedding, (X, torch.tensor([0, 2])), ["joint", "kinds"], ["head"]),
    "another kind first": (StartsWithConv1d, (torch.rand(3, 2, 4),), ["stem"], ["head"]),
}


@pytest.mark.parametrize("how", ["traced", "observed"])
@pytest.mark.parametrize("name", CASES)
def test_first_and_last_follow_the_data(name, how):
    make, example, first, last = CASES[name]
    found = ends(make(), example if how == "observed" else None)
    assert how in found.how
    assert sorted(found.first) == first
    assert sorted(found.last) == last


def test_an_example_shows_what_tracing_cannot():
    model = LooksAtItsInput()
    guessed, seen = ends(model), ends(model, X)
    assert "by registration" in guessed.how
    assert "TraceError" in guessed.how
    assert (guessed.first, guessed.last) == (("head",), ("stem",))
    assert (seen.first, seen.last) == (("stem",), ("head",))


def test_an_example_may_be_keywords():
    assert ends(Backwards(), {"x": X, "mask": torch.ones(4)}).first == ("stem",)


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_networks_have_the_ends_that_they_register(name):
    model = build_model(ModelConfig(name=name), num_classes=5, channels=3, image_size=32)
    names = list(layers_of(model))
    found = ends(model)
    assert "traced" in found.how
    assert (found.first, found.last) == ((names[0],), (names[-1],))


def test_an_auxiliary_head_does_not_hide_the_main_one():
    model = tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2, aux_loss=True)
    quantize_model(model, LUQ)
    left = layers_of(model).keys() - {name for name, _ in quantized_layers(model)}
    shortcuts = {name for name in left if "downsample" in name}
    assert left - shortcuts == {"backbone.conv1", "classifier.4", "aux_classifier.4"}


@pytest.mark.parametrize("model", [nn.TransformerEncoder, nn.TransformerDecoder])
def test_torchs_own_transformers_are_chains(model):
    layer = nn.TransformerDecoderLayer if model is nn.TransformerDecoder else nn.TransformerEncoderLayer

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = linear()
            self.body = model(layer(4, 2, 8, batch_first=True), 2)

        def forward(self, x):
            return self.head(self.body(x, x) if model is nn.TransformerDecoder else self.body(x))

    found = ends(Net())
    assert (found.first, found.last) == (("body.layers.0.self_attn",), ("head",))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = linear(), nn.BatchNorm1d(4), linear()
        self.calls, self.seen, self.by_name = 0, [], {}
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.kept = x = self.norm(self.first(x))
        self.seen.append(x)
        self.by_name["x"] = x
        return self.last(F.dropout(x, random.random() / 2, self.training))


@pytest.mark.parametrize("example", [None, X], ids=["traced", "observed"])
def test_looking_changes_nothing(example):
    model = Remembers()
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    found = ends(model, example)
    assert (found.first, found.last) == (("first",), ("last",))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [each.training for each in model.modules()] == modes
    assert (model.calls, model.seen, model.by_name, hasattr(model, "kept")) == (0, [], {}, False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_what_was_chosen_is_logged(caplog):
    with caplog.at_level(logging.INFO, "luqrun"):
        quantize_model(Backwards(), LUQ)
        quantize_model(LooksAtItsInput(), LUQ, skip=["first"])
    text = caplog.text
    assert "first is stem (as traced by torch.fx)" in text
    assert "last is auxiliary, head (as traced by torch.fx)" in text
    assert "first is head (by registration, since torch.fx cannot trace the model (TraceError" in text


def test_an_example_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"example=.*shapes"):
        quantize_model(nn.Sequential(linear(), linear(), linear()), LUQ, example=torch.rand(2, 5))
