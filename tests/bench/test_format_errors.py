"""Errors and biases of quantizers on whole tensors: what is known of them comes out."""

import math

import pytest
import torch
from torch import nn

from luqrun.bench import format_errors
from luqrun.bench.format_errors import PUBLISHED, QUANTIZERS, XI_GAIN, closed_gain
from luqrun.quant.quantizer import Quantizer


@pytest.fixture(scope="module")
def normal():
    """Of each quantizer on 2^17 normal numbers."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    return {each.quantizer: each for each in format_errors.format_errors({"N(0, 1)": x})}


def test_published_errors_come_out(normal):
    for label, published in PUBLISHED.items():
        assert abs(normal[label].mse / published - 1) < 0.04, label  # of 2^17 numbers: they scatter by 1 % or so


def test_what_is_drawn_without_a_bias_has_none_and_what_clips_has_one(normal):
    # One family of 10 or so z-tests: |z| > 5 is a false alarm once in 10^5.
    for label, keys in QUANTIZERS.items():
        if closed_gain(Quantizer(**keys)) == 1.0 and not keys.get("eden"):
            assert abs(normal[label].z) < 5, label
            assert abs(normal[label].gain - 1) < 0.01, label
    for label in ("mxfp4, floor, stochastic", "nvfp4, stochastic", "nvfp4, four over six, 16/17, stochastic"):
        assert abs(normal[label].z) > 5, label
        assert normal[label].closed_gain is None, label


def test_the_gain_of_xi_is_the_integral_of_its_rounding(normal):
    steps = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    fraction, noise = steps[:, None], steps[None] + math.log(4 / 3) - 0.5
    assert abs(torch.exp2((fraction + noise).floor() - fraction).mean() - XI_GAIN) < 1e-3
    assert abs(normal["e3m0, as Xi et al. coded it"].gain - XI_GAIN) < 0.005


def test_values_and_bits(normal):
    found = {label: (each.values, each.bits) for label, each in normal.items()}
    assert found["e3m0, LUQ"] == (15, 4)
    assert found["e3m0, LUQ's supplement"] == (17, 5)
    assert found["e3m0, as Xi et al. coded it"] == (21, 5)
    assert found["mxfp4, floor"] == (15, 4.25)
    assert found["nvfp4, hadamard 128"] == (15, 4.5)


def test_a_layers_tensors_are_what_its_step_saw():
    layer = nn.Conv2d(64, 64, 1)
    model, x = nn.Sequential(layer), torch.randn(2, 64, 2, 2)
    tensors = format_errors.real(model, "0", lambda: model(x).square().sum().backward())
    assert list(tensors) == ["weights", "activations", "gradients"]
    assert [each.shape for each in tensors.values()] == [(32, 128), (4, 128), (4, 128)]
    for each in tensors.values():
        assert abs(each.square().mean() - 1) < 1e-5
    seen = x.movedim(1, -1).reshape(4, 128)
    torch.testing.assert_close(tensors["activations"], seen / seen.square().mean().sqrt())


def test_the_tables_are_readable(normal):
    text = format_errors.markdown(list(normal.values()))
    assert text.startswith("**N(0, 1)**")
    assert "| nvfp4 | 15 | 4.5 | 9." in text
    assert len(text.splitlines()) == len(normal) + 4
