"""The gradient's options beyond LUQ: radix 4, two-phase rounding, and draws that several steps share.

The z-tests on unbiasedness are one family with a false-alarm rate of 10^-4 (Bonferroni); the seeds are fixed.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import E3M0, INT4, INT4_SR, mlp, quantize, same, train_step
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant.convert import set_step
from luqrun.quant.formats import get_format
from luqrun.quant.gemms import LinearOp
from luqrun.quant.kernels import backend_for, ops, reference
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.plan import Plan
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Recipe, Wgrad

FORM = get_format("e3m0_radix4")
NEAREST = Quantizer("e3m0_radix4")
STOCHASTIC = Quantizer("e3m0_radix4", rounding="stochastic")
HALF_WAY = Quantizer("e3m0_radix4", largest=2 * 4096)
TWO_PHASE = Recipe("two phases", dgrad=Dgrad(NEAREST), wgrad=Wgrad(HALF_WAY))
POWERS = 4.0 ** torch.arange(7)
LEVELS = torch.tensor(FORM.levels(), dtype=torch.float64)
DRAWS = 8192


def nearest_level(x, scale):
    """By search: the codes of x nearest in the linear domain, of two equally near ones the larger magnitude."""
    distance = (x.double().flatten()[:, None] / scale.double() - LEVELS).abs()
    is_nearest = distance == distance.min(1, keepdim=True).values
    return LEVELS[torch.where(is_nearest, LEVELS.abs(), -1.0).argmax(1)].view(x.shape).long()


# Codes


def test_ties_go_away_from_zero():
    ties = torch.cat([torch.tensor([0.5]), 2.5 * POWERS[:-1]])
    below = torch.nextafter(ties, torch.zeros(()))
    lower = torch.cat([torch.zeros(1), POWERS[:-1]])
    for sign in (1, -1):
        for x, expected in ((ties, POWERS), (below, lower)):
            quantized = NEAREST.quantize(sign * torch.cat([x, POWERS[-1:]]))
            assert quantized.scale == 1
            assert torch.equal(quantized.codes[:-1].float(), sign * expected)


def test_levels_are_kept_and_what_is_beyond_is_clipped():
    x = torch.cat([POWERS, -POWERS, torch.tensor([0.0, 5000.0, -1e30])])
    for quantizer in (NEAREST, STOCHASTIC):
        codes = quantizer.encode(x, torch.tensor(1.0), torch.tensor(True), make_stream(1))
        assert codes.dtype == torch.int16
        assert torch.equal(codes.float(), torch.cat([POWERS, -POWERS, torch.tensor([0.0, 4096.0, -4096.0])]))


@pytest.mark.parametrize("underflow", ["flush", "nearest", "stochastic"])
def test_underflow_is_chosen_apart(underflow):
    x = torch.tensor([0.3, -0.7, 1.2, 4096.0]).repeat(200, 1)
    codes = Quantizer("e3m0_radix4", underflow=underflow).quantize(x, seed=2).codes
    found = [sorted(set(codes[:, column].tolist())) for column in range(4)]
    below = {"flush": [[0], [0]], "nearest": [[0], [-1]], "stochastic": [[0, 1], [-1, 0]]}[underflow]
    assert found == [*below, [1], [4096]]


def test_stochastic_rounding_is_unbiased_with_the_variance_of_table_1(z_limit):
    low, high = LEVELS[:-1], LEVELS[1:]
    parts = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    x = (low + parts[:, None] * (high - low)).float()
    scale, signed = torch.tensor(0.37), torch.tensor(True)
    codes = STOCHASTIC.encode((x * scale).expand(DRAWS, *x.shape), scale, signed, make_stream(7)).double()
    at = (x * scale / scale).double()  # what the kernel sees
    assert ((codes == low) | (codes == high)).all()
    limit = z_limit(2 * at.numel())
    variance = (at - low) * (high - at)
    assert ((codes.mean(0) - at) / (variance / DRAWS).sqrt()).abs().max() < limit
    # The square of the error takes two values, whose variance is known too.
    spread = variance.sqrt() * (high + low - 2 * at).abs()
    assert (((codes - at).square().mean(0) - variance) / (spread / DRAWS**0.5)).abs().max() < limit


def test_every_device_encodes_it_with_the_reference(monkeypatch):
    x, stream = torch.randn(301), make_stream(4)

    def unwanted(*arguments, **keywords):
        raise AssertionError("a backend without radix 4 was asked for it")

    for name in ("encode", "unpack", "quantize"):
        monkeypatch.setattr(backend_for("cpu"), name, unwanted)
    for quantizer in (NEAREST, STOCHASTIC, Quantizer("e3m0_radix4", range="hindsight", rounding="stochastic")):
        encoded = quantizer.run(x, stream, torch.tensor(2.0), torch.float32)
        assert encoded.scale == (2.0 if quantizer.range == "hindsight" else x.abs().max()) / 4096
        how = encoded.scale, encoded.signed, quantizer.encoding, stream
        assert torch.equal(encoded.codes, reference.encode(x, *how, dtype=torch.float32)[0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_packing_round_trip(channels_last):
    x = torch.cat([LEVELS.float(), torch.randn(90) * 50])[:105].view(1, 5, 7, 3)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    encoded = NEAREST.run(x, make_stream(), None, torch.bfloat16, packed=True)
    assert encoded.fields.numel() == 53  # half a byte each
    back = ops.unpack(encoded.fields, x.shape, channels_last, encoded.signed, FORM.name, torch.bfloat16)
    assert torch.equal(back, encoded.codes)
    assert set(back.double().unique().tolist()) == set(LEVELS.tolist())


# Two phases


def quantize_gradient(recipe, g, dtype=torch.float32):
    """(for dgrad, for wgrad) of the first layer in step 0."""
    gemms = recipe.fprop, recipe.dgrad, recipe.wgrad
    return Plan(LinearOp(), *gemms, {"gradient": make_stream()}, {}).quantize_gradient(g, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_wgrad_gets_the_levels_half_way_between_those_of_dgrad(dtype):
    powers = 2.0 ** torch.arange(12)
    g = torch.cat([powers, -powers, torch.tensor([4096.0])]) / 64
    for_dgrad, for_wgrad = quantize_gradient(TWO_PHASE, g, dtype)
    assert (for_dgrad.scale, for_wgrad.scale) == (1 / 64, 1 / 128)
    values = [(operand.codes.float() * operand.scale)[:24].view(2, 12) for operand in (for_dgrad, for_wgrad)]
    exact = torch.stack([powers, -powers]) / 64
    assert torch.equal(values[0][:, ::2], exact[:, ::2])  # 1, 4, 16, ...
    assert torch.equal(values[1][:, 1::2], exact[:, 1::2])  # 2, 8, 32, ...
    assert not (values[0] == exact)[:, 1::2].any()
    assert not (values[1] == exact)[:, 2::2].any()


def test_both_phases_round_to_nearest():
    g = torch.randn(2000) * torch.rand(2000) ** 6
    for operand, scale in zip(
        quantize_gradient(TWO_PHASE, g), (g.abs().max() / 4096, g.abs().max() / 8192), strict=True
    ):
        assert operand.scale == scale
        assert torch.equal(operand.codes.long(), nearest_level(g, scale))
        assert len(operand.codes.unique()) <= 16


@pytest.mark.parametrize(("value", "scale"), [(0.0, 0.0), (torch.nan, torch.nan), (torch.inf, torch.nan)])
def test_phases_of_zeros_and_of_nan(value, scale):
    g = torch.tensor([value, 0.0])
    for operand in quantize_gradient(TWO_PHASE, g):
        assert not operand.codes.any()
        torch.testing.assert_close(operand.scale, torch.tensor(scale), equal_nan=True)


LAYERS = {
    "linear": (nn.Linear(40, 24, bias=False), (33, 40)),
    "linear, 3-d": (nn.Linear(12, 9, bias=False), (2, 5, 12)),
    "conv": (nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=False), (2, 4, 8, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_dgrad_and_wgrad_are_exactly_those_of_the_dequantized_tensors(name):
    plain, shape = LAYERS[name]
    x = torch.randn(shape, requires_grad=True)
    layer = quantize(copy.deepcopy(plain), luqrun.recipe("radix4_tpr"))
    output = layer(x)
    assert torch.equal(output, quantize(copy.deepcopy(plain), luqrun.recipe("luq"))(x))
    g = torch.randn_like(output) * torch.rand_like(output) ** 6
    output.backward(g)
    a, w = INT4.quantize(x), INT4.quantize(plain.weight)
    scales = g.abs().max() / 4096, g.abs().max() / 8192
    phases = [nearest_level(g, scale).double() for scale in scales]
    assert not torch.equal(*phases)

    def gradient(of, phase):
        """One of the GEMMs on the codes, in double: every sum is below 2^24, so float32 must give the same."""
        codes = [each.codes.double().requires_grad_() for each in (a, w)]
        product = (F.linear if isinstance(plain, nn.Linear) else plain._conv_forward)(*codes, None)
        (found,) = torch.autograd.grad(product, codes[of], phase)
        assert found.abs().max() < 2**24
        return found.float()

    assert torch.equal(x.grad, gradient(0, phases[0]) * (scales[0] * w.scale))
    assert torch.equal(layer.weight.grad, gradient(1, phases[1]) * (scales[1] * a.scale))


# Draws that several steps share


def with_redraw(every, weight=INT4, activation=INT4, **gradient):
    return Recipe.of(
        "reuse", weight, activation, Quantizer("e3m0", rounding="stochastic", redraw_every=every, **gradient)
    )


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("every", [2, 3])
def test_draws_of_a_step_are_those_of_the_step_that_they_began_in(every, samples):
    x = torch.randn(5, 8)
    fresh, shared = mlp(with_redraw(1, samples=samples)), mlp(with_redraw(every, samples=samples))
    for step in (0, 1, 2, 3, 6, 7, 8):
        set_step(fresh, step // every)
        set_step(shared, step)
        assert same(train_step(shared, x), train_step(fresh, x))


@pytest.mark.parametrize("every", [2, 3])
def test_in_a_loop_that_sets_the_step_draws_change_every_nth_step_and_micro_step(every):
    x, model = torch.randn(5, 8), mlp(with_redraw(every))
    seen = {}
    for step in range(2 * every):
        set_step(model, step)
        for micro_step in range(2 * every):
            seen.setdefault((step // every, micro_step // every), []).append(train_step(model, x))
    for grads in seen.values():
        assert all(same(grads[0], other) for other in grads)
    firsts = [grads[0] for grads in seen.values()]
    assert len(firsts) == 4
    assert not any(torch.equal(a[0], b[0]) for i, a in enumerate(firsts) for b in firsts[:i])


def test_in_a_plain_loop_draws_change_every_nth_forward():
    x, model = torch.randn(5, 8), mlp(luqrun.recipe("luq_reuse"))
    grads = [train_step(model, x)[0] for _ in range(12)]
    equal = [torch.equal(grads[i], grads[i + 1]) for i in range(11)]
    assert equal == [True, True, True, False] * 2 + [True] * 3
    assert not torch.equal(grads[0], grads[8])


def test_other_operands_draw_anew_in_each_step():
    x = torch.randn(5, 8)
    models = [mlp(with_redraw(every, INT4_SR, INT4_SR)) for every in (1, 4)]
    outputs = [[model(x) for _ in range(4)] for model in models]
    assert same(*outputs)
    assert not torch.equal(outputs[1][0], outputs[1][1])
    assert torch.equal(*(model.eval()(x) for model in models))


# Settings


@pytest.mark.parametrize(
    ("gradient", "named"),
    [
        ({"largest": 65}, r"quant\.gradient\.largest=65 is beyond the largest code, 64: .*without draws"),
        ({"format": "e3m0_radix4", "largest": 0}, r"quant\.gradient\.largest=0 .*1 to 16384"),
        ({"format": "int4", "underflow": None, "largest": 7}, r"quant\.gradient\.largest=7 is for logarithmic formats"),
        ({"redraw_every": 0}, r"quant\.gradient\.redraw_every=0 is too small"),
        ({"redraw_every": 2, "rounding": "nearest", "underflow": "flush"}, r"quant\.gradient\.redraw_every=2 needs"),
        ({"format": "e3m0_radix8"}, r"quant\.gradient\.format=e3m0_radix8.*e3m0_radix4"),
        ({"format": "e3m0_radix4", "range": "sawb"}, r"quant\.gradient\.range=sawb.*e3m0_radix4"),
    ],
    ids=str,
)
def test_wrong_settings_name_their_key(gradient, named):
    with pytest.raises(UserError, match=named):
        luqrun.recipe("luq", gradient=gradient)


def test_weights_have_neither_key():
    for key in ("samples", "redraw_every"):
        with pytest.raises(UserError, match=key):
            luqrun.recipe("luq", weight={key: 1})


def test_str_tells_them():
    assert str(luqrun.recipe("radix4_tpr").gradient) == "e3m0_radix4/absmax/nearest"
    assert str(luqrun.recipe("radix4_tpr").wgrad.gradient) == "e3m0_radix4/absmax/nearest/largest=8192"
    assert str(luqrun.recipe("luq_reuse").gradient) == "e3m0/absmax/stochastic/redraw_every=4"
    assert str(E3M0) == "e3m0/absmax/stochastic"
