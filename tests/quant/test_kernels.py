"""The kernels of the CPU (numba) against the reference, bit for bit."""

import math
from itertools import product

import pytest
import torch
from kernel_inputs import COMPILED, INT_OF_SIZE, LAST, assert_identical, encoding, modes, normal, tensors

from luqrun.errors import UserError
from luqrun.quant import kernels
from luqrun.quant.formats import FORMATS, pack
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu.sizes import CHUNK, ROW
from luqrun.quant.kernels.layout import in_memory_order, is_channels_last
from luqrun.quant.kernels.philox import make_stream

STREAM = make_stream(11, 3, 2, 7, 1, 4)
INT4, E3M0, E2M1 = FORMATS["int4"], FORMATS["e3m0"], FORMATS["e2m1"]
SIZES = [*range(10), ROW - 1, ROW, ROW + 1, 3 * ROW + 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + ROW + 3]
BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])


def largest_code_at_maximum(x, form):
    finite = x.float()[x.isfinite()]
    return finite.abs().max() / form.limit if finite.numel() else torch.tensor(1.0)


def assert_same_encoding(
    x, scale, form, rounding, underflow=None, sample=0, signed=None, dtype=None, packed=True, observe=True
):
    """All that encode returns."""
    signed = (x < 0).any() | form.logarithmic if signed is None else torch.tensor(signed)
    how = x, scale, signed, encoding(form, rounding, underflow), STREAM, sample, dtype, packed, observe
    expected, found = reference.encode(*how), cpu.encode(*how)
    assert expected[0].dtype == (dtype or form.code_dtype)
    for left, right in zip(found, expected, strict=True):
        assert_identical(left, right, how[3:])
    return found[0]


# Encoding


@pytest.mark.parametrize("form", COMPILED, ids=lambda form: form.name)
def test_every_rounding_of_every_format(form):
    for name, x in tensors().items():
        scale = largest_code_at_maximum(x, form)
        for rounding, underflow in modes(form):
            codes = assert_same_encoding(x, scale, form, rounding, underflow)
            assert set(codes.unique().tolist()) <= set(form.levels()) | set(form.levels(False)), name


@pytest.mark.parametrize("form", COMPILED, ids=lambda form: form.name)
def test_every_scale_of_every_format(form):
    x = torch.cat([normal(1031), tensors()["non-finite"], tensors()["smallest"], tensors()["huge"]])
    ties = torch.tensor([0.25, 0.5, 0.75, 1, 1.5, 2.5, 3, 6, 12, 24, 48, 96, form.limit])
    for rounding, underflow in modes(form):
        for signed in (True, False):  # negative elements of what has none are clipped to 0
            assert_same_encoding(torch.cat([ties, -ties]), torch.tensor(1.0), form, rounding, underflow, signed=signed)
        for factor in (0.3, 1e-45, 2.0**-126, 1e-30, 1e30, 3e38):
            assert_same_encoding(x, torch.tensor(factor), form, rounding, underflow, sample=5)
        for void in (0.0, torch.nan, -1.0, torch.inf):
            assert not assert_same_encoding(x, torch.tensor(void), form, rounding, underflow).any()


@pytest.mark.parametrize("form", [INT4, E3M0, E2M1], ids=lambda form: form.name)
def test_sizes_around_rows_and_tasks(form):
    for size in SIZES:
        x = normal(size)
        assert_same_encoding(x, largest_code_at_maximum(x, form), form, "stochastic", "stochastic", sample=2**16 - 1)
        assert_same_encoding(x.bfloat16(), torch.tensor(0.1), form, "nearest", "flush", observe=False)
    images = normal(3, 5, 120, 75)  # several rows an image, and more than one task
    for x in (images.to(memory_format=LAST), images[..., :31].to(memory_format=LAST)):
        assert_same_encoding(x, torch.tensor(0.03), form, "stochastic", "stochastic")
        assert_same_encoding(x.bfloat16(), torch.tensor(0.03), form, "nearest", "nearest")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_codes_of_every_dtype(dtype):
    kinds, names = tensors(), ("vector", "aligned", "unaligned", "half image", "bfloat16", "empty")
    for form, name in product((INT4, E3M0, E2M1), names):
        for packed, observe in product((True, False), repeat=2):
            how = {"dtype": dtype, "packed": packed, "observe": observe}
            assert_same_encoding(kinds[name], torch.tensor(0.02), form, "stochastic", "stochastic", **how)
            assert_same_encoding(kinds[name], torch.tensor(0.02), form, "nearest", "flush", **how)


@BACKENDS
def test_non_finite_elements_get_code_0(backend):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -torch.nan])
    for form in (INT4, E3M0, E2M1):
        how = torch.tensor(1.0), torch.tensor(True), encoding(form, "stochastic", "stochastic"), STREAM
        assert backend.encode(x, *how)[0].tolist() == [0, 0, 0, 1, 0]


