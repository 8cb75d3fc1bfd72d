"""The division of the compiled loops against IEEE's, where it is hardest, and the codes that hang on it."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from kernel_inputs import assert_identical
from numba import njit

from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.encode import is_swift, quotient
from luqrun.quant.kernels.cpu.rows import HAS_FMA
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer

SWIFT = [2.0**-40, 2.0**-39 * 1.7, 2.0**-20 / 3, 1.0, 1.3, float(np.nextafter(np.float32(2), np.float32(0))), 2.0**40]
SLOW = [2.0**-149, 2.0**-127, 2.0**-41, 2.0**-40 * (1 - 2.0**-24), 2.0**40 * (1 + 2.0**-23), 2.0**127, np.inf, np.nan]

fused = pytest.mark.skipif(not HAS_FMA, reason="this CPU has no fused multiply-add: it divides")


@njit(error_model="numpy")
def quotients(x, scale, out):
    for j in range(x.size):
        out[j] = quotient(x[j], scale[j], np.float32(1) / scale[j])


def assert_rounds_as_a_division(x, scale):
    out = np.empty_like(x)
    quotients(x, scale, out)
    wrong = out.view(np.int32) != (x / scale).view(np.int32)
    assert not wrong.any(), (wrong.sum(), x[wrong][:3].tolist(), scale[wrong][:3].tolist())


@njit
def inverse_of_odd(number):
    """Modulo 2^64, by Newton's iteration."""
    inverse = np.uint64(number)
    for _ in range(5):
        inverse *= np.uint64(2) - np.uint64(number) * inverse
    return inverse


@njit(error_model="numpy")
def quotients_next_to_a_middle(first, stop, nearest):
    """(tried, wrong) of the quotients x / scale, both of 24 bits, with first <= scale < stop, that are nearest / scale
    halves of a unit in the last place or less from the middle of two floats.

    That is |x 2^k - scale middle| <= nearest for an odd middle of 25 bits: for each difference one congruence.
    """
    tried, wrong = 0, 0
    for scale in range(first, stop):
        zeros = 0
        while (scale >> zeros) % 2 == 0:
            zeros += 1
        inverse = inverse_of_odd(scale >> zeros)
        for difference in range(-nearest, nearest + 1):
            if difference == 0 or difference % (1 << zeros) != 0:
                continue
            for k in (24, 25):
                modulus = np.int64(1) << (k - zeros)
                middle = np.int64(np.uint64(-difference >> zeros) * inverse & np.uint64(modulus - 1))
                if middle % 2 == 0:
                    continue
                middle += ((1 << 24) - middle + modulus - 1) // modulus * modulus
                while middle < 1 << 25:
                    x = (scale * middle + difference) >> k
                    if x << k == scale * middle + difference and x >= 1 << 23 and x < 1 << 24:
                        found = quotient(np.float32(x), np.float32(scale), np.float32(1) / np.float32(scale))
                        tried += 1
                        wrong += found * np.float32(2.0 ** (k - 1)) != (middle >> 1) + (difference > 0)
                    middle += modulus
    return tried, wrong


@fused
def test_every_quotient_next_to_the_middle_of_two_floats():
    # Before its last rounding the quotient is off by 2^-46 of itself, so that the difference would have to be
    # 2^-46 2^24 2^25 = 8 or less.
    tried, wrong = quotients_next_to_a_middle(1 << 23, 1 << 24, 9)
    assert tried > 5e7
    assert wrong == 0


@fused
def test_quotients_anywhere():
    rng = np.random.default_rng(1)
    x, scale = rng.integers(2**23, 2**24, (2, 3_000_000)).astype(np.float32)
    assert_rounds_as_a_division(x, scale)


@fused
def test_quotients_at_the_ends_of_what_is_promised():
    rng = np.random.default_rng(2)
    for low, high in ((-60, -59), (-40, -20), (-3, 8), (59, 60)):
        for end in (-40, 0, 39):
            mantissa, scale = (1 + rng.random((2, 300_000))).astype(np.float32)
            x = np.ldexp(mantissa, rng.integers(low, high, scale.size) + end)
            assert_rounds_as_a_division(x, np.ldexp(scale, end))


