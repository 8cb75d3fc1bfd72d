"""Recipes: the YAML files, overrides as keywords, and what an import loads."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import luqrun
from luqrun.config import conf_dir
from luqrun.errors import UserError
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import OPERANDS, Recipe

NAMES = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))
INT4 = Quantizer("int4", range="sawb")


def test_the_schemes_of_the_paper_are_there():
    assert set(NAMES) >= {"luq", "luq_smp2", "biased_log", "fp4_sr", "fp4_su", "uniform_sr", "fp32"}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_loads_names_itself_and_says_how_to_run_it(name):
    recipe = luqrun.recipe(name)
    assert recipe.name == name
    assert recipe.skip[:3] == ("first", "last", "shortcut")
    first_line = (conf_dir() / "quant" / f"{name}.yaml").read_text().splitlines()[0]
    assert first_line.startswith("# ")
    assert first_line.endswith(f"luqrun quant={name}")
    layer = luqrun.quantize_model(nn.Linear(4, 3), recipe, skip=())
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("luq", Quantizer("e3m0", rounding="stochastic", underflow="stochastic")),
        ("luq_smp2", Quantizer("e3m0", rounding="stochastic", underflow="stochastic", samples=2)),
        ("luq_pow2", Quantizer("e3m0", rounding="stochastic", underflow="stochastic", pow2_scale=True)),
        ("luq_hindsight", Quantizer("e3m0", range="hindsight", rounding="stochastic", underflow="stochastic")),
        ("biased_log", Quantizer("e3m0", rounding="nearest", underflow="flush")),
        ("fp4_sr", Quantizer("e3m0", rounding="stochastic", underflow="flush")),
        ("fp4_su", Quantizer("e3m0", rounding="nearest", underflow="stochastic")),
        ("uniform_sr", Quantizer("int4", rounding="stochastic")),
        ("forward_only", None),
    ],
)
def test_the_recipes_of_the_paper(name, gradient):
    assert luqrun.recipe(name) == Recipe.of(name, INT4, INT4, gradient)


def test_recipes_of_parts():
    assert not luqrun.recipe("fp32").quantizes
    backward = luqrun.recipe("backward_only")
    assert (backward.weight, backward.activation) == (None, None)
    assert backward.gradient == luqrun.recipe("luq").gradient
    assert luqrun.recipe("forward_sr").weight.rounding == "stochastic"


def test_overrides_as_keywords():
    plain = luqrun.recipe("luq")
    assert luqrun.recipe("luq", samples=2) == luqrun.recipe("luq", gradient={"samples": 2})
    assert luqrun.recipe("luq", samples=2).gradient.samples == 2
    assert luqrun.recipe("luq", samples=2).dgrad.gradient == plain.gradient
    both = luqrun.recipe("luq", samples=2, samples_scope="both")
    assert both.dgrad.gradient == both.wgrad.gradient == luqrun.recipe("luq", samples=2).wgrad.gradient
    both = luqrun.recipe("luq", samples=3, gradient={"format": "e2m0"})
    assert (both.gradient.samples, both.gradient.format, both.gradient.rounding) == (3, "e2m0", "stochastic")
    assert luqrun.recipe("luq", skip=()).skip == ()
    assert luqrun.recipe("luq", skip=["fc"]).skip == ("fc",)
    assert luqrun.recipe("luq", activation=None).activation is None
    assert luqrun.recipe("luq", activation=None).weight == plain.weight
    assert luqrun.recipe("luq", gradient={"format": "int4", "underflow": None}).gradient.form.name == "int4"
    assert luqrun.recipe("fp32", weight={"format": "int4"}).weight == Quantizer("int4")
    assert luqrun.recipe("luq", weight={"range": "absmax"}).weight == Quantizer("int4")
    assert luqrun.recipe("luq") == plain  # nothing sticks


def test_a_gemm_overrides_what_an_operand_is_elsewhere():
    plain, e2m0 = luqrun.recipe("luq"), Quantizer("e2m0", rounding="stochastic")
    found = luqrun.recipe("luq", wgrad={"gradient": {"format": "e2m0", "rounding": "stochastic"}})
    assert (found.fprop, found.dgrad) == (plain.fprop, plain.dgrad)
    assert found.wgrad == (e2m0, INT4, None)
    changed = luqrun.recipe("luq", dgrad={"weight": {"range": "absmax"}})  # without a format: keys to change
    assert changed.dgrad.weight == Quantizer("int4")
    assert changed.fprop.weight == INT4
    high = luqrun.recipe("luq", wgrad={"activation": None})
    assert high.wgrad.activation is None
    assert high.fprop.activation == INT4
    assert luqrun.recipe("luq", dgrad=None).dgrad == (None, None, None)
    alone = luqrun.recipe("fp32", fprop={"weight": {"format": "int4"}})
    assert (alone.fprop.weight, alone.dgrad.weight) == (Quantizer("int4"), None)
    assert "dgrad: high precision" in str(alone)


def test_a_schemes_phases_are_two_quantizers():
    found = luqrun.recipe("radix4_tpr")
    assert found.dgrad.gradient == Quantizer("e3m0_radix4")
    assert found.wgrad.gradient == Quantizer("e3m0_radix4", largest=8192)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"fprop": {"gradient": {"format": "int4"}}}, r"quant\.fprop\.gradient is not a key; .*activation, weight"),
        (
            {"samples": 2, "wgrad": {"gradient": {"format": "int4", "rounding": "stochastic"}}},
            r"quant\.gradient\.samples=2 does not reach wgrad.*format of its own.*quant\.wgrad\.gradient\.samples",
        ),
        ({"samples": 2, "wgrad": None}, r"quant\.gradient\.samples=2 does not reach wgrad.*high precision"),
        ({"samples": 2, "samples_scope": "both", "dgrad": {"gradient": None}}, r"does not reach dgrad"),
        ({"wgrad": {"gradient": {"formt": "int4"}}}, r"quant\.wgrad\.gradient\.formt.*format"),
        ({"wgrad": {"gradient": {"samples": 0}}}, r"quant\.wgrad\.gradient\.samples=0"),
        ({"dgrad": {"weight": {"samples": 2}}}, r"quant\.dgrad\.weight\.samples .*quant\.gradient\.samples"),
        ({"dgrad": 4}, r"quant\.dgrad=4.*null"),
        ({"gradient": None, "wgrad": {"gradient": {"samples": 2}}}, r"quant\.wgrad\.gradient\.format is missing"),
        (
            {"gradient": {"redraw_every": 2}, "wgrad": {"gradient": {"redraw_every": 3}}},
            r"quant\.gradient\.redraw_every must be the same in all GEMMs of the gradient, not \[2, 3\]",
        ),
    ],
)
def test_mistakes_in_a_gemm_are_named(overrides, named):
    with pytest.raises(UserError, match=named):
        luqrun.recipe("luq", **overrides)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"formt": "int4"}, "formt is no key.*format"),
        ({"format": "int4", "samples": True}, "samples=True must be an integer"),
        ({"format": 4}, "format=4 must be a name"),
        ({}, "format is missing.*int4"),
        ({"format": "int4", "underflow": "flush"}, "underflow=flush"),
    ],
)
def test_a_quantizer_of_keys_names_mistakes(keys, named):
    with pytest.raises(UserError, match=named):
        luqrun.quantizer(**keys)


def test_a_quantizer_of_keys():
    assert luqrun.quantizer(format="e3m0", rounding="stochastic", samples=2) == Quantizer(
        "e3m0", rounding="stochastic", samples=2
    )
    assert luqrun.quantizer(format="int4", range="hindsight", hindsight_momentum=0) == Quantizer(
        "int4", "hindsight", hindsight_momentum=0
    )


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("lucky", {}, r"lucky.*biased_log.*luq"),
        ("luq", {"gradients": None}, "gradients"),
        ("luq", {"gradient": {"formt": "e2m0"}}, "formt"),
        ("luq", {"weight": {"samples": 2}}, "samples"),
        ("luq", {"gradient": {"format": "e9m0"}}, r"quant\.gradient\.format=e9m0.*e3m0"),
        ("luq", {"weight": {"range": "minmax"}}, r"quant\.weight\.range=minmax.*sawb"),
        ("luq", {"activation": {"rounding": "up"}}, r"quant\.activation\.rounding=up.*nearest"),
        ("luq", {"gradient": {"format": "int4"}}, r"quant\.gradient\.underflow"),
        ("luq", {"samples": 0}, r"quant\.gradient\.samples=0"),
        ("luq", {"samples": "many"}, "many"),
        ("luq", {"samples": 2, "samples_scope": "dgrad"}, r"quant\.gradient\.samples_scope=dgrad"),
        ("luq", {"weight": 4}, "weight|4"),
        ("biased_log", {"samples": 2}, r"quant\.gradient\.samples=2"),
        ("fp32", {"samples": 2}, r"fp32.*format"),
        ("luq", {"gradient": None, "samples": 2}, "samples"),
        ("luq", {"skip": "first"}, "skip"),
        ("luq", {"skip": None}, "skip"),
    ],
    ids=str,
)
def test_mistakes_are_named(name, overrides, named):
    with pytest.raises(UserError, match=named):
        luqrun.recipe(name, **overrides)


def test_overrides_are_not_changed():
    gradient = {"format": "e2m0"}
    luqrun.recipe("luq", gradient=gradient, samples=2)
    assert gradient == {"format": "e2m0"}


def test_str_names_every_operand():
    text = str(luqrun.recipe("forward_only"))
    assert all(operand in text for operand in OPERANDS)
    assert "gradient=high precision" in text


def loaded_after(code):
    """Which of the heavy packages a fresh interpreter has after this code."""
    heavy = "torch, torchvision, triton, numba, tensorboard"
    script = f"{code}\nimport sys\nprint(*[name for name in {heavy.split(', ')} if name in sys.modules])"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_import_is_light():
    assert loaded_after("import luqrun") == set()


def test_quantizing_a_model_loads_only_torch_and_its_kernels():
    code = """
import luqrun
from torch import nn
model = luqrun.quantize_model(nn.Sequential(nn.Linear(2, 2)), luqrun.recipe("luq"), skip=())
"""
    assert loaded_after(code) == {"torch", "numba"}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [({"gradient": {"samples": "two"}}, "gradient.samples"), ({"weight": {"pow2_scale": "x"}}, "weight.pow2_scale")],
)
def test_a_wrong_type_is_named_with_its_key(overrides, key):
    with pytest.raises(UserError, match=key):
        luqrun.recipe("luq", **overrides)


@pytest.mark.parametrize(("gemm", "operand"), [("dgrad", "weight"), ("wgrad", "activation")])
def test_requantize_needs_what_fprop_made(gemm, operand):
    named = rf"quant\.{gemm}\.{operand}\.requantize=true takes what fprop made of the {operand}.*allowed: false$"
    with pytest.raises(UserError, match=named):
        luqrun.recipe("mxfp4_rht_sr", **{gemm: {operand: {"requantize": True}}})
