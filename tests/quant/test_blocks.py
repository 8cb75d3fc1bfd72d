"""luqrun's quantizers with blocks against the rules written down in NumPy (block_rules.py), bit for bit."""

import hashlib

import block_rules as rules
import numpy as np
import pytest
import torch
from block_inputs import (
    E4M3,
    E8M0,
    EMPTY,
    FORMATS,
    FP32,
    PUBLISHED,
    SCALES,
    STOCHASTIC_FOUR_OVER_SIX,
    TILE,
    TINY,
    matrices,
    normal,
    strided,
)

import luqrun

MATRICES = matrices()
IMAGES = strided()
pytestmark = pytest.mark.usefixtures("backend")
every_scale = pytest.mark.parametrize("name", list(SCALES))


def roundings(keys):
    return ("nearest",) if keys.get("eden") else ("nearest", "stochastic")


_expected = {}  # of one backend for the next


def expected(x, **keys):
    """What the rules give for x, taken as float32."""
    values = np.ascontiguousarray(x.float().numpy())
    key = hashlib.sha256(values.tobytes()).digest(), values.shape, repr(keys)
    if key not in _expected:
        _expected[key] = rules.quantize(values, **keys)
    return _expected[key]


def quantized(x, axis=-1, seed=0, sample=0, **keys):
    return luqrun.quantizer(format=keys.pop("format", "e2m1"), **keys).quantize(x, seed=seed, axis=axis, sample=sample)


def assert_same(found: torch.Tensor, expected, what):
    """The same dtype, shape and numbers; NaN equals NaN."""
    expected = torch.from_numpy(np.asarray(expected))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(found.isnan(), expected.isnan()), what
    different = (found != expected) & ~found.isnan()
    assert not different.any(), (what, f"{different.sum()} differ", found[different][:5], expected[different][:5])


def check(what, x, **keys):
    """All that quantize returns."""
    found, same = quantized(x, **keys), expected(x, **keys)
    assert_same(found.codes, same.codes, (what, "codes"))
    assert_same(found.tensor_scale, same.tensor_scale, (what, "tensor_scale"))
    assert_same(found.scale, same.scale, (what, "scale"))
    assert_same(found.dequantize(), same.values, (what, "values"))
    form = keys.get("format", "e2m1")
    if form != "e2m2":
        assert_same(found.packed(), rules.nibbles(same.codes, form), (what, "packed"))
    if same.scale_bytes is not None:
        assert_same(found.packed_scales(), same.scale_bytes.reshape(-1), (what, "packed scales"))


# Every rule


@every_scale
def test_every_scale_on_every_kind_of_matrix(name):
    keys = SCALES[name]
    for kind, x in MATRICES.items():
        if kind in TINY and keys["scale_format"] == "fp32":
            continue  # a float32 scale would be subnormal
        if kind == "huge" and keys.get("range") == "rms":
            x = x / 8  # the clip would leave float32
        for rounding in roundings(keys):
            check((kind, rounding), x, rounding=rounding, seed=3, **keys)


@every_scale
def test_every_scale_along_every_axis(name):
    rounding = roundings(SCALES[name])[-1]  # draws show which element is which
    for x, axis in IMAGES:
        check((x.shape, axis), x, axis=axis, rounding=rounding, **SCALES[name])


@every_scale
def test_every_scale_of_tiles(name):
    keys = {**SCALES[name], **TILE}
    for rounding in roundings(keys):
        for kind in ("rows apart", "blocks of zeros", "ties", "one column"):
            check((kind, rounding), MATRICES[kind], rounding=rounding, **keys)
    for x in (IMAGES[2][0], IMAGES[7][0], IMAGES[-1][0]):
        check((x.shape, x.stride()), x, rounding=rounding, **keys)
    check("oblong", normal(2, 9, 40), rounding=rounding, **{**keys, "block": [4, 17]})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["rceil", "floor", "even", "quest", "e8m0 headroom", "fp32", "e4m3"])
def test_scales_of_other_formats(name, form):
    if name == "even" and form == "int4":
        pytest.skip("an integer has no mantissa to round to")
    for rounding in ("nearest", "stochastic"):
        for kind in ("normal", "wide", "ties", "small integers", "maxima"):
            check((kind, rounding), MATRICES[kind], format=form, rounding=rounding, **SCALES[name])


@every_scale
def test_blocks_of_other_sizes(name):
    for block in (1, 3, 64, 70, 1000):
        rounding = roundings(SCALES[name])[-1]
        check(block, MATRICES["rows apart"], rounding=rounding, **{**SCALES[name], "block": block})


@pytest.mark.parametrize("keys", [E8M0, E4M3, SCALES["four over six, mse"], SCALES["eden"]], ids=str)
def test_draws_are_those_of_seed_and_sample(keys):
    x = normal(9, 70)
    rounding = roundings(keys)[-1]
    for seed, sample in ((0, 0), (1, 0), (2**40 + 5, 0), (0, 3), (7, 63)):
        check((seed, sample), x, rounding=rounding, seed=seed, sample=sample, **keys)


