"""Quantizers: nearest against brute force, ranges against their formulas, edges."""

from itertools import product

import pytest
import torch

from luqrun.errors import UserError
from luqrun.quant.formats import FORMATS, SAWB, get_format, unpack
from luqrun.quant.health import health
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import QuantizedTensor, Quantizer, update_hindsight

LUQ = Quantizer("e3m0", rounding="stochastic")


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_the_nearest_level(name):
    form = get_format(name)
    for signed in (True, False) if not form.logarithmic else (True,):
        levels = torch.tensor(form.levels(signed), dtype=torch.float64)
        low, high = levels[0], levels[-1]
        middles = (levels[1:] + levels[:-1]) / 2
        values = torch.cat([torch.linspace(low, high, 4001, dtype=torch.float64), levels, middles, middles / 1.0001])
        values = values.float().double()
        # A scale of 1/8 exactly: ties stay ties.
        quantized = Quantizer(name).quantize((values / 8).float())
        assert quantized.scale == 0.125
        distance = (values[:, None] - levels).abs()
        is_nearest = distance == distance.min(1, keepdim=True).values
        # Of two equally near: the even one of integers, the even field (mantissa) of floating-point numbers, the one
        # farther from zero of powers of two.
        preference = levels.abs() if form.logarithmic else (form.to_fields(levels) % 2 == 0).double()
        expected = levels[torch.where(is_nearest, preference, -1.0).argmax(1)]
        assert torch.equal(quantized.codes.double(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_holds_at_most_2_to_the_bits_codes_and_packs_into_them(name):
    form = get_format(name)
    x = torch.tensor(form.levels(), dtype=torch.float32).repeat(40, 1) * torch.linspace(0.5, 1, 40)[:, None]
    for source, rounding, pow2 in product((x, x.abs(), -x.abs()), ("nearest", "stochastic"), (False, True)):
        quantized = Quantizer(name, rounding=rounding, pow2_scale=pow2).quantize(source, seed=1)
        distinct = quantized.codes.unique().tolist()
        assert len(distinct) <= 2**form.bits
        assert set(distinct) <= set(form.levels(bool(quantized.signed)))
        packed = quantized.packed()
        assert packed.numel() == -(-source.numel() * form.bits // 8)
        codes = form.from_fields(unpack(packed, form.bits, source.numel()), quantized.signed)
        assert torch.equal(codes.view_as(quantized.codes), quantized.codes)
    assert len(Quantizer(name).quantize(x).codes.unique()) == len(form.levels())


def test_packing_is_row_major_whatever_the_memory_format():
    x = torch.randn(2, 3, 5, 5)
    twin = Quantizer("int4").quantize(x.to(memory_format=torch.channels_last))
    assert torch.equal(twin.packed(), Quantizer("int4").quantize(x).packed())


def test_signedness_follows_the_tensor():
    x = torch.tensor([0.0, 7.5, 15.0])
    quantized = Quantizer("int4").quantize(x)
    assert not quantized.signed
    assert quantized.codes.tolist() == [0, 8, 15]
    assert quantized.scale == 1
    quantized = Quantizer("int4").quantize(torch.cat([x, torch.tensor([-1e-3])]))
    assert quantized.signed
    assert quantized.scale == torch.tensor(15 / 7)
    assert Quantizer("e3m0").quantize(x).signed


@pytest.mark.parametrize("bits", SAWB)
def test_sawb_scale_follows_its_formula(bits):
    c1, c2 = SAWB[bits]
    form = get_format(f"int{bits}")
    for x, limit in ((torch.randn(5000), form.limit), (torch.randn(5000).abs(), form.unsigned_limit)):
        wide = x.double()
        clip = c1 * wide.square().mean().sqrt() - c2 * wide.abs().mean()
        assert clip > 0
        clip = min(clip, wide.abs().max())
        scale = Quantizer(f"int{bits}", range="sawb").quantize(x).scale
        torch.testing.assert_close(scale.double(), clip / limit, rtol=1e-6, atol=0)


def test_sawb_coefficients_are_those_of_the_design():
    assert SAWB[4] == (12.1, 12.2)
    assert SAWB[2] == (3.12, 2.064)
    assert SAWB[3] == (7.509, 6.892)
    assert SAWB[5] == (17.74, 18.64)
    assert SAWB[8] == (31.76, 35.04)


def test_sawb_clips_what_is_beyond():
    x = torch.randn(5000)
    quantized = Quantizer("int4", range="sawb").quantize(x)
    assert quantized.codes.abs().max() == 7
    assert (x.abs() > 7.6 * quantized.scale).any()


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor([0.3, -0.3] * 8), id="constant magnitude: the formula is negative"),
        pytest.param(torch.eye(10), id="a spike: the formula is above the maximum"),
    ],
)
def test_sawb_falls_back_to_the_maximum(x):
    quantized = Quantizer("int4", range="sawb").quantize(x)
    torch.testing.assert_close(quantized.dequantize(), x)
    assert quantized.codes.abs().max() == (7 if quantized.signed else 15)


