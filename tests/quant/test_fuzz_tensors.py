"""Any tensor, any quantizer: what the contract says of codes, scale and packing; and both CPU backends agree."""

import math

import numpy as np
import torch
from fuzzing import examples
from hypothesis import event, example, given
from hypothesis import strategies as st
from kernel_inputs import LAST, assert_identical, modes

from luqrun.quant.encoding import RANGES
from luqrun.quant.formats import FORMATS, SAWB, unpack
from luqrun.quant.kernels import has_kernels, reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer, update_hindsight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = torch.finfo(torch.float32).max
TINIEST = 2.0**-149
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, TINIEST, -TINIEST, 2.0**-126, -3e38, LARGEST, -LARGEST, 1.0, 1e39)


@st.composite
def quantizers(draw) -> Quantizer:
    """Every one that is not refused."""
    form = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    integer = not form.logarithmic and not form.mantissa_bits
    of_formats = {"sawb": integer and form.bits in SAWB, "rms": False}  # the second is of blocks
    ranges = [name for name in RANGES if of_formats.get(name, True)]
    rounding, underflow = draw(st.sampled_from(modes(form)))
    drawn = "stochastic" in (rounding, underflow)
    top = form.limit * form.unit
    largest = st.integers(1, form.radix * form.limit) if form.logarithmic else st.floats(top / 2, top * 2)
    return Quantizer(
        form.name,
        draw(st.sampled_from(ranges)),
        rounding,
        underflow,
        samples=draw(st.integers(1, 4)) if drawn else 1,
        pow2_scale=draw(st.booleans()),
        hindsight_momentum=draw(st.floats(0, 0.99)),
        redraw_every=draw(st.integers(1, 3)) if drawn else 1,
        largest=None if drawn or integer else draw(st.none() | largest),
    )


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any shape of up to four dimensions, dtype, memory format and magnitude; some with NaN, Inf and odd numbers."""
    shape = draw(st.lists(st.sampled_from((0, 1, 1, 2, 3, 4, 5, 8, 9)), max_size=4))
    steps = [draw(st.sampled_from((1, 1, 1, 2))) for _ in shape]
    whole = [size * step for size, step in zip(shape, steps, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal(whole) * rng.random(whole) ** draw(st.sampled_from((0, 1, 8, 60)))
    values = values * 2.0 ** draw(st.sampled_from((0, 0, 0, 1, -10, 30, 100, 127, -100, -126, -140, -149)))
    kind = draw(st.sampled_from(("any", "any", "positive", "negative", "zeros", "special")))
    if kind != "any":
        values = {"positive": abs(values), "negative": -abs(values), "zeros": 0 * values, "special": values}[kind]
    if kind == "special" and values.size:
        for number in draw(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), max_size=4)):
            values.flat[rng.integers(values.size)] = number
    x = torch.from_numpy(np.asarray(values)).to(draw(st.sampled_from(DTYPES)))
    if x.dim() == 4 and draw(st.booleans()):
        x = x.to(memory_format=LAST)
    x = x[tuple(slice(None, None, step) for step in steps)]
    if x.dim() > 1 and draw(st.booleans()):
        x = x.permute(draw(st.permutations(range(x.dim()))))
    return x


streams = st.builds(make_stream, st.integers(0, 2**62), layer=st.integers(0, 200), step=st.integers(0, 2**31))


@example(Quantizer("e1m0", pow2_scale=True), torch.tensor([-3e38]), 0, 0)  # the power of two above is infinite
@examples(100)
@given(quantizers(), tensors(), st.integers(0, 2**31), st.integers(0, 3))
def test_what_a_quantized_tensor_is(quantizer, x, seed, sample):
    before = x.clone()
    found, form = quantizer.quantize(x, seed, sample), quantizer.form
    event("finite" if x.float().isfinite().all() else "not finite")
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert (found.codes.shape, found.codes.dtype) == (x.shape, form.code_dtype)
    assert (found.scale.shape, found.scale.dtype) == ((), torch.float32)
    # At most 2^b codes, which pack into b bits and come back.
    signed = bool(found.signed)
    assert len(form.levels(signed)) <= 2**form.bits
    assert set(found.codes.unique().tolist()) <= set(form.levels(signed))
    packed = found.packed()
    assert packed.numel() == math.ceil(x.numel() * form.bits / 8)
    back = form.from_fields(unpack(packed, form.bits, x.numel()), found.signed)
    assert torch.equal(back.to(form.code_dtype), found.codes.contiguous().flatten())
    values, x = found.dequantize(torch.float64), x.float().double()
    if not x.isfinite().all():
        assert found.scale.isnan()
        assert values.isnan().all()
        return
    largest = x.abs().max().item() if x.numel() else 0.0
    limit = form.limit if signed else form.unsigned_limit
    if largest == 0:
        assert found.scale == 0
        assert not found.codes.any()
        return
    assert found.scale > 0 or (quantizer.range == "signed_max" and not (x > 0).any())
    assert values.isfinite().all()
    assert signed == (form.logarithmic or form.mantissa_bits > 0 or bool((x < 0).any()))
    assert (found.codes.double() * x.sign() >= 0).all()  # no value changes its sign
    levels = (torch.tensor(form.levels(signed), dtype=torch.float32) * found.scale).double()
    assert (values.abs() <= levels[-1]).all()
    if quantizer.range in ("sawb", "signed_max"):
        return
    # The range holds the largest value, and no value goes further than to a neighbouring level.
    reach = found.scale.item() * (quantizer.largest / form.unit if quantizer.largest else limit)
    overflows = quantizer.pow2_scale and 2 * reach > LARGEST  # then the scale was rounded down
    assert overflows or reach >= largest * (1 - 2**-23)
    inside = x.clamp(levels[0], levels[-1]).flatten()
    above = torch.searchsorted(levels, inside).clamp(max=len(levels) - 1)
    between = torch.stack([levels[(above - 1).clamp(min=0)], levels[above]])
    assert ((between - values.flatten()).abs().amin(0) == 0).all()


@examples(100)
@given(
    quantizers(), tensors(), streams, st.sampled_from([None, 0.0, 1e-3, 0.7, 50.0, math.nan, math.inf, 3e38, TINIEST])
)
def test_both_backends_agree(quantizer, x, stream, estimate):
    if not has_kernels(quantizer.form):
        return  # torch's operations alone
    form = quantizer.form
    for moments in (False, True):
        left, right = cpu.statistics(x, moments), reference.statistics(x, moments)
        assert_identical(left[:2], right[:2])
        if moments and x.float().isfinite().all():  # the order of summation is the backend's
            assert torch.allclose(left, right, rtol=1e-12, atol=0.0)
    scale, signed, _ = quantizer.measure(x, None if estimate is None else torch.tensor(estimate))
    for sample in range(quantizer.samples):
        for dtype in (form.code_dtype, torch.float32):
            arguments = x, scale, signed, quantizer.encoding, stream, sample, dtype, True, True
            found = cpu.encode(*arguments), reference.encode(*arguments)
            for left, right in zip(*found, strict=True):
                assert_identical(left, right, str(quantizer))
    if quantizer.range != "sawb":  # its sums differ in the last bit
        one_call = quantizer.run(x, stream, None if estimate is None else torch.tensor(estimate), torch.float32, True)
        assert_identical(one_call.scale, scale, str(quantizer))
    codes, fields, _ = found[0]
    last = x.dim() == 4 and codes.is_contiguous(memory_format=LAST) and not codes.is_contiguous()
    if codes.is_contiguous() or last:
        for backend in (cpu, reference):
            back = backend.unpack(fields, x.shape, last, signed, form, torch.float32)
            assert_identical(back, codes + 0.0)


@examples(100)
@given(st.floats(width=32), st.floats(width=32, min_value=0), st.floats(0, 0.999))
def test_the_estimate_of_hindsight_stays_a_number(maximum, estimate, momentum):
    kept = torch.tensor(estimate)
    update_hindsight(kept, torch.tensor(abs(maximum)), momentum)
    if not math.isfinite(maximum):
        assert kept.item() == torch.tensor(estimate).item() or math.isnan(estimate)
    elif math.isfinite(estimate):
        low, high = sorted((abs(maximum), estimate)) if estimate > 0 else (abs(maximum), abs(maximum))
        assert low * (1 - 1e-5) - TINIEST * 2 <= kept.item() <= high * (1 + 1e-5) + TINIEST * 2
