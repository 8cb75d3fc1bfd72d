"""What is told of layers that do not compute in 4 bits: at conversion, and after the first training forward."""

import copy
import functools
import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.recipe import Recipe
from tests.layers import INT4, LUQ, quantize

X = torch.rand(3, 8)


def linear():
    return nn.Linear(8, 8)


class Half(nn.Module):
    """Reads the weight of its second layer, which it never calls."""

    def __init__(self):
        super().__init__()
        self.one, self.two = linear(), linear()

    def forward(self, x):
        return F.linear(self.one(x), self.two.weight, self.two.bias)


class Whole(Half):
    def forward(self, x):
        return self.two(self.one(x))


class Held(nn.Module):
    """Calls its layer by another reference than the one that torch knows."""

    def __init__(self, hold, call):
        super().__init__()
        self.one, self.call = linear(), call
        self.held = hold(self.one)

    def forward(self, x):
        return self.call(self.held)(x)


def told(work):
    """The warnings of work()."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(each.message) for each in caught if "high precision" in str(each.message)]


def train(model, steps=2):
    for _ in range(steps):
        model(X.clone().requires_grad_()).sum().backward()


def steps_of(model):
    return [int(layer.streams[0, 4]) for _, layer in quantized_layers(model)]


HOLDERS = {
    "list": (lambda layer: [layer], lambda held: held[0]),
    "tuple in a dict": (lambda layer: {"a": (layer,)}, lambda held: held["a"][0]),
    "partial": (functools.partial, lambda held: held),
    "object": (lambda layer: types.SimpleNamespace(layer=layer), lambda held: held.layer),
    "closure": (lambda layer: lambda x: layer(x), lambda held: held),
    "bound call": (lambda layer: layer.__call__, lambda held: held),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_layer_computes_quantized_whoever_holds_it(name):
    model = quantize(Held(*HOLDERS[name]))
    assert told(lambda: train(model)) == []
    assert steps_of(model) == [2]


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_that_was_compiled_before_computes_quantized(used):
    layer = linear()
    layer.compile(backend="eager")
    model = nn.Sequential(layer, nn.ReLU(), linear())
    if used:
        model(X)
    quantize(model)
    assert told(lambda: train(model)) == []
    assert steps_of(model) == [2, 2]
    torch._dynamo.reset()


def test_a_model_that_is_a_compiled_layer_says_that_it_is_not_any_more():
    layer = linear()
    layer.compile(backend="eager")
    with pytest.warns(UserWarning, match="compile what quantize_model returns"):
        quantize(layer)


PATCHES = {
    "method": lambda layer: types.MethodType(lambda self, x: F.linear(x, self.weight), layer),
    "wrapped": lambda layer: functools.partial(layer.forward),
    "function": lambda layer: lambda x: x,
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_layer_stays_in_high_precision_and_is_named(name):
    model = nn.Sequential(linear(), linear())
    model[1].forward = PATCHES[name](model[1])
    expected = model[1](X)
    messages = told(lambda: quantize(model))
    assert len(messages) == 1
    assert "the forward of 1 is patched" in messages[0]
    assert torch.equal(model[1](X), expected)
    assert [name for name, _ in quantized_layers(model)] == ["0"]


def by_itself(model):
    train(model)


def deep_copied(model):
    train(copy.deepcopy(model))


def pickled(model):
    train(pickle.loads(pickle.dumps(model)))


def in_eval_mode(model):
    train(model.eval())


def after_an_evaluation(model):
    with torch.no_grad():
        model.eval()(X)
    train(model.train())


def past_its_hooks(model):
    train(model.forward)


def part_of_another(model):
    train(nn.Sequential(model, nn.ReLU()))


def checkpointed(model):
    train(lambda x: checkpoint(model, x, use_reentrant=False))


def checkpointed_reentrantly(model):
    train(lambda x: checkpoint(model, x, use_reentrant=True))


def compiled(model):
    torch._dynamo.reset()
    train(torch.compile(model, backend="eager", fullgraph=True))


def compiled_itself(model):
    torch._dynamo.reset()
    model.compile(backend="eager")
    train(model)


def compiled_by_parts(model):
    torch._dynamo.reset()
    for part in model.children():
        part.compile(backend="eager")
    train(model)


def replicated(model):
    # As nn.DataParallel does it, which has no devices here.
    replica = model._replicate_for_data_parallel()
    for name, part in model._modules.items():
        replica._modules[name] = part._replicate_for_data_parallel()
        replica._modules[name]._parameters = dict(part._parameters)
    train(replica)


USES = [by_itself, deep_copied, pickled, in_eval_mode, after_an_evaluation, past_its_hooks, part_of_another]
USES += [checkpointed, checkpointed_reentrantly, compiled, compiled_itself, compiled_by_parts, replicated]


@pytest.mark.parametrize("use", USES)
def test_a_weight_that_other_code_reads_is_told_once(use):
    model = quantize(Half())
    messages = told(lambda: use(model))
    assert len(messages) == 1
    assert "1 layer is shown as quantized and did not compute in the first training forward: two." in messages[0]


@pytest.mark.parametrize("use", USES)
def test_layers_that_compute_are_not_told(use):
    assert told(lambda: use(quantize(Whole()))) == []


def test_watching_does_not_compile_again():
    for make in (Whole, lambda: nn.Sequential(linear(), nn.ReLU(), linear())):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(torch.compile(quantize(make()), backend="eager"), steps=4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("use", [by_itself, past_its_hooks])
def test_nothing_watches_after_the_first_training_step(use):
    model = quantize(Whole())
    use(model)
    train(model)
    assert not model._forward_hooks
    assert not any(each._post_accumulate_grad_hooks for each in model.parameters())


def test_frozen_weights_are_told_too():
    model = Half()
    model.two.requires_grad_(False)
    quantize(model)
    assert len(told(lambda: train(model))) == 1


def test_the_forward_alone_tells():
    model = quantize(Half())
    assert len(told(lambda: model(X))) == 1
    assert told(lambda: train(model)) == []


def test_an_evaluation_tells_nothing():
    model = quantize(Half())
    with torch.no_grad():
        assert told(lambda: model(X)) == []
    assert len(told(lambda: train(model))) == 1


def test_a_symbolic_trace_tells_nothing():
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, nn.Linear)

    model = nn.Sequential(quantize(Whole()), nn.ReLU())
    assert told(lambda: Leaves().trace(model)) == []


def test_parts_that_are_quantized_on_their_own_are_told_on_their_own():
    model = nn.ModuleList([Half(), Whole(), Half()])
    quantize(model[0])
    quantize(model)
    messages = told(lambda: train(nn.Sequential(*model)))
    assert sorted(message.split(".")[0].rpartition(" ")[2] for message in messages) == ["2", "two"]


def test_of_many_layers_patterns_are_told():
    model = quantize(nn.Sequential(*(Half() for _ in range(12))))
    (message,) = told(lambda: train(model))
    assert "12 of 24 layers are shown as quantized" in message
    assert "*.two (12 layers)" in message
    skipped = quantize_model(nn.Sequential(*(Half() for _ in range(12))), LUQ, skip=["*.two"])
    assert told(lambda: train(skipped)) == []


def own_linear():
    class Own(nn.Linear):
        pass

    return Own(8, 8)


def parametrized():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


class Product(nn.Module):
    """A layer of somebody else, as transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.zeros(8))