def test_hindsight_uses_the_estimate_and_clips_above_it():
    quantizer = Quantizer("e3m0", range="hindsight", rounding="stochastic")
    x = torch.tensor([64.0, 1.0, -200.0, 0.0])
    scale, signed, maximum = quantizer.measure(x, torch.tensor(128.0))
    assert (scale, maximum) == (2.0, 200.0)
    codes = quantizer.encode(x, scale, signed, make_stream(0))
    assert codes[[0, 2, 3]].tolist() == [32, -64, 0]
    assert quantizer.measure(x, torch.tensor(0.0))[0] == 200.0 / 64  # none yet
    assert quantizer.measure(x)[0] == 200.0 / 64
    assert quantizer.measure(torch.tensor([torch.nan]), torch.tensor(1.0))[0].isnan()


def test_hindsight_follows_eq_18():
    hindsight, eta = torch.zeros(()), 0.25
    update_hindsight(hindsight, torch.tensor(8.0), eta)
    assert hindsight == 8
    update_hindsight(hindsight, torch.tensor(4.0), eta)
    assert hindsight == 0.75 * 4 + 0.25 * 8
    for broken in (torch.nan, torch.inf):
        update_hindsight(hindsight, torch.tensor(broken), eta)
        assert hindsight == 5


@pytest.mark.parametrize("name", ["e3m0", "int4"])
def test_pow2_scale_is_rounded_up_to_a_power_of_two(name):
    for factor in (1.0, 1.0001, 1.9999, 3.7e-9, 2.5e30):
        x = torch.tensor([-0.3, 0.5, 1.0]) * factor
        plain = Quantizer(name).quantize(x).scale
        scale = Quantizer(name, pow2_scale=True).quantize(x).scale
        assert torch.frexp(scale).mantissa == 0.5
        assert plain <= scale < 2 * plain
    assert Quantizer(name, pow2_scale=True).quantize(torch.zeros(3)).scale == 0


EDGE_QUANTIZERS = [
    Quantizer("int4", range="sawb"),
    Quantizer("int4", rounding="stochastic"),
    Quantizer("int5", rounding="stochastic"),
    Quantizer("e3m0", rounding="nearest", underflow="flush"),
    LUQ,
    Quantizer("e4m0", rounding="stochastic"),
    Quantizer("e3m0", rounding="stochastic", pow2_scale=True),
    Quantizer("int4", pow2_scale=True),
]
at_the_edges = pytest.mark.parametrize("quantizer", EDGE_QUANTIZERS, ids=str)


def assert_within_a_bin(quantized, x):
    """Each value is finite, of x's sign, and no farther from x than the width of the widest bin around it."""
    values, x = quantized.dequantize(torch.float64), x.double()
    assert values.isfinite().all()
    assert (values * x >= 0).all()
    width = x.abs().clamp(min=quantized.scale) if quantized.form.logarithmic else quantized.scale.double()
    assert ((values - x).abs() <= width * (1 + 1e-6)).all()