@pytest.mark.parametrize("keys", [E8M0, E4M3, FP32], ids=["e8m0", "e4m3", "fp32"])
def test_draws_compare_31_bits_and_cut_the_fraction_off(keys):
    # Elements whose words are small, so that float32 holds the 31 bits next to which a draw turns.
    words = rules.words_of(0, 0, 64 * 512).reshape(-1, 64)
    x = torch.zeros(words.shape)
    x[:, 0], x[:, 32], x[0, 0] = 6, 6, 6 * 448  # each block has a scale of 1, for e4m3 but the first
    x[:, 16] = x[:, 48] = 6
    row, column = np.nonzero((words < 2**23) & (np.arange(64) % 16 > 0) & (np.arange(512) > 0)[:, None])
    assert len(row) > 40
    turn = torch.from_numpy(words[row, column] >> 1).double()
    for beyond, code in ((0, 0), (0.5, 0), (1, 1)):
        x[row, column] = ((turn + beyond) * 2.0**-31 * 0.5).float()
        found = quantized(x, rounding="stochastic", **keys)
        assert (found.codes[row, column] == code).all(), beyond
        assert found.codes[1, 0] == 12


# Edges


@every_scale
def test_empty_tensors(name):
    for shape, axis in EMPTY:
        check(shape, torch.zeros(shape), axis=axis, **SCALES[name])
        if len(shape) > 1:
            check(shape, torch.zeros(shape), **{**SCALES[name], **TILE})


@pytest.mark.parametrize("name", [name for name, keys in SCALES.items() if keys["scale_format"] == "fp32"])
def test_subnormal_float32_scales_do_no_harm(name):
    for kind in TINY:
        found = quantized(MATRICES[kind], **SCALES[name])
        assert found.codes.abs().max() <= 12
        assert found.dequantize().isfinite().all()


@every_scale
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_nan_and_inf_take_their_block_and_the_tensor_scale(name, bad):
    keys = SCALES[name]
    x = normal(4, 70).double()
    x[1, 40] = bad
    for rounding in roundings(keys):
        found = quantized(x, rounding=rounding, **keys)
        block = 40 // keys["block"]
        inside = slice(block * keys["block"], (block + 1) * keys["block"])
        assert found.scale[1, block].isnan()
        assert not found.codes[1, inside].any()
        assert found.dequantize()[1, inside].isnan().all()
        if keys["scale_format"] == "e4m3":
            assert found.tensor_scale.isnan()
            assert not found.codes.any()
            assert found.dequantize().isnan().all()
        else:
            check((bad, rounding), x, rounding=rounding, **keys)


@pytest.mark.parametrize("keys", [E8M0, E4M3, SCALES["four over six, mae"]], ids=str)
def test_the_bytes_of_a_nan_scale(keys):
    x = torch.ones(2, 64)
    x[1, 0] = torch.nan
    found = quantized(x, **keys).packed_scales()
    assert found[64 // keys["block"]] == (255 if keys["scale_format"] == "e8m0" else 0x7F)


# Packing


@pytest.mark.parametrize(("keys", "bits"), [(E8M0, 4.25), (E4M3, 4.5)], ids=["e8m0", "e4m3"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_hold_the_whole_tensor(keys, bits, rounding):
    x = normal(32, 96) * torch.exp2(-torch.arange(32.0))[:, None]
    found = quantized(x, rounding=rounding, **keys)
    codes, scales = found.packed(), found.packed_scales()
    assert 8 * (codes.numel() + scales.numel()) / x.numel() == bits
    fields = torch.stack([codes & 15, codes >> 4], dim=1).flatten().int()
    exponent, mantissa = (fields >> 1) & 3, fields & 1
    magnitude = torch.where(exponent > 0, 2.0 ** (exponent - 1) * (1 + mantissa / 2), mantissa / 2)
    values = torch.where(fields >= 8, -magnitude, magnitude).view(-1, keys["block"])
    dtype = torch.float8_e8m0fnu if keys["scale_format"] == "e8m0" else torch.float8_e4m3fn
    values = values.double() * scales.view(dtype).double()[:, None] * found.tensor_scale.double()
    assert torch.equal(values.float().view(x.shape), found.dequantize())


@every_scale
def test_a_block_holds_at_most_16_codes(name):
    for rounding in roundings(SCALES[name]):
        codes = quantized(normal(64, 64), rounding=rounding, **SCALES[name]).codes
        assert set(codes.unique().tolist()) <= {*range(-4, 5), -6, 6, -8, 8, -12, 12}


# A million elements


@pytest.fixture(scope="module")
def gaussian():
    return normal(1024, 1024, seed=11)


@pytest.mark.parametrize("name", [*PUBLISHED, "stochastic four over six", "mxfp4"])
def test_a_million_normal_numbers(name, gaussian):
    if name in PUBLISHED:
        keys, published = PUBLISHED[name]
    else:
        keys, published = (STOCHASTIC_FOUR_OVER_SIX, 17.5) if name != "mxfp4" else (E8M0, None)
    found, same = quantized(gaussian, **keys), expected(gaussian, **keys)
    assert_same(found.codes, same.codes, "codes")
    assert_same(found.scale, same.scale, "scale")
    if published is not None:
        error = 1e3 * (found.dequantize() - gaussian).double().square().mean().item()
        assert error == pytest.approx(published, rel=0.03)


def test_tiles_quantize_a_matrix_and_its_transpose_alike():
    x = normal(48, 80)
    for keys in (E8M0, E4M3, FP32):
        found, other = (quantized(each, **{**keys, **TILE}) for each in (x, x.t()))
        assert torch.equal(found.codes, other.codes.t())
        assert torch.equal(found.scale, other.scale.t())