@fused
def test_smaller_quotients_stay_small():
    for scale in SWIFT:
        x = np.array([0.0, 2.0**-149, 2.0**-140 * 3, 2.0**-126, scale * 2.0**-61, scale * 2.0**-90], np.float32)
        out = np.empty_like(x)
        quotients(x, np.full_like(x, scale), out)
        assert out[0] == 0
        assert (abs(out[np.float64(x) / scale < 2.0**-60]) < 2.0**-50).all()


@fused
def test_scales_for_which_it_does_not_hold_are_divided_by():
    assert all(is_swift(np.float32(scale)) for scale in SWIFT)
    assert not any(is_swift(np.float32(scale)) for scale in SLOW)


@pytest.mark.parametrize("form", ["int4", "e3m0", "e2m1"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codes_of_elements_on_the_edge(form, rounding):
    # Beside every multiple of half a scale, beyond the largest code, and between powers of two.
    form, rng = FORMATS[form], np.random.default_rng(3)
    quantizer, stream = Quantizer(form.name, rounding=rounding), make_stream(5)
    halves = torch.arange(-150, 151) / 2
    edges = torch.cat([halves, 1e6 * halves, 2.0 ** -torch.arange(40)]).repeat(7)
    for scale in torch.tensor([*SWIFT, *SLOW[:6], *np.ldexp(1 + rng.random(40), rng.integers(-42, 42, 40))]).float():
        largest = form.limit * scale
        measured, signed, _ = quantizer.measure(torch.stack([largest, -largest]))  # may be scale's neighbour
        x = edges * measured
        x = torch.cat([x, x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(torch.inf))])
        inside = torch.cat([x[x.abs() <= largest], largest[None], -largest[None]])
        how = measured, signed, quantizer.encoding, stream
        assert_identical(cpu.encode(x, *how)[0], reference.encode(x, *how)[0], scale)
        found = quantizer.run(inside, stream, None, form.code_dtype)
        assert_identical(found.scale, measured)
        assert_identical(found.codes, reference.encode(inside, *how)[0], scale)


ENCODE = """
import numpy as np
import torch
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import encode, rows
from luqrun.quant.kernels.philox import make_stream

assert not rows.HAS_FMA
x, stream, scale = torch.randn(5000), make_stream(3), np.float32(0.06)
words, found = reference.random_words(stream, 0, x.numel()).numpy().astype(np.uint32), np.zeros(5000, np.int8)
bits, drawn = x.numpy().view(np.int32), rows.STOCHASTIC
for name, rounding, underflow in (("e3m0", "stochastic", "stochastic"), ("int4", "nearest", None)):
    form = FORMATS[name]
    low, high = np.float32(-form.limit), np.float32(form.limit)
    if form.logarithmic:
        encode.powers(bits, found, words, scale, high, drawn, drawn, False)
    else:
        encode.integers(bits, found, words, scale, low, high, rows.NEAREST, False)
    how = torch.tensor(scale), torch.tensor(True), Encoding(name, rounding=rounding, underflow=underflow), stream
    assert torch.equal(torch.from_numpy(found), reference.encode(x, *how)[0])
"""


def run_elsewhere(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_a_cpu_without_fused_multiply_adds_divides(tmp_path):
    done = run_elsewhere(ENCODE, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_there_are_no_kernels():
    done = run_elsewhere("from luqrun.quant.kernels import backend_for; backend_for('cpu')", NUMBA_DISABLE_JIT="1")
    assert "UserError: NUMBA_DISABLE_JIT" in done.stderr
    assert "LUQRUN_KERNELS=reference" in done.stderr


def test_loops_that_cannot_be_kept_are_compiled_all_the_same(monkeypatch, caplog):
    # numba looks for a folder when a loop is declared; a read-only one is none.
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available for file 'double.py'")
        return numba.njit(**options)

    monkeypatch.setattr(rows, "njit", njit)
    rows.warn_of_no_cache.cache_clear()
    double = rows.row_loop()(lambda x: 2 * x)
    rows.row_loop()(lambda x: x)
    assert double(21) == 42
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1
