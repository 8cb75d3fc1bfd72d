"""Philox against published vectors and NumPy, in torch and in the loops of the CPU, far beyond 32 bits too."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from luqrun.quant.kernels import philox
from luqrun.quant.kernels.cpu import philox as numba_philox
from luqrun.quant.kernels.cpu.sizes import LANES
from luqrun.quant.kernels.philox import (
    GEMM_NUMBERS,
    RANKS,
    STREAM_FIELDS,
    make_stream,
    of_gemm,
    random_words,
    stream_words,
)

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


def numba_words(first, count, name):
    """The words of Philox counters first .. first + count - 1, a row each, as the loop over a row draws them."""
    words = np.empty(2 * count, np.uint64)
    numba_philox.fill_words(words, first, count, np.array(name, np.uint64))
    return words.view(np.uint32).reshape(count, 4)


def numba_pixels(first, step, pixels, channels, name):
    """The words of (pixels, channels) elements, in groups of four pixels, as the loop over an image draws them."""
    drawn, groups = np.empty((pixels, channels), np.uint32), pixels // 4 * channels
    counters, words = np.empty(groups + 3, np.uint64), np.empty((4, groups + 3), np.uint32)
    numba_philox.fill_pixels(drawn, counters, words, first, step, np.array(name, np.uint64))
    return drawn


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
    stream = make_stream(2**62 + 3, 5, 1, 2**32 - 1, 2, 6)
    name = [int(word) for word in stream_words(stream, 17)]
    assert numba_philox.stream_words(stream.numpy(), 17).tolist() == name
    expected = random_words(stream, 17, 240)
    assert numba_words(0, 10, name).reshape(-1).tolist() == expected[:40].tolist()
    assert numba_words(3, 2, name).reshape(-1).tolist() == expected[12:20].tolist()


@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_words_drawn_together_and_what_is_left_of_them(together, more):
    name = [3, 2**32 - 1, 2**31, 5]
    count = together * numba_philox.TOGETHER + more
    group = 2**32 * 7 + 11 + np.arange(count, dtype=np.uint64)
    counter = (group & MASK, group >> np.uint64(32), name[2], name[3])
    expected = np.stack(np.broadcast_arrays(*numpy_philox(counter, name[:2])), 1)
    assert numba_words(int(group[0]), count, name).tolist() == expected.tolist()


@pytest.mark.parametrize("channels", [5, LANES, 3 * LANES])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_words_of_pixels(rows, channels):
    stream = make_stream(2**62 + 3, 5, 1, 2**32 - 1, 2, 6)
    name = [int(word) for word in stream_words(stream, 17)]
    # 4 * rows pixels, in the middle of images of 48: element = channel * 48 + pixel.
    elements = 48 * torch.arange(channels) + torch.arange(12, 12 + 4 * rows)[:, None]
    expected = random_words(stream, 17, 48 * channels)[elements]
    assert numba_pixels(3, 12, 4 * rows, channels, name).tolist() == expected.tolist()


@pytest.mark.parametrize("first", [2**29 - 1, 2**31 - 2, 2**32 - 2, 2**32, 5 * 2**32 + 7, 2**40])
def test_counters_beyond_32_bits_carry_into_the_second_word(first):
    name = [0x12345678, 0x9ABCDEF0, 0xDEADBEEF, 0xFFFFFFFE]

    def expected(step, count=4):
        group = first + step * np.arange(count, dtype=np.uint64)
        counter = (group & MASK, group >> np.uint64(32), name[2], name[3])
        words = [word.tolist() for word in numpy_philox(counter, name[:2])]
        assert torch_philox([np.asarray(word).astype(np.int64) for word in counter], name[:2]) == words
        return words

    assert numba_words(first, 4, name).T.tolist() == expected(1)
    assert numba_pixels(first, 3, 4, 4, name).tolist() == expected(3)
    far = 2**33 + 1  # channels so far apart that their numbers alone leave 32 bits
    assert numba_pixels(first, far, 4, 4, name).tolist() == expected(far)
    together = numba_philox.TOGETHER + 1
    assert numba_words(first, together, name).T.tolist() == expected(1, together)
    assert numba_pixels(first, 3, 4, LANES, name).tolist() == expected(3, LANES)


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


def test_a_gemms_own_draw_has_a_name_of_its_own():
    stream = make_stream(5, 3, 2, 7, 1, rank=RANKS - 1)
    names = [stream, *(of_gemm(stream, gemm) for gemm in GEMM_NUMBERS), make_stream(5, 3, 2, 7, 1, rank=0)]
    words = {tuple(word.item() for word in stream_words(name, sample)) for name in names for sample in (0, 63)}
    assert len(words) == 2 * len(names)
    assert torch.equal(stream, make_stream(5, 3, 2, 7, 1, rank=RANKS - 1))  # as it was
