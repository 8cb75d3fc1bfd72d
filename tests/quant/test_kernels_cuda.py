"""The Triton kernels against the reference, bit for bit: on a GPU where there is one, else interpreted on the CPU."""

from itertools import product

import pytest
import torch
from kernel_inputs import COMPILED, assert_identical, encoding

from luqrun.quant import quantizer as quantizers
from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels import ops, reference
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import make_stream, random_words
from luqrun.quant.quantizer import Quantizer

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from luqrun.quant.kernels.cuda import backend as cuda  # noqa: E402
from luqrun.quant.kernels.cuda import elements as triton_elements  # noqa: E402
from luqrun.quant.kernels.cuda import loops  # noqa: E402

ON_GPU = torch.cuda.is_available() and not triton.knobs.runtime.interpret
DEVICE = "cuda" if ON_GPU else "cpu"
LAST = torch.channels_last
STREAM = make_stream(2**61 + 11, 3, 2, 7, 1, 4)
EDGES = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-45, 2.0**-126, -(2.0**-130)]
TIES = [0.25, 0.5, 0.75, 1, 1.5, 2.5, 3, 6, 12, 24, 48, 96, 192, 255, 300]


def normal(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 4


INPUTS = {
    "vector": normal(1031),
    "unsigned": normal(256).abs(),
    "quads": normal(2, 8, 4, 6).to(memory_format=LAST),
    "even channels": normal(2, 6, 2, 10).to(memory_format=LAST),
    "odd channels": normal(2, 5, 4, 6).to(memory_format=LAST),
    "unaligned": normal(3, 6, 3, 7).to(memory_format=LAST),
    "unaligned odd": normal(3, 5, 3, 3).to(memory_format=LAST),
    "image of many": normal(4, 3, 6, 6).to(memory_format=LAST)[1:3],
    "contiguous image": normal(2, 3, 4, 4),
    "cropped": normal(2, 3, 6, 6).to(memory_format=LAST)[:, :, 1:, :5],
    "slice": normal(40, 9)[:, ::2],
    "transposed": normal(31, 17).t(),
    "expanded": normal(5, 1).expand(5, 6),
    "offset": normal(130)[3:],
    "one": normal(1),
    "scalar": normal(1)[0],
    "zeros": torch.zeros(13),
    "half": normal(55).half(),
    "bfloat16": normal(64).bfloat16(),
    "bfloat16 image": normal(2, 4, 5, 4).bfloat16().to(memory_format=LAST),
    "double": normal(55).double(),
    "subnormal": normal(99) * 2.0**-140,
    "huge": normal(99) / normal(99).abs().max() * 3e38,
    "edges": torch.tensor(EDGES),
    "empty": normal(0),
    "empty images": normal(0, 3, 4, 4).to(memory_format=LAST),
}


def bits_of(x):
    """What tells +0 from -0 and compares NaN: the bit pattern."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]).cpu()


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.stride() == expected.stride() or not found.numel()
    assert torch.equal(bits_of(found), bits_of(expected))


def assert_same_encoding(
    x, form, rounding, underflow=None, scale=None, signed=None, dtype=None, packed=True, observe=True
):
    """All that encode returns, and the way back from the fields."""
    finite = x.float()[x.isfinite()]
    if scale is None:
        scale = finite.abs().max() / form.limit * 0.8 if finite.numel() else torch.tensor(1.0)
    signed = (x < 0).any() if signed is None else torch.tensor(signed)
    names = encoding(form, rounding, underflow), STREAM, 41, dtype, packed, observe
    moved = x.to(DEVICE)  # what is not dense comes out dense on a GPU, perhaps in another memory format
    expected = reference.encode(moved.cpu(), scale, signed, *names)
    codes, fields, maximum = cuda.encode(moved, scale.to(DEVICE), signed.to(DEVICE), *names)
    assert_same(codes, expected[0])
    assert_same(fields, expected[1])
    assert (maximum.shape, maximum.dtype) == (expected[2].shape, torch.float32)
    torch.testing.assert_close(maximum.cpu(), expected[2], rtol=0, atol=0, equal_nan=True)
    if packed:
        last = is_channels_last(codes)
        assert_same(cuda.unpack(fields, x.shape, last, signed.to(DEVICE), form, codes.dtype), expected[0])
        assert_same(cuda.pack(codes, form), expected[1])
    return codes.cpu()


def modes(form):
    return product(("nearest", "stochastic"), ("flush", "nearest", "stochastic") if form.logarithmic else (None,))


@pytest.mark.parametrize(
    "name", ["int2", "int4", "int8", "e2m0", "e3m0", "e4m0", "e3m0_div128", "e1m1", "e2m1", "e3m2", "e2m3"]
)
def test_every_rounding_of_every_format(name):
    form = FORMATS[name]
    x = torch.tensor([*EDGES, *TIES, *(-tie for tie in TIES), *(normal(99) * 8).tolist()])
    image = normal(1, 4, 2, 6).to(memory_format=LAST)
    for rounding, underflow in modes(form):
        for signed in (True, False):  # negative elements of what has none are clipped to 0
            codes = assert_same_encoding(x, form, rounding, underflow, scale=torch.tensor(1.0), signed=signed)
            assert set(codes.tolist()) <= set(form.levels()) | set(form.levels(False))
        assert_same_encoding(image, form, rounding, underflow)


@pytest.mark.parametrize("name", list(INPUTS))
def test_every_kind_of_tensor(name):
    x = INPUTS[name]
    assert_same_encoding(x, FORMATS["int4"], "nearest", dtype=torch.bfloat16)
    assert_same_encoding(x, FORMATS["int4"], "stochastic", packed=False)
    assert_same_encoding(x, FORMATS["e2m1"], "stochastic", dtype=torch.bfloat16)
    codes = assert_same_encoding(x, FORMATS["e3m0"], "stochastic", "stochastic", dtype=torch.bfloat16)
    assert x.numel() < 30 or name in ("expanded", "subnormal") or codes.unique().numel() > 7


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_codes_of_every_dtype(dtype):
    for name, x in product(("int4", "e3m0"), (INPUTS["quads"], INPUTS["half"])):
        assert_same_encoding(x, FORMATS[name], "stochastic", "flush", dtype=dtype)
        assert_same_encoding(x, FORMATS[name], "nearest", "nearest", dtype=dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter, where a quotient is infinite
@pytest.mark.parametrize("name", ["int4", "e3m0", "e2m1"])
def test_scales_that_are_no_scales(name):
    x = torch.tensor([*EDGES, 1.0, -2.0])
    for void in (0.0, torch.nan, -1.0, torch.inf):
        codes = assert_same_encoding(x, FORMATS[name], "stochastic", "stochastic", scale=torch.tensor(void))
        assert not codes.any()
    for extreme in (1e-45, 2.0**-126, 1e30, 3e38):
        assert_same_encoding(x, FORMATS[name], "nearest", "stochastic", scale=torch.tensor(extreme))


def test_nothing_but_codes_where_nothing_else_is_asked_for():
    for x in (INPUTS["vector"], INPUTS["quads"]):
        assert_same_encoding(x, FORMATS["e3m0"], "stochastic", "stochastic", packed=False, observe=False)


@pytest.mark.parametrize("name", ["int4", "e3m0", "e2m1"])
def test_a_quarter_million_draws(monkeypatch, name):
    if not ON_GPU:
        monkeypatch.setattr(cuda, "TILE", 2**18)  # one program, for the interpreter's sake
    assert_same_encoding(normal(2**18), FORMATS[name], "stochastic", "stochastic", packed=False)


# With a wrong number of programs or a wrong offset, blocks would be missing, doubled or drawn alike.
@pytest.mark.parametrize("tiles", [1, 3])
def test_many_programs_and_tiles(monkeypatch, tiles):
    for name, value in (("TILE", 64), ("TILES", tiles), ("WAVE", 1), ("QUADS", 2)):
        monkeypatch.setattr(cuda, name, value)
    for x in (
        normal(64 * 5 + 7),
        normal(2, 20, 4, 8).to(memory_format=LAST),
        normal(2, 10, 3, 5).to(memory_format=LAST),
    ):
        assert_same_encoding(x, FORMATS["e3m0"], "stochastic", "stochastic")
    assert_same_encoding(normal(64 * 5 + 7), FORMATS["int4"], "nearest", dtype=torch.bfloat16)


def test_channels_last_gives_the_codes_of_its_contiguous_twin():
    for x in (normal(2, 6, 2, 4), normal(2, 3, 5, 3)):
        twin = assert_same_encoding(x, FORMATS["e3m0"], "stochastic", "stochastic")
        assert torch.equal(
            assert_same_encoding(x.to(memory_format=LAST), FORMATS["e3m0"], "stochastic", "stochastic"), twin
        )


@triton.jit
def _words_kernel(stream, sample, first, span, element, groups, elements, GROUPS: tl.constexpr):
    """The words of counters `first` and up, of 4 elements each, and of the elements from `element` on, by all paths."""
    name = triton_elements.stream_words(stream, sample)
    row, four = tl.arange(0, GROUPS), tl.arange(0, 4)[None, :]
    start = loops.offset_of(first, GROUPS)
    tl.store(span + row[:, None] * 4 + four, triton_elements.words_of_span(start, name, GROUPS).to(tl.int64))
    number = tl.cast(element, tl.int64) + row * 4
    words = triton_elements.side_by_side(*triton_elements.words_of_groups(number, name))
    tl.store(groups + row[:, None] * 4 + four, words.to(tl.int64))
    numbers = number[:, None] + four
    tl.store(elements + row[:, None] * 4 + four, triton_elements.words_of_elements(numbers, name).to(tl.int64))


@pytest.mark.parametrize("tile", [0, 2**28 - 1, 2**28, 2**31 - 1, 2**40 + 3])
def test_elements_far_beyond_32_bits_take_their_own_counters(tile, monkeypatch):
    first, arange = 16 * tile, torch.arange
    span, groups, elements = (torch.zeros(16, 4, dtype=torch.int64, device=DEVICE) for _ in range(3))
    _words_kernel[(1,)](STREAM.to(DEVICE), 41, tile, span, 4 * first, groups, elements, GROUPS=16)
    # Number the elements of the reference as if they lay behind 4 * first others.
    monkeypatch.setattr(torch, "arange", lambda *arguments, **options: arange(*arguments, **options) + first)
    expected = random_words(STREAM, 41, 64).view(16, 4)
    for found in (span, groups, elements):
        assert torch.equal(found.cpu(), expected)


@triton.jit
def _offsets_kernel(tile, total, out, SIZE: tl.constexpr):
    start = loops.offset_of(tile, SIZE)
    tl.store(out, start)
    tl.store(out + 1, loops.left_of(total, start, SIZE).to(tl.int64))


@pytest.mark.parametrize(("tile", "total"), [(3, 7000), (3, 6144), (2**21, 2**32 + 5), (2**31 - 1, 2**42), (0, 1)])
def test_offsets_of_tiles_are_64_bits_wide(tile, total):
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _offsets_kernel[(1,)](tile, total, out, SIZE=2048)
    assert out.tolist() == [tile * 2048, min(total - tile * 2048, 2048)]


@pytest.mark.parametrize("name", list(INPUTS))
def test_statistics_of_every_kind_of_tensor(name):
    x = INPUTS[name]
    for moments in (True, False):
        expected, found = reference.statistics(x, moments), cuda.statistics(x.to(DEVICE), moments).cpu()
        assert (found.dtype, found.shape) == (torch.float64, (4,))
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found[2:], expected[2:], rtol=1e-12, atol=0, equal_nan=True)


def test_statistics_of_many_programs(monkeypatch):
    monkeypatch.setattr(cuda, "STATISTICS_TILE", (2, 32))
    monkeypatch.setattr(cuda, "STATISTICS_PROGRAMS", 4)
    for numel, place in ((64 * 4, 255), (64 * 9 + 5, 64 * 9 + 4), (70, 69)):
        x = normal(numel).abs()
        x[place] = -7.0
        expected, found = reference.statistics(x, True), cuda.statistics(x.to(DEVICE), True).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert torch.equal(cuda.statistics(x.to(DEVICE), True).cpu(), found)
        x[place] = torch.nan
        assert cuda.statistics(x.to(DEVICE), True)[0].isnan()


QUANTIZERS = (
    Quantizer("int4", range="sawb"),
    Quantizer("int4", range="hindsight", pow2_scale=True),
    Quantizer("e3m0", rounding="stochastic"),
    Quantizer("e2m1", pow2_scale=True),
    Quantizer("e3m0", range="hindsight", rounding="stochastic", pow2_scale=True),
)


def assert_same_quantization(quantizer, x, hindsight, monkeypatch):
    """All that Quantizer.run returns, in one call and composed of the reference's kernels."""
    moved, estimate = x.to(DEVICE), torch.tensor(hindsight) if quantizer.range == "hindsight" else None
    with monkeypatch.context() as patch:
        patch.setattr(quantizers, "fuses", lambda device_type: True)
        patch.setattr(ops, "backend_for", lambda device_type: cuda)
        found = quantizer.run(moved, STREAM, estimate, torch.bfloat16, True)
    with monkeypatch.context() as patch:
        patch.setattr(quantizers, "fuses", lambda device_type: False)
        patch.setattr(ops, "backend_for", lambda device_type: reference)
        expected = quantizer.run(moved.cpu(), STREAM, estimate, torch.bfloat16, True)
    for left, right in zip(found, expected, strict=True):
        assert_identical(left.cpu(), right, (str(quantizer), hindsight))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # of the interpreter, with Inf
@pytest.mark.parametrize("name", list(INPUTS))
def test_a_whole_quantization_of_every_kind_of_tensor(name, monkeypatch):
    for quantizer in QUANTIZERS:
        assert_same_quantization(quantizer, INPUTS[name], 0.7, monkeypatch)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_scales_of_every_magnitude(quantizer, monkeypatch):
    for largest in (0.0, 2.0**-149, 5 * 2.0**-149, 2.0**-130, 1.5 * 2.0**-126, 0.3, 448.0, 3e38, torch.inf, torch.nan):
        for hindsight in (0.0, largest, 2.0**-140) if quantizer.range == "hindsight" else (0.0,):
            assert_same_quantization(quantizer, torch.tensor([largest, -largest / 3]), hindsight, monkeypatch)


def test_statistics_read_nothing_where_there_is_an_estimate():
    x = torch.tensor([1.0, -3.0], device=DEVICE)
    for estimate, expected in ((0.5, [0.0] * 4), (0.0, [3.0, 1.0, 4.0, 10.0]), (torch.nan, [3.0, 1.0, 4.0, 10.0])):
        assert cuda.statistics(x, True, torch.tensor(estimate, device=DEVICE)).tolist() == expected


@pytest.mark.parametrize("form", COMPILED, ids=lambda form: form.name)
def test_every_code_survives_packing(form):
    for signed, dtype in product((True, False), (form.code_dtype, torch.float32)):
        levels = torch.tensor(form.levels(signed), dtype=dtype)
        for codes in (levels, torch.cat([levels, levels[:1], levels])):
            fields = cuda.pack(codes.to(DEVICE), form)
            assert_same(fields, reference.pack(codes, form))
            flag = torch.tensor(signed, device=DEVICE)
            assert_same(cuda.unpack(fields, codes.shape, False, flag, form, dtype), codes)


def test_packing_takes_the_order_of_memory():
    codes = torch.randint(-7, 8, (2, 3, 5, 3), dtype=torch.int8).to(memory_format=LAST)
    moved = codes.to(DEVICE)
    for view in (lambda x: x, lambda x: x[:, :, 1:], lambda x: x.transpose(1, 3)):
        assert_same(cuda.pack(view(moved), FORMATS["int4"]), reference.pack(view(codes), FORMATS["int4"]))


@pytest.mark.parametrize("name", [name for name in INPUTS if name != "expanded"])
@pytest.mark.parametrize("most", [None, 0.5])
def test_relu_and_its_backward(name, most, monkeypatch):
    monkeypatch.setattr(cuda, "RELU_ROWS", 64)
    x = INPUTS[name]
    dense = x.clone(memory_format=LAST if is_channels_last(x) else torch.contiguous_format)
    expected, found = dense.clone(), dense.to(DEVICE)
    mask = cuda.relu_(found, most)
    assert_same(mask, reference.relu_(expected, most))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert not found.signbit().logical_and(found == 0).any()
    grad = normal(*x.shape, seed=2).to(x.dtype)
    for other in (grad, grad.to(memory_format=LAST) if x.dim() == 4 else grad.clone()):
        arguments = mask.cpu(), is_channels_last(dense)
        assert_same(
            cuda.relu_backward(other.to(DEVICE), mask, arguments[1]), reference.relu_backward(other, *arguments)
        )


def test_relu_of_what_is_not_dense():
    expected = normal(6, 8)
    found = expected.clone().to(DEVICE)
    assert_same(cuda.relu_(found[:, ::2]), reference.relu_(expected[:, ::2]))
    assert torch.equal(found.cpu(), expected)


def test_inputs_stay_as_they_are():
    x = normal(2, 3, 4, 4).to(DEVICE).requires_grad_()
    before, stream = x.detach().clone(), STREAM.to(DEVICE)
    one, true = torch.tensor(0.1, device=DEVICE), torch.tensor(True, device=DEVICE)
    codes, *_ = cuda.encode(x, one, true, encoding(FORMATS["int4"], "stochastic"), stream, dtype=torch.float32)
    assert not codes.requires_grad
    assert not cuda.statistics(x, True).requires_grad
    assert torch.equal(x, before)
    assert torch.equal(stream.cpu(), STREAM)
