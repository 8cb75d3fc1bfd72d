"""quantize_model: which layers it swaps, what it keeps, and the switch to fine-tuning."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant.attention import QuantMultiheadAttention
from luqrun.quant.convert import quantize_model, quantized_layers, set_finetune, set_shared_ranges
from luqrun.quant.layers import QuantConv2d, QuantLinear
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

INT4 = Quantizer("int4", range="sawb")
LUQ = Recipe.of("luq", INT4, INT4, Quantizer("e3m0", rounding="stochastic"))


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return (self.conv2(self.bn1(self.conv1(x)).relu()) + self.downsample(x)).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = Block(4, 6)
        self.layer2 = Block(6, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


BLOCKS = {f"layer{i}.conv{j}" for i in (1, 2) for j in (1, 2)}
SHORTCUTS = {"layer1.downsample.0", "layer2.downsample.0"}
EVERYTHING = BLOCKS | SHORTCUTS | {"stem", "fc"}


def swapped(model):
    return {name for name, _ in quantized_layers(model)}


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (None, BLOCKS),
        ((), EVERYTHING),
        (("first",), EVERYTHING - {"stem"}),
        (["last"], EVERYTHING - {"fc"}),
        (("shortcut",), EVERYTHING - SHORTCUTS),
        (("layer1.*", "fc"), {"stem", "layer2.conv1", "layer2.conv2", "layer2.downsample.0"}),
        (("*.conv[2]",), EVERYTHING - {"layer1.conv2", "layer2.conv2"}),
    ],
    ids=["recipe", "nothing", "first", "last", "shortcut", "names and patterns", "pattern"],
)
def test_skip(skip, expected):
    options = {} if skip is None else {"skip": skip}
    model = Net()
    assert quantize_model(model, LUQ, **options) is model
    assert swapped(model) == expected
    output = model(torch.randn(2, 3, 6, 6))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("last 50%",), "012"),
        (("last", "last 50%"), "012"),
        (("last 50%", "first", "last"), "12"),
        (("first", "last", "last 10%"), "1234"),
        (("last 99%",), ""),
    ],
)
def test_a_share_is_of_the_layers_that_other_entries_leave(skip, left):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not left else "error")
        assert swapped(quantize_model(model, LUQ, skip=skip)) == set(left)


@pytest.mark.parametrize("operand", ["activation", "gradient"])
def test_a_signed_maximum_is_not_shared_by_processes(operand):
    chosen = {operand: Quantizer("e3m0", "signed_max")}
    model = quantize_model(nn.Linear(4, 4), Recipe.of("mine", **chosen), skip=())
    with pytest.raises(UserError, match=rf"quant\.{operand}\.range=signed_max.*distributed\.range=rank"):
        set_shared_ranges(model, True)
    set_shared_ranges(model, False)
    set_shared_ranges(quantize_model(nn.Linear(4, 4), Recipe.of("mine", weight=chosen[operand]), skip=()), True)


def test_skip_of_the_recipe_is_used_unless_overridden():
    recipe = Recipe.of("mine", INT4, INT4, skip=("fc", "stem"))
    assert swapped(quantize_model(Net(), recipe)) == EVERYTHING - {"fc", "stem"}
    assert swapped(quantize_model(Net(), recipe, skip=())) == EVERYTHING


def test_a_model_without_shortcuts_may_skip_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert swapped(quantize_model(model, LUQ)) == {"1"}


def test_a_pattern_that_matches_nothing_is_an_error():
    model = Net()
    with pytest.raises(UserError, match=r"skip.*'head'.*first, last, shortcut.*stem"):
        quantize_model(model, LUQ, skip=["head"])
    with pytest.raises(UserError, match=r"skip='fc'.*list"):
        quantize_model(model, LUQ, skip="fc")
    assert not swapped(model)


def test_layers_stay_the_objects_that_they_were():
    model = Net()
    layers = dict(model.named_modules())
    quantize_model(model, LUQ)
    assert all(layers[name] is module for name, module in model.named_modules())


def test_quantizing_twice_warns_and_changes_nothing():
    model = quantize_model(Net(), LUQ, skip=())
    with pytest.warns(UserWarning, match="quantized already"):
        assert quantize_model(model, Recipe.of("other", INT4), skip=()) is model
    assert all(layer.recipe is LUQ for _, layer in quantized_layers(model))


def test_a_refused_layer_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2, kdim=3))
    with pytest.raises(UserError, match="kdim"):
        quantize_model(model, LUQ, skip=())
    assert not swapped(model)


def test_parameters_keys_and_settings_stay():
    model = Net()
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    quantize_model(model, LUQ, skip=())
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert not model.layer1.conv1.training
    assert model.layer2.conv1.training
    assert not model.fc.weight.requires_grad
    assert isinstance(model.stem, QuantConv2d)
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.fc, QuantLinear)
    assert isinstance(model.fc, nn.Linear)
    before = model.stem.weight.detach().clone()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, before)


def test_hooks_stay():
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    quantize_model(model, LUQ, skip=())
    model(torch.randn(2, 3)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer), "c": nn.Linear(3, 3)})
    model["c"].weight = layer.weight
    quantize_model(model, LUQ, skip=())
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"][1]
    assert model["c"].weight is model["a"].weight
    assert swapped(model) == {"a", "c"}


def test_a_model_that_is_a_layer_is_replaced():
    for layer, twin in ((nn.Linear(3, 2), QuantLinear), (nn.Conv2d(1, 2, 3), QuantConv2d)):
        model = quantize_model(layer, LUQ, skip=())
        assert type(model) is twin
        assert model.weight is layer.weight
    model = quantize_model(nn.MultiheadAttention(4, 2), LUQ, skip=())
    assert type(model) is QuantMultiheadAttention
    assert type(model.out_proj) is QuantLinear


def test_print_shows_the_recipe():
    text = repr(quantize_model(Net(), LUQ))
    lines = [line for line in text.splitlines() if "Quant" in line]
    assert len(lines) == len(BLOCKS)
    for line in lines:
        assert "int4/sawb/nearest" in line
        assert "e3m0/absmax/stochastic" in line
        assert "kernel_size" in line
    assert "gradient=high precision" in repr(quantize_model(nn.Linear(2, 2), Recipe.of("fwd", INT4, INT4), skip=()))
    attention = repr(quantize_model(nn.MultiheadAttention(4, 2), LUQ, skip=()))
    assert attention.count("int4/sawb/nearest") >= 4  # weight and activation, of the layer and of its out_proj


def test_a_recipe_without_quantizers_leaves_the_model_as_it_is():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize_model(model, Recipe.of("fp32")) is model
    assert not swapped(model)


def test_warns_when_everything_is_skipped():
    with pytest.warns(UserWarning, match=r"luq.*skip"):
        quantize_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), LUQ)


def test_subclasses_are_left_with_a_warning():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    with pytest.warns(UserWarning, match=r"1 \(Own\)"):
        quantize_model(model, LUQ, skip=())
    assert swapped(model) == {"0"}
    assert type(model[1]) is Own


def test_a_plain_conversion_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(Net(), LUQ)


@pytest.mark.parametrize("kind", ["skipped", "subclass"])
def test_the_projection_of_an_attention_left_alone_is_left_too(kind):
    # nn.MultiheadAttention reads out_proj's weight and never calls it: a swapped one would only look quantized.
    class Own(nn.MultiheadAttention):
        pass

    attention = (Own if kind == "subclass" else nn.MultiheadAttention)(4, 2)
    model = nn.ModuleDict({"attention": attention, "fc": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model(model, LUQ, skip=["attention"] if kind == "skipped" else ())
    assert swapped(model) == {"fc"}


def test_first_means_the_whole_attention():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 2))
    quantize_model(model, LUQ, skip=("first", "last"))
    assert swapped(model) == {"0.linear1", "0.linear2"}


def test_the_out_projection_alone_may_be_skipped():
    model = quantize_model(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}), LUQ, skip=("*.out_proj",))
    assert swapped(model) == {"attention"}
    x = torch.randn(3, 2, 4)
    model["attention"](x, x, x)[0].sum().backward()


def test_finetune_trains_int4_weights_and_evaluates_int4_both():
    layer = quantize_model(nn.Linear(6, 4, bias=False), LUQ, skip=())
    x, g = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    a, w = (INT4.quantize(t).dequantize() for t in (x, layer.weight))
    quantized = layer(x).detach()
    torch.testing.assert_close(quantized, F.linear(a, w), rtol=1e-5, atol=1e-6)
    set_finetune(layer, True)
    output = layer(x)
    torch.testing.assert_close(output, F.linear(x, w), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output, quantized, rtol=1e-3)
    output.backward(g)
    torch.testing.assert_close(x.grad, g @ w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, g.t() @ x.detach(), rtol=1e-5, atol=1e-6)
    layer.eval()
    assert torch.equal(layer(x), quantized)
    layer.train()
    set_finetune(layer, False)
    assert torch.equal(layer(x), quantized)


def test_finetune_reaches_every_layer():
    model = quantize_model(Net(), LUQ, skip=())
    set_finetune(model, True)
    assert all(layer.finetune for _, layer in quantized_layers(model))


def test_top_level_names():
    assert luqrun.quantize_model is quantize_model
    assert luqrun.set_finetune is set_finetune
    with pytest.raises(AttributeError, match="quantise"):
        _ = luqrun.quantise
