"""Which quantizers with blocks are unbiased under stochastic rounding, and which are not: z-tests.

The z-tests of unbiasedness are one family: 10^-4 is the chance that any of them fails when all is well (Bonferroni;
fractions within 0.1 and 0.9 of a step are near enough to normal for that to be right within a factor of four). A bias
is shown by |z| > 12, which unbiased rounding gives with a probability below 10^-30. Seeds are fixed.
"""

import pytest
import torch
from block_inputs import E4M3, E8M0, SCALES, UNBIASED_E4M3

import luqrun

pytestmark = pytest.mark.usefixtures("backend")

DRAWS = 1024
KINDS = 8  # different blocks
LEVELS = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float64)
UNBIASED = {
    "e8m0, rounded up": E8M0,
    "e8m0 of OCP after 3/4": {**E8M0, "scale_rounding": "floor", "headroom": 0.75},
    "e4m3, 16/17 of the range": {**E4M3, "largest": UNBIASED_E4M3},
}
CLIPPED = {
    "e8m0 of OCP": {**E8M0, "scale_rounding": "floor"},
    "e8m0, even": {**E8M0, "scale_rounding": "even"},
    "e4m3, the whole range": E4M3,
}
FAMILY = (len(UNBIASED) + 1) * KINDS * 33  # the same numbers on each backend


def blocks(width: int) -> torch.Tensor:
    """(KINDS, width): blocks of other maxima (in column 3), over a power of two from 3.05 to 7.4."""
    g = torch.Generator().manual_seed(5)
    tops = torch.tensor([3.05, 3.5, 3.95, 4.6, 5.3, 5.65, 6.3, 7.4]) * 2.0 ** -torch.arange(KINDS)
    x = (2 * torch.rand(KINDS, width, generator=g) - 1) * tops[:, None]
    x[:, 3] = tops
    return x


def draw(x: torch.Tensor, **keys):
    """(errors (DRAWS, kinds, width), their variance and the place between two levels (kinds, width)) of stochastic
    rounding, float64."""
    quantized = luqrun.quantizer(format="e2m1", rounding="stochastic", **keys).quantize(x.repeat(DRAWS, 1), seed=42)
    errors = quantized.dequantize().double().view(DRAWS, *x.shape) - x
    scale = quantized.scale[: len(x)].double() * quantized.tensor_scale.double()
    units = (x.double() / scale).abs().clamp(max=12)
    place = (torch.searchsorted(LEVELS, units, right=True) - 1).clamp(max=6)
    low, high = LEVELS[place], LEVELS[place + 1]
    return errors, (units - low) * (high - units) * scale**2, (units - low) / (high - low)


@pytest.mark.parametrize("name", list(UNBIASED))
def test_unbiased_for_each_element_and_each_block(name, z_limit):
    x = blocks(UNBIASED[name]["block"])
    errors, variance, fraction = draw(x, **UNBIASED[name])
    inside = (fraction > 0.1) & (fraction < 0.9)
    assert inside.sum() > x.numel() / 2
    z = errors.mean(0) / (variance / DRAWS).sqrt()
    assert z[inside].abs().max() < z_limit(FAMILY)
    towards_larger = (errors * x.sign()).sum((0, 2)) / (DRAWS * variance.sum(1)).sqrt()
    assert towards_larger.abs().max() < z_limit(FAMILY)


def errors_of_maxima(name):
    """Of each draw and block, as a share of the maximum: errors (DRAWS, KINDS) and their variance (KINDS,)."""
    x = blocks(CLIPPED[name]["block"])
    errors, variance, _ = draw(x, **CLIPPED[name])
    return errors[:, :, 3] / x[:, 3], variance[:, 3] / x[:, 3] ** 2


@pytest.mark.parametrize("name", list(CLIPPED))
def test_some_maximum_never_comes_out_whole(name):
    errors, _ = errors_of_maxima(name)
    assert (errors < -0.01).all(0).any()


@pytest.mark.parametrize("name", ["e8m0 of OCP", "e4m3, the whole range"])
def test_maxima_are_biased_towards_zero(name):
    errors, variance = errors_of_maxima(name)
    assert errors.sum() / (DRAWS * variance.sum()).sqrt() < -12


@pytest.mark.parametrize("largest", [6.0, UNBIASED_E4M3])
def test_four_over_six_is_biased_whatever_its_range(largest):
    # The choice prefers the draws that err less. Two elements show it best: the more there are, the less one decides.
    x = torch.zeros(60, 16)
    x[:, 0], x[:, 1] = 6, torch.arange(60) / 10 + 0.03
    for error in ("mse", "mae"):
        errors, *_ = draw(x, **E4M3, largest=largest, four_over_six=error)
        z = errors.mean(0) / (errors.std(0) / DRAWS**0.5)
        assert z[:, 1].abs().max() > 12


def test_the_scale_of_eden_keeps_the_length_along_the_source(z_limit):
    x = blocks(16)
    quantized = luqrun.quantizer(format="e2m1", **SCALES["eden"]).quantize(x.repeat(DRAWS, 1), seed=42)
    values = quantized.dequantize().double().view(DRAWS, KINDS, 16)
    assert (quantized.codes.view(DRAWS, KINDS, 16) == quantized.codes[:KINDS]).all()
    ratio = (values * x).sum(2) / x.double().square().sum(1)
    spread = ratio.std(0)
    assert (spread > 1e-3).all()
    assert ((ratio.mean(0) - 1) / (spread / DRAWS**0.5)).abs().max() < z_limit(FAMILY)
