"""Settings of quantizers and recipes with blocks: what follows from what, what is refused in a line, what is told."""

from itertools import product

import pytest
import torch
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant.encoding import Encoding
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.scale_formats import SCALE_ROUNDINGS

UNBIASED = 6 * 16 / 17


# What is refused

E4M3 = {"scale_format": "e4m3"}
REFUSED = [  # keys beside format=e2m1 and block=32, the key that is named with its value, and what is allowed
    ({"block": 0}, "block=0", "positive integer"),
    ({"block": -32}, "block=-32", "positive integer"),
    ({"block": 2.5}, "block=2.5", "integer"),
    ({"block": "32"}, "block='32'", "integer"),
    ({"block": True}, "block=True", "integer"),
    ({"block": []}, "block=[]", "such as 32 or [16, 16]"),
    ({"block": [16, 0]}, "block=[16, 0]", "such as 32 or [16, 16]"),
    ({"block": [16, 16, 16]}, "block=[16, 16, 16]", "such as 32 or [16, 16]"),
    ({"block": [16, True]}, "block=[16, True]", "such as 32 or [16, 16]"),
    ({"block": ["16", 16]}, "block=['16', 16]", "such as 32 or [16, 16]"),
    ({"format": "int4", "block": [16, 16], "range": "sawb"}, "range=sawb", "absmax, rms"),
    ({"block": [16, 16], "range": "hindsight"}, "range=hindsight", "absmax, rms"),
    ({"range": "hindsight"}, "range=hindsight", "absmax, rms"),
    ({"range": "signed_max"}, "range=signed_max", "absmax, rms"),
    ({"range": "sawb"}, "range=sawb", "int2, int3, int4, int5, int8"),
    ({"block": None, "range": "sawb"}, "range=sawb", "int2, int3, int4, int5, int8"),
    ({"block": None, "range": "rms"}, "range=rms", "block=32"),
    ({"block": None, "scale_format": "e8m0"}, "scale_format=e8m0", "block=32"),
    ({"block": None, "scale_rounding": "floor"}, "scale_rounding=floor", "block=32"),
    ({"block": None, "four_over_six": "mse"}, "four_over_six=mse", "block=32"),
    ({"block": None, "eden": True}, "eden=True", "block=32"),
    ({"block": None, "headroom": 0.75}, "headroom=0.75", "block=32"),
    ({"scale_format": "e5m3"}, "scale_format=e5m3", "e8m0, e4m3, fp32"),
    ({"scale_rounding": "up"}, "scale_rounding=up", "floor, rceil, ceil, even, down"),
    ({**E4M3, "scale_rounding": "floor"}, "scale_rounding=floor", "scale_format=e8m0"),
    ({"scale_format": "fp32", "scale_rounding": "rceil"}, "scale_rounding=rceil", "scale_format=e8m0"),
    ({"four_over_six": "mse"}, "four_over_six", "scale_format=e4m3"),
    ({**E4M3, "format": "int4", "four_over_six": "mse"}, "four_over_six", "format such as e2m1"),
    ({**E4M3, "four_over_six": "max"}, "four_over_six=max", "mse, mae"),
    ({"eden": True}, "eden", "scale_format=e4m3"),
    ({**E4M3, "eden": True, "rounding": "stochastic"}, "eden", "rounding=nearest"),
    ({**E4M3, "eden": True, "four_over_six": "mse"}, "eden", "without four_over_six"),
    ({"headroom": 0}, "headroom=0", "0 < headroom <= 1"),
    ({"headroom": 1.5}, "headroom=1.5", "0 < headroom <= 1"),
    ({"headroom": float("nan")}, "headroom=nan", "0 < headroom <= 1"),
    ({"largest": 2.9}, "largest=2.9", "3 to 12"),
    ({"largest": 12.5}, "largest=12.5", "3 to 12"),
    ({"largest": float("nan")}, "largest=nan", "3 to 12"),
    ({"largest": 6.1, "rounding": "stochastic"}, "largest=6.1", "without draws"),
    ({"format": "int4", "largest": 7}, "largest=7", "set it to null"),
    ({"pow2_scale": True}, "pow2_scale", "scale_format=e8m0"),
    ({"format": "e3m0_radix4"}, "format=e3m0_radix4", "e2m1, int4, e3m0"),
    ({"format": "e3m0_xi"}, "format=e3m0_xi", "e2m1, int4, e3m0"),
    ({"rounding": "stochastic_log"}, "rounding=stochastic_log", "e3m0_xi"),
    ({"underflow": "flush"}, "underflow=flush", "logarithmic formats"),
    ({"samples": 2}, "samples=2", "nothing is drawn"),
    ({"redraw_every": 2}, "redraw_every=2", "nothing is drawn"),
    ({"four_over_sixes": "mse"}, "four_over_sixes", "four_over_six"),
    ({"format": "e4m3"}, "format=e4m3", "e2m1"),
]


