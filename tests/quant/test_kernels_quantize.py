"""A whole quantization in one call of the CPU's loops against the reference's kernels composed, bit for bit."""

from itertools import product

import pytest
import torch
from kernel_inputs import COMPILED, LAST, assert_identical, normal, tensors

from luqrun.quant import quantizer as quantizers
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS, SAWB
from luqrun.quant.kernels import fuses, ops, reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer

STREAM = make_stream(2**61 + 11, 3, 2, 7, 1, 4)
FIELDS = ("codes", "scale", "signed", "fields", "maximum")
KINDS = tensors()
INTEGER = [form.name for form in COMPILED if not form.floating]
FLOATING = [form.name for form in COMPILED if form.floating]
ESTIMATES = [None, 0.0, 1e-3, 0.7, 50.0, torch.nan, torch.inf, 3e38, 2.0**-149, 2.0**-140]


@pytest.fixture
def composed(monkeypatch):
    """Quantizer.run where there is no kernel for it, on the reference's kernels."""

    def run(quantizer, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(quantizers, "fuses", lambda device_type: False)
            patch.setattr(ops, "backend_for", lambda device_type: reference)
            return quantizer.run(*arguments)

    return run


@pytest.fixture
def assert_same(composed):
    def check(quantizer, x, hindsight=None, dtype=torch.float32, packed=True):
        estimate = None if hindsight is None else torch.tensor(hindsight)
        found = quantizer.run(x, STREAM, estimate, dtype, packed)
        for name, left, right in zip(
            FIELDS, found, composed(quantizer, x, STREAM, estimate, dtype, packed), strict=True
        ):
            assert_identical(left, right, (name, str(quantizer), hindsight))
        return found

    return check


@pytest.fixture(autouse=True)
def _one_call():
    assert fuses("cpu"), "this device's kernels have no whole quantization"
    assert cpu.quantize is not None


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_tensor(name, assert_same):
    x = KINDS[name]
    for rounding in ("nearest", "stochastic"):
        assert_same(Quantizer("int4", "sawb", rounding), x)
        assert_same(Quantizer("e3m0", "absmax", rounding), x, dtype=torch.bfloat16)
        for estimate in (None, 0.0, 0.3):
            assert_same(Quantizer("int4", "hindsight", rounding), x, estimate, torch.int8)
            assert_same(Quantizer("e3m0", "hindsight", rounding), x, estimate, torch.int8)


@pytest.mark.parametrize("pow2", [False, True], ids=["any scale", "pow2_scale"])
@pytest.mark.parametrize("form", INTEGER + FLOATING)
def test_every_format_range_and_rounding(form, pow2, assert_same):
    underflows = ("flush", "nearest", "stochastic") if FORMATS[form].logarithmic else (None,)
    ranges = (
        ("absmax", "hindsight", "sawb") if form in INTEGER and FORMATS[form].bits in SAWB else ("absmax", "hindsight")
    )
    for scale_range, rounding, underflow in product(ranges, ("nearest", "stochastic"), underflows):
        quantizer = Quantizer(form, scale_range, rounding, underflow, pow2_scale=pow2)
        for name in ("vector", "unsigned", "unaligned", "bfloat16 aligned", "non-finite", "subnormal", "zeros"):
            for estimate in (None, 0.0, 0.4) if scale_range == "hindsight" else (None,):
                assert_same(quantizer, KINDS[name], estimate)


@pytest.mark.parametrize("pow2", [False, True], ids=["any scale", "pow2_scale"])
@pytest.mark.parametrize("form", ["int4", "int8", "e3m0", "e4m0", "e2m1"])
def test_every_estimate(form, pow2, assert_same):
    quantizer = Quantizer(form, "hindsight", "stochastic", pow2_scale=pow2)
    for estimate, name in product(ESTIMATES, ("vector", "unsigned", "non-finite", "nan", "huge", "subnormal", "empty")):
        found = assert_same(quantizer, KINDS[name], estimate)
        finite = KINDS[name].isfinite().all()
        assert found.scale.isnan() == (not finite), (estimate, name)


@pytest.mark.parametrize("form", INTEGER + FLOATING)
def test_clips_of_every_magnitude(form, assert_same):
    # Among subnormals the quotient of clip and limit is coarse; near the largest float a power of two would overflow.
    largest = torch.finfo(torch.float32).max
    clips = [2.0**-149 * factor for factor in (1, 2, 3, 7, 13, 14, 15, 63, 64, 100, 127, 1000, 12345)]
    clips += [2.0**-126, 2.0**-126 * 7.3, 1e-30, 1.0, 7.0, 7.000001, 64.0, 1e30, largest / 2, largest * 0.76, largest]
    for clip, pow2 in product(clips, (False, True)):
        for x in (torch.tensor([clip]), torch.tensor([clip, -clip / 3]), clip * normal(33).clamp(-1, 1)):
            assert_same(Quantizer(form, pow2_scale=pow2, rounding="stochastic"), x)
            if form in INTEGER and FORMATS[form].bits in SAWB:
                assert_same(Quantizer(form, "sawb", pow2_scale=pow2), x)
            assert_same(Quantizer(form, "hindsight", pow2_scale=pow2), x, clip)


def test_more_than_one_task(assert_same):
    images = normal(3, 5, 120, 75)
    for x in (normal(2 * CHUNK + 1029), images.to(memory_format=LAST), images.bfloat16().to(memory_format=LAST)):
        worse = x.clone()
        worse[(-1,) * x.dim()] = torch.inf
        for each in (x, worse):
            assert_same(Quantizer("int4", "sawb"), each, dtype=torch.int8)
            assert_same(Quantizer("int4", rounding="stochastic"), each, dtype=torch.bfloat16)
            for estimate in (None, 0.7):
                assert_same(Quantizer("e3m0", "hindsight", rounding="stochastic"), each, estimate)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
def test_codes_of_every_dtype(dtype, packed, assert_same):
    for name in ("vector", "aligned", "unaligned", "half image", "one", "empty"):
        found = assert_same(Quantizer("e3m0", rounding="stochastic"), KINDS[name], None, dtype, packed)
        assert found.codes.dtype == dtype
        assert found.fields.numel() == ((KINDS[name].numel() + 1) // 2 if packed else 0)
        assert_same(Quantizer("int4", "sawb"), KINDS[name], None, dtype, packed)


def test_what_it_does_not_change():
    x, stream, estimate = normal(2, 3, 4, 4).requires_grad_(), make_stream(1), torch.tensor(0.5)
    before = x.detach().clone()
    found = Quantizer("e3m0", "hindsight", rounding="stochastic").run(x, stream, estimate, torch.float32, True)
    assert torch.equal(x, before)
    assert torch.equal(stream, make_stream(1))
    assert estimate == 0.5
    found_too = cpu.quantize(x, Encoding("int4"), None, stream, torch.float32, True)
    assert not any(each.requires_grad for each in found_too)
    # What comes out is the caller's: a later call leaves it as it is.
    kept = [each.clone() for each in found]
    Quantizer("e3m0", "hindsight", rounding="stochastic").run(2 * x, make_stream(2), None, torch.float32, True)
    for left, right in zip(found, kept, strict=True):
        assert_identical(left, right)