@BACKENDS
@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (3, 7, 5, 3), (1, 2, 1, 3)])
def test_channels_last_gives_the_codes_of_its_contiguous_twin(backend, shape):
    x = torch.randn(shape)
    for form in (INT4, E3M0, E2M1):
        how = x.abs().max() / form.limit, torch.tensor(True), encoding(form, "stochastic"), make_stream(3)
        twin, *_ = backend.encode(x, *how)
        codes, *_ = backend.encode(x.to(memory_format=LAST), *how)
        assert torch.equal(codes, twin)
        assert codes.is_contiguous(memory_format=LAST)


# Statistics


@pytest.mark.parametrize("name", list(tensors()))
def test_numba_gives_the_statistics_of_the_reference(name):
    x = tensors()[name]
    for moments in (True, False):
        expected, found = reference.statistics(x, moments), cpu.statistics(x, moments)
        assert found.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_statistics_of_sizes_around_rows_and_tasks():
    for size in SIZES[1:]:
        x = normal(size)
        x[-1] = -1e4  # every element counts, the last one too
        for each in (x, x.bfloat16()):
            assert torch.equal(cpu.statistics(each, True), reference.statistics(each, True))


def test_statistics_of_what_is_not_dense():
    x = normal(3, 16, 40, 41).to(memory_format=LAST)
    for each in (x[:, :, ::2], x[:, 1:], x.transpose(0, 1)):
        assert torch.equal(cpu.statistics(each, True), reference.statistics(each, True))


def test_sums_are_those_of_their_terms():
    for size in SIZES:
        terms = normal(size).double().abs()
        assert reference.add_up(terms).item() == pytest.approx(math.fsum(terms.tolist()), rel=1e-14)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_negative_element_counts_and_no_other(backend, dtype):
    smallest = {torch.float32: -(2.0**-149), torch.bfloat16: -(2.0**-133)}[dtype]
    for value, negative in ((smallest, 1), (-3e38, 1), (-torch.inf, 1), (-1.0, 1), (-0.0, 0), (-torch.nan, 0), (1, 0)):
        x = torch.full((40,), 2.0, dtype=dtype)
        x[17] = value
        if value != value:
            x = x.view(INT_OF_SIZE[dtype.itemsize])
            x[17] |= -(1 << (8 * dtype.itemsize - 1))  # its sign, whatever became of it
            x = x.view(dtype)
        found = backend.statistics(x, False)
        assert found[1] == negative, value
        assert torch.equal(found[0].isnan(), x[17].isnan())


@BACKENDS
def test_statistics_are_what_they_say(backend):
    x = torch.tensor([[1.0, -3.0], [0.5, -0.0]])
    assert backend.statistics(x, True).tolist() == [3.0, 1.0, 4.5, 10.25]
    assert backend.statistics(x.abs(), True).tolist() == [3.0, 0.0, 4.5, 10.25]
    assert backend.statistics(x, False).tolist() == [3.0, 1.0, 0.0, 0.0]
    assert backend.statistics(torch.tensor([-0.0]), True).tolist() == [0.0] * 4
    assert backend.statistics(torch.tensor([1.0, torch.nan, torch.inf]), False)[0].isnan()
    assert backend.statistics(torch.tensor([1.0, -torch.inf]), False)[0].isinf()
    # Not read where there is an estimate.
    assert backend.statistics(x, True, torch.tensor(2.0)).tolist() == [0.0] * 4
    for none_yet in (0.0, torch.nan):
        assert backend.statistics(x, True, torch.tensor(none_yet)).tolist() == [3.0, 1.0, 4.5, 10.25]


# Packing


@pytest.mark.parametrize("form", COMPILED, ids=lambda form: form.name)
def test_packing_and_unpacking(form):
    for signed, (images, channels, height, width) in product(
        (True, False), ((1, 1, 1, 1), (1, 3, 1, 1), (3, 5, 7, 5), (2, 8, 4, 4), (2, 5, 30, 41), (0, 3, 2, 2))
    ):
        levels = torch.tensor(form.levels(signed))
        contiguous = levels[torch.randint(len(levels), (images, channels, height, width))].to(form.code_dtype)
        for codes in (contiguous, contiguous.to(memory_format=LAST), contiguous.flatten(), contiguous[..., ::2]):
            fields = reference.pack(codes, form)
            in_order = form.to_fields(in_memory_order(codes).reshape(-1))
            assert torch.equal(fields, pack(in_order, form.field_bits))
            for dtype in (form.code_dtype, torch.float32):
                assert_identical(cpu.pack(codes.to(dtype), form), fields)
            last = is_channels_last(codes)
            for dtype in (torch.int8, torch.int16, torch.int32, torch.bfloat16, torch.float16, torch.float32):
                if dtype == torch.int8 and form.code_dtype != torch.int8:
                    continue
                how = fields, codes.shape, last, torch.tensor(signed), form, dtype
                found = cpu.unpack(*how)
                assert_identical(found, reference.unpack(*how))
                assert torch.equal(found, codes.to(dtype))