@pytest.mark.parametrize(("keys", "named", "allowed"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_a_mistake_is_one_line_that_names_the_key_and_what_is_allowed(keys, named, allowed):
    with pytest.raises(UserError) as refusal:
        luqrun.quantizer(**{"format": "e2m1", "block": 32, **keys})
    text = str(refusal.value)
    assert named in text
    assert allowed in text
    assert "\n" not in text
    # The same in a recipe, below the operand's name. (What is null there is left out.)
    if None not in keys.values() and not {"samples", "redraw_every", "four_over_sixes"} & keys.keys():
        with pytest.raises(UserError, match=r"quant\.weight\.") as refusal:
            luqrun.recipe("fp32", weight={"format": "e2m1", "block": 32, **keys})
        assert allowed in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("mxfp4", {"weight": {"requantize": True}}, r"quant\.weight\.requantize.*quant\.dgrad\.weight"),
        ("mxfp4", {"fprop": {"weight": {"requantize": True}}}, r"quant\.fprop\.weight\.requantize.*wgrad\.activation"),
        ("mxfp4", {"wgrad": {"gradient": {"requantize": True}}}, r"quant\.wgrad\.gradient\.requantize is not allowed"),
        ("mxfp4", {"dgrad": {"weight": {"requantize": 1}}}, r"requantize=1 must be true or false"),
        ("mxfp4", {"dgrad": {"weight": {"block": 0}}}, r"quant\.dgrad\.weight\.block=0"),
        ("mxfp4", {"samples": 2}, r"quant\.gradient\.samples=2 needs"),
        ("luq", {"gradient": {"block": 32}}, None),
        ("luq", {"weight": {"block": 32}}, r"quant\.weight\.range=sawb is of a whole tensor"),
        ("luq_hindsight", {"gradient": {"block": 32}}, r"quant\.gradient\.range=hindsight is of a whole tensor"),
        (
            "nvfp4",
            {"gradient": {"scale_rounding": "floor"}},
            r"quant\.gradient\.scale_rounding=floor.*e4m3, set it",
        ),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_names_operand_and_gemm(name, overrides, named):
    if named is None:
        assert luqrun.recipe(name, **overrides).gradient.block == 32
        return
    with pytest.raises(UserError, match=named) as refusal:
        luqrun.recipe(name, **overrides)
    assert "\n" not in str(refusal.value)


def test_a_mistake_in_quantize_is_named():
    for axis in (2, -3):
        with pytest.raises(UserError, match=f"^axis={axis} is out of range for a tensor of 2 dimension"):
            Quantizer("e2m1", block=32).quantize(torch.zeros(2, 3), axis=axis)
    with pytest.raises(UserError, match="axis=-1 is out of range for a tensor of 0"):
        Quantizer("e2m1", block=32).quantize(torch.zeros(()))
    with pytest.raises(UserError, match=r"^block=\[4, 4\] is a tile of two axes, and the tensor has 1"):
        Quantizer("e2m1", block=[4, 4]).quantize(torch.zeros(3))
    with pytest.raises(UserError, match=r"floating tensors, not torch\.int64"):
        Quantizer("e2m1", block=32).quantize(torch.arange(3))
    with pytest.raises(UserError, match="one scale has no scales to pack"):
        Quantizer("int4").quantize(torch.zeros(3)).packed_scales()


# What follows


def test_defaults():
    blocks = Quantizer("e2m1", block=32)
    assert (blocks.scale_format, blocks.scale_rounding, blocks.headroom) == ("e8m0", "rceil", 1.0)
    assert Quantizer("e2m1", block=16, scale_format="e4m3").scale_rounding is None
    assert Quantizer("e2m1", block=[16, 4]) == Quantizer("e2m1", block=(16, 4))
    assert Quantizer("e2m1", block=[16, 4]).encoding.tile == (16, 4)
    assert Quantizer("e2m1", block=16).encoding.tile is None
    assert Quantizer("e2m1").block is None
    assert Quantizer("e2m1").scale_format is None


def test_encodings_are_equal_where_their_numbers_are_and_come_back_from_their_key():
    alike = Encoding("e2m1", block=32, largest=6, headroom=1), Encoding("e2m1", block=32, largest=6.0, headroom=1.0)
    assert alike[0] == alike[1]
    assert len(set(alike)) == 1
    for how in (
        alike[0],
        Encoding("e2m1", block=(16, 16), scale_format="e4m3", four_over_six="mae"),
        Encoding("e3m0_radix4", largest=8192),
        Encoding("int4", range="sawb"),
    ):
        assert Encoding.of(how.key) is Encoding.of(how.key)
        assert Encoding.of(how.key) == how
        assert how != Encoding("int8")
        assert how != how.key


def test_what_repeats_and_what_lies_alike():
    nearest, drawn = Quantizer("e2m1", block=32), Quantizer("e2m1", block=32, rounding="stochastic")
    eden = Quantizer("e2m1", block=32, scale_format="e4m3", eden=True)
    assert [each.repeats for each in (nearest, drawn, eden)] == [True, False, False]
    assert eden.is_stochastic
    assert Quantizer("e2m1", block=32, scale_format="e4m3", eden=True, samples=2).samples == 2
    assert not nearest.lies_alike
    assert Quantizer("e2m1", block=[1, 32]).lies_alike
    assert Quantizer("e2m1").lies_alike


def test_what_is_shown():
    tile = Quantizer("e2m1", block=[16, 8], scale_format="e4m3", largest=UNBIASED, four_over_six="mse")
    assert str(tile) == "e2m1/absmax/nearest/block=[16, 8]/e4m3/largest=5.64706/four_over_six=mse"
    shown = str(luqrun.recipe("mxfp4_rht_sr").gradient)
    assert shown == "e2m1/absmax/stochastic/block=32/e8m0/floor/headroom=0.75"
    assert str(luqrun.recipe("quartet2").wgrad.activation).endswith("block=16/e4m3/largest=6.07211/eden/requantize")
    layer = luqrun.quantize_model(nn.Linear(4, 3), luqrun.recipe("mxfp4"), skip=())
    assert "weight=e2m1/absmax/nearest/block=32/e8m0/floor" in repr(layer)
    quantized = Quantizer("e2m1", block=2).quantize(torch.zeros(3, 5))
    assert repr(quantized) == "QuantizedTensor(e2m1, shape=(3, 5), (3, 3) scales)"


# What is told at the start


@pytest.mark.parametrize("rule", SCALE_ROUNDINGS)
@pytest.mark.parametrize("form", ["e2m1", "int4", "e1m2", "e3m0"])
def test_rules_that_clip_are_called_biased_and_others_are_not(form, rule):
    # A maximum anywhere between two powers of two, and its block's own scale.
    x = torch.zeros(400, 2)
    x[:, 0] = 2.0 ** torch.linspace(0, 1, 400)
    for headroom, largest in product((1.0, 0.75, 0.6), (None, 0.94, 0.7)):
        form_of = luqrun.quantizer(format=form).form
        largest = None if largest is None or form == "int4" else largest * form_of.limit * form_of.unit
        largest = largest if largest is None or form != "e3m0" else round(largest)
        keys = {"block": 2, "scale_rounding": rule, "headroom": headroom, "largest": largest}
        quantizer = luqrun.quantizer(format=form, rounding="stochastic", **keys)
        found = quantizer.quantize(x)
        most = found.most(x.shape)
        clips = bool((x > most * (1 + 1e-6)).any())
        assert bool(quantizer.encoding.biases) == clips, keys
        assert not luqrun.quantizer(format=form, **keys).encoding.biases  # nothing is drawn


@pytest.mark.parametrize(
    ("keys", "biased"),
    [
        (E4M3, True),
        ({**E4M3, "largest": UNBIASED}, False),
        ({**E4M3, "headroom": 16 / 17}, False),
        ({**E4M3, "largest": UNBIASED, "four_over_six": "mse"}, True),
        ({**E4M3, "range": "rms", "largest": UNBIASED}, True),
        ({"scale_rounding": "rceil"}, False),
        ({"scale_rounding": "rceil", "range": "rms"}, True),
        ({"scale_format": "fp32"}, False),
    ],
    ids=str,
)
def test_which_stochastic_blocks_are_called_biased(keys, biased):
    assert bool(Quantizer("e2m1", block=16, rounding="stochastic", **keys).encoding.biases) == biased


def test_the_caveats_of_recipes():
    clean = ("luq", "mxfp4", "mxfp4_rht_sr", "tetrajet", "quartet", "quartet_sr", "nvfp4", "nvfp4_46", "quartet2")
    assert not any(luqrun.recipe(name).caveats for name in clean)
    for change in ({"hadamard": None, "signs": None}, {"signs": "none"}, {"signs": "fixed"}):
        told = "eden is biased in dgrad without a rotation by drawn signs"
        assert luqrun.recipe("quartet2", dgrad=change).caveats == [f"gradient: {told}", f"weight: {told}"]
    assert [text.partition(":")[0] for text in luqrun.recipe("nvfp4_nvidia").caveats] == ["gradient"]
    assert [text.partition(":")[0] for text in luqrun.recipe("fp4_all_the_way").caveats] == ["activation", "gradient"]
    for name, bias in (("luq_xi", "shrinks by about a tenth"), ("luq_supplement", "clips negative elements")):
        wide, biased = luqrun.recipe(name).caveats
        assert "takes 5 bits" in wide
        assert bias in biased
    for error in ("mse", "mae"):  # allowed, and told
        chosen = luqrun.recipe("nvfp4_46", gradient={"four_over_six": error})
        assert chosen.caveats == ["gradient: four_over_six chooses a scale by the data"]
