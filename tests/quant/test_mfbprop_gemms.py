"""LUQRUN_KERNELS=mfbprop: networks train to the weights that they have with multiplications, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from running import quiet_machine
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant import gemms, kernels
from luqrun.quant.convert import quantized_layers
from luqrun.quant.kernels import mfbprop

STEPS = 3


@pytest.fixture
def choose(monkeypatch):
    """Sets LUQRUN_KERNELS, whatever was chosen before."""

    def choose(name: str) -> None:
        monkeypatch.setenv("LUQRUN_KERNELS", name)
        monkeypatch.setattr(kernels, "_fuses", {})
        monkeypatch.setattr(gemms, "_int8_devices", {})
        kernels._serving.clear()

    yield choose
    kernels._serving.clear()


def network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),  # an unsigned activation behind it
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(8),  # and a signed one
        nn.Conv2d(8, 6, 3, padding=1, dilation=2),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def train(recipe, phase=False) -> torch.Tensor:
    model = luqrun.quantize_model(network(), recipe)
    luqrun.set_finetune(model, phase)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        labels = torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


RECIPES = {
    "luq": {},
    "every layer": {"skip": ()},
    "two samples": {"samples": 2},
    "a forward in high precision": {"name": "backward_only"},
    "dgrad alone": {"wgrad": {"gradient": None}},
}


def recipe(name):
    keys = dict(RECIPES[name])
    return luqrun.recipe(keys.pop("name", "luq"), **keys)


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_trains_to_the_same_bits(name, choose):
    found = {}
    with quiet_machine():
        for backend in ("reference", "mfbprop"):
            choose(backend)
            found[backend] = train(recipe(name))
    assert found["reference"].isfinite().all()
    assert torch.equal(found["reference"], found["mfbprop"])


def test_the_kernels_of_the_cpu_train_to_these_bits_too(choose):
    found = {}
    with quiet_machine():
        for backend in ("cpu", "mfbprop"):
            choose(backend)
            found[backend] = train(luqrun.recipe("luq"))
    assert torch.equal(found["cpu"], found["mfbprop"])


def test_the_fine_tune_leaves_its_gemms_in_high_precision(choose):
    found = {}
    with quiet_machine():
        for backend in ("reference", "mfbprop"):
            choose(backend)
            found[backend] = train(luqrun.recipe("luq"), phase="fnt")
    assert torch.equal(found["reference"], found["mfbprop"])


def test_dgrad_and_wgrad_of_every_quantized_layer_come_from_here(choose, monkeypatch):
    calls, gemm = [], mfbprop.gemm
    monkeypatch.setattr(mfbprop, "gemm", lambda *arguments: calls.append(arguments[2]) or gemm(*arguments))
    choose("mfbprop")
    with quiet_machine():
        train(luqrun.recipe("luq"))
    # Two convolutions, one of two groups, and a linear layer: dgrad and wgrad of each.
    assert len(calls) == STEPS * 2 * (2 + 1 + 1)
    assert set(calls) == {True, False}  # signed and unsigned integers


def test_a_wrong_table_is_seen_in_the_weights(choose, monkeypatch):
    choose("mfbprop")
    with quiet_machine():
        right, values = train(luqrun.recipe("luq")), mfbprop.values

        def wrong(signed):
            table = values(signed).clone()
            table[table.abs() == 7] += 1
            return table

        monkeypatch.setattr(mfbprop, "values", wrong)
        assert not torch.equal(train(luqrun.recipe("luq")), right)


@pytest.mark.parametrize(
    ("quant", "keys", "words"),
    [
        ("nvfp4", {}, "dgrad of quant=nvfp4 has gradient=e2m1"),
        ("uniform_sr", {}, "gradient=int4"),
        ("luq", {"weight": {"format": "int8"}}, "weight=int8"),
        ("luq", {"samples": 3}, "quant.gradient.samples=3"),
    ],
)
def test_other_formats_are_refused_and_the_model_stays(quant, keys, words, choose):
    choose("mfbprop")
    model = network()
    with pytest.raises(UserError, match="LUQRUN_KERNELS=mfbprop") as refused:
        luqrun.quantize_model(model, luqrun.recipe(quant, **keys))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(quantized_layers(model))


def test_a_run_says_so(choose):
    choose("mfbprop")
    assert kernels.describe("cpu").startswith("mfbprop")
    assert "addition and XOR" in gemms.describe("cpu")
    assert "int8" not in gemms.describe("cpu")