@at_the_edges
def test_zeros_give_zero_codes_and_scale_zero(quantizer):
    for x in (torch.zeros(5, 3), -torch.zeros(2), torch.zeros(()), torch.zeros(0), torch.zeros(2, 0, 3)):
        quantized = quantizer.quantize(x)
        assert quantized.codes.shape == x.shape
        assert not quantized.codes.any()
        assert quantized.scale == 0
        assert not quantized.dequantize().any()
        assert quantized.packed().numel() == -(-x.numel() * quantizer.form.bits // 8)


@at_the_edges
def test_extreme_tensors_stay_within_a_bin(quantizer):
    unit = torch.tensor([1.0, -0.9, 0.6, -0.31, 0.02, 0.0])
    clips = quantizer.range == "sawb"
    for x in (
        -unit.abs(),
        torch.tensor([-2.5]),
        torch.tensor(0.7),
        unit * 1e-36,
        unit * 1e-40,
        unit * 2.0**-149,
        unit * 2.0**-147,
        unit * 3e38,
        unit * torch.finfo(torch.float32).max,
    ):
        quantized = quantizer.quantize(x, seed=5)
        assert quantized.codes.shape == x.shape
        assert quantized.scale.dtype == torch.float32
        assert quantized.scale.shape == ()
        assert 0 < quantized.scale < torch.inf
        assert_within_a_bin(quantized, x.clamp(-quantized.scale * 7, quantized.scale * 15) if clips else x)


@at_the_edges
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_taken_as_float32(quantizer, dtype):
    x = torch.randn(50).to(dtype)
    quantized, twin = quantizer.quantize(x), quantizer.quantize(x.float())
    assert torch.equal(quantized.codes, twin.codes)
    assert torch.equal(quantized.scale, twin.scale)
    assert quantized.dequantize(dtype).dtype == dtype


@at_the_edges
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_nan_and_inf_make_every_value_nan(quantizer, bad):
    x = torch.tensor([1.0, bad, -0.5, 0.0], dtype=torch.float64 if bad == 1e300 else torch.float32)
    quantized = quantizer.quantize(x)
    assert quantized.scale.isnan()
    assert quantized.dequantize().isnan().all()


@pytest.mark.parametrize("quantizer", [LUQ, Quantizer("int4", rounding="stochastic")], ids=str)
def test_draws_are_a_function_of_seed_and_sample(quantizer):
    x = torch.randn(400)

    def codes(**draw):
        return quantizer.quantize(x, **draw).codes

    state = torch.get_rng_state()
    assert torch.equal(codes(seed=5), codes(seed=5))
    assert torch.equal(codes(seed=0), codes())
    assert torch.equal(torch.get_rng_state(), state)
    distinct = [codes(seed=0), codes(seed=1), codes(seed=-1), codes(seed=2**40), codes(seed=0, sample=1)]
    distinct.append(Quantizer(quantizer.format).quantize(x).codes)  # seed 0 draws too, it is not nearest
    for index, one in enumerate(distinct):
        assert not any(torch.equal(one, other) for other in distinct[index + 1 :])


def test_nearest_does_not_depend_on_the_seed():
    x = torch.randn(400)
    assert torch.equal(Quantizer("int4").quantize(x, seed=1).codes, Quantizer("int4").quantize(x, seed=2).codes)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"format": "int9"}, r"format=int9.*int4.*e3m0"),
        ({"format": "int4", "range": "minmax"}, r"range=minmax.*absmax, sawb, hindsight"),
        ({"format": "int4", "rounding": "floor"}, r"rounding=floor.*nearest, stochastic"),
        ({"format": "e3m0", "underflow": "zero"}, r"underflow=zero.*flush, nearest, stochastic"),
        ({"format": "int4", "underflow": "flush"}, r"underflow=flush.*int4"),
        (
            {"format": "e3m0_xi", "rounding": "stochastic_log", "underflow": "flush"},
            r"underflow=flush.*stochastic_log; allowed: stochastic",
        ),
        ({"format": "e3m0", "range": "sawb"}, r"range=sawb.*e3m0.*int4"),
        ({"format": "int6", "range": "sawb"}, r"range=sawb.*int6.*int4"),
        ({"format": "e3m0", "rounding": "stochastic", "samples": 0}, r"samples=0.*at least 1"),
        ({"format": "e3m0", "rounding": "stochastic", "samples": 1000}, r"samples=1000.*64"),
        ({"format": "e3m0", "samples": 2}, r"samples=2.*stochastic"),
        ({"format": "e3m0", "redraw_every": 2}, r"redraw_every=2.*nothing is drawn"),
        ({"format": "e3m0", "hindsight_momentum": 1.0}, r"hindsight_momentum=1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_settings_name_their_key(settings, named):
    with pytest.raises(UserError, match=named):
        Quantizer(**settings)


def test_quantize_refuses_integers():
    with pytest.raises(UserError, match="int64"):
        Quantizer("int4").quantize(torch.arange(3))


def test_str_tells_what_differs_from_the_defaults():
    assert str(Quantizer("int4", range="sawb")) == "int4/sawb/nearest"
    text = str(Quantizer("e3m0", rounding="stochastic", underflow="flush", samples=2, pow2_scale=True))
    assert all(part in text for part in ("e3m0", "stochastic", "flush", "samples=2", "pow2_scale"))


def test_health_counts_clipped_underflow_and_error():
    x = torch.tensor([0.0, 0.2, -0.3, 1.0, 2.0, 200.0, -64.0, 64.0])
    codes = torch.tensor([0, 0, 0, 1, 2, 64, -64, 64], dtype=torch.int8)
    quantized = QuantizedTensor(codes, torch.tensor(1.0), torch.tensor(True), get_format("e3m0"))
    clipped, underflow, error = health(x, quantized).tolist()
    assert clipped == 1 / 8
    assert underflow == pytest.approx(2 / 7)
    assert error == pytest.approx(((quantized.dequantize() - x).norm() / x.norm()).item())
    assert health(torch.zeros(4), LUQ.quantize(torch.zeros(4))).tolist() == [0, 0, 0]