def test_packing_of_sizes_around_rows_and_tasks():
    for size, form in product(SIZES, (INT4, E2M1, FORMATS["e3m0_div128"])):
        levels = torch.tensor(form.levels())
        codes = levels[torch.randint(len(levels), (size,))].to(form.code_dtype)
        fields = cpu.pack(codes, form)
        assert_identical(fields, reference.pack(codes, form))
        assert torch.equal(cpu.unpack(fields, (size,), False, torch.tensor(True), form, form.code_dtype), codes)


# ReLU


RELU_EDGES = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 2.0**-149, -(2.0**-149), 3e38, -3e38, 1.0, -1.0]
RELU_EDGES += [6.0, -6.0, 5.96875, 6.03125]  # neighbours of 6 in bf16


@pytest.mark.parametrize("most", [None, 6.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_and_its_backward(dtype, most):
    images = normal(3, 5, 7, 5)
    for values in (
        *(normal(size) for size in SIZES),
        torch.tensor(RELU_EDGES),
        torch.tensor(RELU_EDGES).repeat(ROW // 4)[: ROW + 13],
        normal(1)[0],
        images,
        images.to(memory_format=LAST),
        images.transpose(0, 1).contiguous()[1:],
    ):
        x = (2 * values).to(dtype)
        expected, found = x.clone(), x.clone()
        mask = cpu.relu_(found, most)
        assert_identical(mask, reference.relu_(expected, most))
        assert torch.equal(found.isnan(), x.isnan())
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, x.clamp(0, most), rtol=0, atol=0, equal_nan=True)
        grad, last = normal(*x.shape, seed=2).to(dtype), is_channels_last(x)
        for each in (
            (grad, grad.to(memory_format=LAST) if x.dim() == 4 else grad, grad[..., :1].expand(x.shape))
            if (x.dim())
            else (grad,)
        ):
            backward = cpu.relu_backward(each, mask, last)
            assert_identical(
                backward, reference.relu_backward(each.to(memory_format=LAST) if last else each, mask, last)
            )
            beyond = x >= most if most else torch.zeros_like(x, dtype=torch.bool)
            assert torch.equal(backward, torch.where((x <= 0) | beyond, 0, each))


def test_relu_leaves_its_neighbours_alone():
    for dtype in (torch.float32, torch.bfloat16):
        base = -torch.ones(40, dtype=dtype)
        cpu.relu_(base[3:32])
        assert base.tolist() == [-1.0] * 3 + [0.0] * 29 + [-1.0] * 8


# What goes with them


def test_inputs_stay_as_they_are():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    before, stream, scale = x.detach().clone(), make_stream(1), torch.tensor(0.1)
    for backend, form in product((reference, cpu), (INT4, E3M0)):
        how = encoding(form, "stochastic"), stream
        codes, fields, _ = backend.encode(x, scale, torch.tensor(True), *how, 0, torch.float32, True, True)
        assert not codes.requires_grad
        assert not backend.statistics(x, True).requires_grad
        kept, fields_kept = codes.clone(), fields.clone()
        backend.pack(codes, form)
        backend.unpack(fields, x.shape, False, torch.tensor(True), form, torch.float32)
        backend.relu_backward(codes, torch.zeros(12, dtype=torch.uint8), False)
        assert torch.equal(codes, kept)
        assert torch.equal(fields, fields_kept)
    assert torch.equal(stream, make_stream(1))
    assert scale == 0.1
    assert torch.equal(x, before)


def test_backends_are_chosen_by_device_and_by_environment(monkeypatch):
    choose = kernels.choose_backend
    monkeypatch.delenv("LUQRUN_KERNELS", raising=False)
    assert choose("cpu") is cpu
    assert "numba" in kernels.describe("cpu")
    monkeypatch.setenv("LUQRUN_KERNELS", "reference")
    assert choose("cpu") is reference
    monkeypatch.setenv("LUQRUN_KERNELS", "fast")
    with pytest.raises(UserError, match=r"LUQRUN_KERNELS=fast.*reference"):
        choose("cpu")
    monkeypatch.setenv("LUQRUN_KERNELS", "cpu")
    with pytest.raises(UserError, match="cuda"):
        choose("cuda")


def test_a_device_without_kernels_of_its_own_is_warned_of(monkeypatch, caplog):
    monkeypatch.delenv("LUQRUN_KERNELS", raising=False)
    assert kernels.choose_backend("mps") is reference
    assert "no kernels for mps" in caplog.text
    caplog.clear()
    assert kernels.choose_backend("meta") is reference
    monkeypatch.setenv("LUQRUN_KERNELS", "reference")
    assert kernels.choose_backend("mps") is reference
    assert not caplog.text
