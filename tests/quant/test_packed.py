"""Packed weights: what is read back without luqrun is bit for bit what an evaluation multiplies, in every format."""

import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import luqrun
from luqrun.config import conf_dir
from luqrun.quant.convert import quantize_model
from luqrun.quant.formats import FORMATS
from luqrun.quant.packed import packed_weights
from luqrun.quant.plan import Plan
from luqrun.quant.quantizer import quantizer
from luqrun.quant.recipe import Fprop, Recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "read_packed.py"
spec = importlib.util.spec_from_file_location("read_packed", SCRIPT)
read_packed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(read_packed)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x)[0].mean(1)


def network() -> nn.Module:
    """Convolutions, some in groups, with axes that no block divides; attention; a linear layer."""
    layers = [nn.Conv2d(3, 18, 3), nn.Conv2d(18, 36, 3, groups=2), nn.Conv2d(36, 20, 1), Attending(), nn.Linear(20, 7)]
    return nn.Sequential(*layers)


def multiplied(model, monkeypatch) -> dict[str, torch.Tensor]:
    """By parameter, the values that enter fprop in an evaluation."""
    seen, made = {}, Plan.quantize_forward

    def watched(self, operand, x, *how, **options):
        found = made(self, operand, x, *how, **options)
        if operand == "weight":
            seen[x.data_ptr()] = found[0].dequantized()
        return found

    monkeypatch.setattr(Plan, "quantize_forward", watched)
    with torch.no_grad():
        model.eval().to(memory_format=torch.channels_last)(torch.randn(2, 3, 8, 8))
    monkeypatch.undo()
    return {name: seen[each.data_ptr()] for name, each in model.named_parameters() if each.data_ptr() in seen}


def restored(model, path) -> dict[str, torch.Tensor]:
    """The weights, written as luqrun-export does, and read by the script."""
    packed = dict(packed_weights(model))
    tensors = {f"{name}.{part}": each for name, found in packed.items() for part, each in found.tensors().items()}
    how = {name: found.description() for name, found in packed.items()}
    save_file(tensors, path, {"weights": json.dumps(how), "tied": "{}"})
    return {name: each for name, each in read_packed.read(path).items() if not name.endswith(".signs")}


def check(recipe, tmp_path, monkeypatch, layers=6):
    model = quantize_model(network(), recipe, skip=(), seed=3)
    expected = multiplied(model, monkeypatch)
    found = restored(model, tmp_path / "packed.safetensors")
    assert found.keys() == expected.keys()
    assert len(found) == layers
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name
        assert values.any(), name


SHIPPED = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))
FORWARD = [name for name in SHIPPED if luqrun.recipe(name).fprop.weight is not None]


@pytest.mark.parametrize("name", FORWARD)
def test_every_recipe_s_weights_come_back_bit_for_bit(name, tmp_path, monkeypatch):
    check(luqrun.recipe(name), tmp_path, monkeypatch)


def of_weights(**keys) -> Recipe:
    return Recipe("own", Fprop(weight=quantizer(**keys)))


BLOCKS = {
    "whole": {},
    "e8m0": {"block": 16},
    "e4m3": {"block": 16, "scale_format": "e4m3"},
    "fp32": {"block": 7, "scale_format": "fp32", "headroom": 0.75},
    "tile": {"block": [16, 5]},
}


WITHOUT_BLOCKS = ("e3m0_radix4", "e3m0_xi")
PAIRS = [(form, blocks) for form in FORMATS for blocks in BLOCKS if blocks == "whole" or form not in WITHOUT_BLOCKS]


@pytest.mark.parametrize(("form", "blocks"), PAIRS)
def test_every_format_comes_back_bit_for_bit(form, blocks, tmp_path, monkeypatch):
    recipe = of_weights(format=form, **BLOCKS[blocks])
    check(recipe, tmp_path, monkeypatch)


@pytest.mark.parametrize("signs", ["fixed", "drawn"])
def test_the_signs_of_a_rotation_are_kept(signs, tmp_path):
    recipe = luqrun.recipe("luq", fprop={"hadamard": 16, "signs": signs}, skip=())
    model = quantize_model(network(), recipe)
    for _, each in packed_weights(model):
        assert each.layout.hadamard == 16
        assert each.signs.abs().tolist() == [1.0] * 16


def test_a_code_takes_its_bits_and_a_weight_without_negative_values_its_own_table():
    layer = quantize_model(nn.Sequential(nn.Linear(5, 3)), of_weights(format="int4", range="sawb"), skip=())
    with torch.no_grad():
        layer[0].weight.abs_()
    (name, found), *others = packed_weights(layer)
    assert (name, others) == ("0.weight", [])
    assert found.codes.numel() == 8  # 15 codes of half a byte
    assert found.layout.table == [float(value) for value in range(16)]


def test_training_mode_and_weights_stay_as_they_were():
    model = quantize_model(network(), luqrun.recipe("luq"), skip=()).train()
    model[1].eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    assert len(list(packed_weights(model))) == 6
    assert [each.training for each in (model, *model)] == [True, True, False, True, True, True]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_recipe_without_weights_in_fprop_packs_none():
    model = quantize_model(network(), luqrun.recipe("backward_only"), skip=())
    assert list(packed_weights(model)) == []


def test_the_reader_takes_thirty_lines_and_no_luqrun():
    assert len(inspect.getsourcelines(read_packed.read)[0]) <= 30
    text = SCRIPT.read_text()
    assert "import luqrun" not in text
    assert "from luqrun" not in text