OTHERS = {
    "Conv1d": lambda: nn.Conv1d(3, 4, 5),
    "Conv3d": lambda: nn.Conv3d(1, 2, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 2, 2),
    "LSTM": lambda: nn.LSTM(4, 4),
    "GRUCell": lambda: nn.GRUCell(4, 4),
    "Bilinear": lambda: nn.Bilinear(2, 2, 2),
    "Product": Product,
    "Own": own_linear,
    "ParametrizedLinear": parametrized,
}


@pytest.mark.parametrize("skip", [(), ("first", "last")])
@pytest.mark.parametrize("kind", OTHERS)
def test_layers_of_other_kinds_are_told_in_one_line(kind, skip):
    model = nn.ModuleDict({"a": linear(), "b": OTHERS[kind](), "c": OTHERS[kind](), "d": linear(), "e": linear()})
    others = [each for name in "bc" for each in model[name].parameters()]
    share = 100 * sum(map(torch.numel, others)) / sum(map(torch.numel, model.parameters()))
    (message,) = told(lambda: quantize_model(model, LUQ, skip=skip))
    assert f"2 layers stay in high precision, {share:.{0 if share >= 10 else 2}f} % of the weights" in message
    assert f"b ({kind}) and 1 more" in message
    assert "\n" not in message


def test_all_of_a_model_of_other_kinds_is_a_hundred_per_cent():
    (message,) = told(lambda: quantize(nn.Sequential(nn.Conv1d(1, 2, 3, bias=False))))
    assert "1 layer stays in high precision, 100 % of the weights" in message


def test_a_class_of_the_same_name_is_told_with_its_module():
    kind = type("Linear", (nn.Linear,), {"__module__": "elsewhere"})
    (message,) = told(lambda: quantize(nn.Sequential(linear(), kind(8, 8))))
    assert "1 (elsewhere.Linear)" in message


def test_what_is_in_skip_is_not_told():
    model = nn.Sequential(linear(), nn.Conv1d(1, 1, 1), nn.Conv1d(3, 3, 3))
    assert told(lambda: quantize_model(model, LUQ, skip=["[12]"])) == []


def test_embeddings_norms_and_added_parameters_are_not_told():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.class_token, self.pos_embed = (nn.Parameter(torch.rand(1, 5, 8)) for _ in range(2))
            self.relative_position_bias_table = nn.Parameter(torch.rand(9, 2))
            self.layer_scale = nn.Parameter(torch.rand(8, 1, 1))

    quiet = [Added(), nn.Embedding(4, 8), nn.EmbeddingBag(4, 8), nn.LayerNorm([4, 8]), nn.RMSNorm([4, 8]), nn.PReLU(8)]
    assert told(lambda: quantize(nn.ModuleList([*quiet, nn.BatchNorm2d(4), nn.GroupNorm(2, 4), linear()]))) == []


def test_a_recipe_that_quantizes_nothing_tells_nothing():
    assert told(lambda: train(quantize(Half(), Recipe.of("fp32")))) == []
    assert len(told(lambda: train(quantize(Half(), Recipe.of("weights", weight=INT4))))) == 1
