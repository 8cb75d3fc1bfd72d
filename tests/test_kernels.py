"""Philox against published vectors and NumPy; the numba kernels against the reference, bit for bit."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from luqrun import kernels
from luqrun.errors import UserError
from luqrun.formats import FORMATS
from luqrun.kernels import cpu, philox, reference
from luqrun.kernels.philox import STREAM_FIELDS, make_stream, random_words, stream_words

MASK = np.uint64(0xFFFFFFFF)

# Random123 (Salmon et al. 2011), kat_vectors: philox4x32 10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


def numpy_philox(counter, key):
    """Philox4x32-10 after the paper, on uint64 arrays: 4 counter words and 2 key words -> 4 words."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for round_number in range(10):
        if round_number:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (right >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            right & MASK,
            (left >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            left & MASK,
        )
    return c0, c1, c2, c3


def torch_philox(counter, key):
    as_tensors = [torch.tensor(word, dtype=torch.int64) for word in (*counter, *key)]
    return [word.tolist() for word in philox.philox(tuple(as_tensors[:4]), tuple(as_tensors[4:]))]


def numba_rows(first, count, name):
    """The words of Philox counters first .. first + count - 1, a row each, as the flat numba kernel draws them."""
    words = np.empty(4 * count, np.uint32)
    cpu._fill_words(words, np.int64(first), count, np.array(name, np.uint32))
    return words.reshape(count, 4)


def numba_columns(first, step, count, name):
    """The words of counters first + j * step, a row each, as the channels_last kernel draws them."""
    words = np.empty((4, count), np.uint32)
    cpu._fill_pixels(*words, np.int64(first), step, np.array(name, np.uint32))
    return words.T


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    counter, key, answer = words_of(counter), words_of(key), words_of(answer)
    assert torch_philox(counter, key) == answer
    assert [int(word) for word in numpy_philox(counter, key)] == answer


@pytest.mark.parametrize("numel", [0, 1, 4, 103])
def test_words_of_a_draw_follow_the_documented_counters(numel):
    seed, layer, operand, step, micro_step, rank, sample = 2**61 + 12345, 77, 2, 2**31 + 5, 3, 9, 41
    stream = make_stream(seed, layer, operand, step, micro_step, rank)
    low, high = seed % 2**32, seed >> 32
    name = numpy_philox((layer * 4 + operand, step, micro_step, rank * 2**16 + sample), (low, high))
    assert [int(word) for word in stream_words(stream, sample)] == [int(word) for word in name]
    k0, k1, c2, c3 = (int(word) for word in name)
    group = np.arange((numel + 3) // 4, dtype=np.uint64)
    words = np.stack(np.broadcast_arrays(*numpy_philox((group, 0 * group, c2, c3), (k0, k1))), 1).reshape(-1)[:numel]
    assert random_words(stream, sample, numel).tolist() == words.tolist()


def test_numba_draws_the_words_of_the_reference():
    name = [int(word) for word in stream_words(make_stream(2**62 + 3, 5, 1, 8, 2, 6), 17)]
    assert cpu._stream_words(make_stream(2**62 + 3, 5, 1, 8, 2, 6).numpy(), 17).tolist() == name
    expected = random_words(make_stream(2**62 + 3, 5, 1, 8, 2, 6), 17, 40).view(10, 4)
    assert numba_rows(0, 10, name).tolist() == expected.tolist()


@pytest.mark.parametrize("first", [2**32 - 2, 2**32, 5 * 2**32 + 7])
def test_counters_beyond_32_bits_carry_into_the_second_word(first):
    name = [0x12345678, 0x9ABCDEF0, 0xDEADBEEF, 0xFFFFFFFE]

    def expected(step):
        group = first + step * np.arange(4, dtype=np.uint64)
        counter = (group & MASK, group >> np.uint64(32), name[2], name[3])
        words = [word.tolist() for word in numpy_philox(counter, name[:2])]
        assert torch_philox([np.asarray(word).astype(np.int64) for word in counter], name[:2]) == words
        return words

    assert numba_rows(first, 4, name).T.tolist() == expected(1)
    assert numba_columns(first, 3, 4, name).T.tolist() == expected(3)


@pytest.mark.parametrize("offset", [2**32 - 2, 3 * 2**32])
def test_elements_beyond_2_to_the_34_take_their_own_counters(offset, monkeypatch):
    stream, arange = make_stream(5), torch.arange
    k0, k1, c2, c3 = (int(word) for word in stream_words(stream, 0))
    group = np.arange(4, dtype=np.uint64) + np.uint64(offset)
    expected = np.stack(np.broadcast_arrays(*numpy_philox((group & MASK, group >> np.uint64(32), c2, c3), (k0, k1))), 1)
    # Number the elements as if they lay behind 4 * offset others.
    monkeypatch.setattr(torch, "arange", lambda *arguments, **options: arange(*arguments, **options) + offset)
    assert random_words(stream, 0, 16).view(4, 4).tolist() == expected.tolist()


def test_every_part_of_a_name_changes_every_word():
    base = dict.fromkeys(STREAM_FIELDS, 1)
    draws = [random_words(make_stream(**base), 1, 64), random_words(make_stream(**base), 2, 64)]
    draws += [random_words(make_stream(**{**base, field: 2}), 1, 64) for field in STREAM_FIELDS]
    draws.append(random_words(make_stream(**{**base, "seed": 1 + 2**40}), 1, 64))
    # Two words of 32 bits are equal by chance once in 2^32: false-alarm rate 36 * 64 / 2^32 < 1e-6 for the family.
    assert all((a != b).all() for a, b in combinations(draws, 2))


def test_names_of_one_seed_never_share_words():
    values = {"layer": 3, "operand": 3, "step": 3, "micro_step": 3, "rank": 2}
    names = [
        tuple(int(word) for word in stream_words(make_stream(5, **dict(zip(values, fields, strict=True))), sample))
        for *fields, sample in product(*map(range, values.values()), range(3))
    ]
    assert len(set(names)) == len(names) == 3**4 * 2 * 3


def test_words_are_uniform():
    # Mean of 2^16 uniform words: standard error 1 / sqrt(12 * 2^16); |z| > 5 by chance at a rate below 1e-6.
    words = random_words(make_stream(0), 0, 2**16).double() / 2**32
    assert abs(words.mean() - 0.5) * (12 * 2**16) ** 0.5 < 5
    assert words.min() >= 0
    assert words.max() < 1


def tensors():
    """Name -> a tensor of each kind that kernels meet."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 4

    odd = normal(301)
    odd[::7], odd[3], odd[5], odd[6] = 0.0, float("nan"), float("inf"), -float("inf")
    odd[8] = -0.0
    last = torch.channels_last
    return {
        "vector": normal(1031),
        "unsigned": normal(257).abs(),
        "aligned": normal(2, 5, 4, 6).to(memory_format=last),
        "unaligned": normal(3, 5, 3, 7).to(memory_format=last),
        "pixel": normal(3, 7, 1, 1).to(memory_format=last),
        "one channel": normal(2, 1, 3, 3).to(memory_format=last),
        "image of many": normal(4, 3, 6, 6).to(memory_format=last)[1:3],
        "cropped": normal(2, 3, 6, 6).to(memory_format=last)[:, :, 1:, :5],
        "fewer channels": normal(2, 6, 4, 4).to(memory_format=last)[:, :3],
        "slice": normal(40, 9)[:, ::2],
        "transposed": normal(31, 17).t(),
        "expanded": normal(5, 1).expand(5, 6),
        "permuted": normal(2, 3, 4, 5, 2).permute(4, 0, 3, 1, 2),
        "one": normal(1),
        "scalar": normal(1)[0],
        "empty": normal(0),
        "empty images": normal(0, 3, 4, 4).to(memory_format=last),
        "zeros": torch.zeros(13),
        "half": normal(55).half(),
        "bfloat16": normal(2, 3, 5, 5).bfloat16().to(memory_format=last),
        "double": normal(55).double(),
        "subnormal": normal(99) * 2.0**-140,
        "huge": normal(99) / normal(99).abs().max() * 3e37,
        "non-finite": odd,
    }


def assert_same_codes(x, scale, form, rounding, underflow, sample=0):
    signed = (x < 0).any() | form.logarithmic
    arguments = (x, scale, signed, form, rounding, underflow, make_stream(11, 3, 2, 7, 1, 4), sample)
    expected, codes = reference.encode(*arguments), cpu.encode(*arguments)
    assert codes.dtype == expected.dtype == form.code_dtype
    assert torch.equal(codes, expected)
    return codes


def largest_code_at_maximum(x, form):
    finite = x.float()[x.isfinite()]
    return finite.abs().max() / form.limit if finite.numel() else torch.tensor(1.0)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_numba_gives_the_codes_of_the_reference(form):
    underflows = ("flush", "nearest", "stochastic") if form.logarithmic else (None,)
    variants = list(product(("nearest", "stochastic"), underflows))
    for x in tensors().values():
        scale = largest_code_at_maximum(x, form)
        for rounding, underflow in variants:
            codes = assert_same_codes(x, scale, form, rounding, underflow)
            assert set(codes.unique().tolist()) <= set(form.levels()) | set(form.levels(False))
    x = tensors()["vector"]
    ties = torch.tensor([0.25, 0.5, 0.75, 1, 1.5, 2.5, 3, 6, 12, 24, 48, 96, form.limit])
    for rounding, underflow in variants:
        assert_same_codes(torch.cat([ties, -ties]), torch.tensor(1.0), form, rounding, underflow)
        for factor in (0.3, 1e-30, 1e30):
            assert_same_codes(x, largest_code_at_maximum(x, form) * factor, form, rounding, underflow, sample=5)
        for void in (0.0, torch.nan):
            assert not assert_same_codes(x, torch.tensor(void), form, rounding, underflow).any()


@pytest.mark.parametrize("name", ["int4", "e3m0"])
def test_numba_gives_the_codes_of_the_reference_across_tasks(name):
    form = FORMATS[name]
    x = torch.randn(2, cpu.CHUNK // 2 + 333)
    assert_same_codes(x, largest_code_at_maximum(x, form), form, "stochastic", "stochastic")


def test_non_finite_elements_get_code_0():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    for backend, form in product((reference, cpu), (FORMATS["int4"], FORMATS["e3m0"])):
        codes = backend.encode(
            x, torch.tensor(1.0), torch.tensor(True), form, "stochastic", "stochastic", make_stream()
        )
        assert codes.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", list(tensors()))
def test_numba_gives_the_statistics_of_the_reference(name):
    x = tensors()[name]
    for moments in (True, False):
        expected, found = reference.statistics(x, moments), cpu.statistics(x, moments)
        assert found.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found[2:], expected[2:], rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
def test_statistics_are_what_they_say(backend):
    x = torch.tensor([[1.0, -3.0], [0.5, -0.0]])
    assert backend.statistics(x, True).tolist() == [3.0, 1.0, 4.5, 10.25]
    assert backend.statistics(x.abs(), True).tolist() == [3.0, 0.0, 4.5, 10.25]
    assert backend.statistics(x, False).tolist() == [3.0, 1.0, 0.0, 0.0]
    assert backend.statistics(torch.tensor([-0.0]), True).tolist() == [0.0] * 4
    assert backend.statistics(torch.tensor([1.0, torch.nan, torch.inf]), False)[0].isnan()
    assert backend.statistics(torch.tensor([1.0, -torch.inf]), False)[0].isinf()


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (3, 7, 5, 3), (1, 2, 1, 3)])
def test_channels_last_gives_the_codes_of_its_contiguous_twin(backend, shape):
    x = torch.randn(shape)
    for form, signed in ((FORMATS["int4"], True), (FORMATS["e3m0"], True)):
        scale = x.abs().max() / form.limit
        rest = (scale, torch.tensor(signed), form, "stochastic", "stochastic", make_stream(3))
        twin = backend.encode(x, *rest)
        codes = backend.encode(x.to(memory_format=torch.channels_last), *rest)
        assert torch.equal(codes, twin)
        assert codes.is_contiguous(memory_format=torch.channels_last)


def test_codes_do_not_depend_on_the_number_of_threads():
    import numba

    x = torch.randn(200_000)
    arguments = (x, x.abs().max() / 64, torch.tensor(True), FORMATS["e3m0"], "stochastic", "stochastic", make_stream(1))
    threads = numba.get_num_threads()
    codes, found = cpu.encode(*arguments), cpu.statistics(x, True)
    numba.set_num_threads(1)
    try:
        assert torch.equal(cpu.encode(*arguments), codes)
        assert torch.equal(cpu.statistics(x, True), found)
    finally:
        numba.set_num_threads(threads)


def test_inputs_stay_as_they_are():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    before = x.detach().clone()
    for backend in (reference, cpu):
        stream = make_stream(1)
        codes = backend.encode(x, torch.tensor(0.1), torch.tensor(True), FORMATS["int4"], "stochastic", None, stream, 0)
        assert not codes.requires_grad
        assert not backend.statistics(x, True).requires_grad
        assert torch.equal(stream, make_stream(1))
    assert torch.equal(x, before)


def test_backends_are_chosen_by_device_and_by_environment(monkeypatch):
    choose = kernels.backend_for.__wrapped__
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
