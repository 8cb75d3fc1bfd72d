"""Stochastic rounding is unbiased in every bin, below the smallest level and at the maximum: z-tests.

They are one family: 10^-4 is the chance that any of them fails when all is well (Bonferroni over all values of all
formats; the seeds are fixed, so that a failure repeats).
"""

from itertools import product

import pytest
import torch

from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer

LUQ = Quantizer("e3m0", rounding="stochastic")
DRAWS = 8192  # draws a value; with fractions in [0.1, 0.9] a mean is normal to well within the limits used
UNBIASED = [
    *[(Quantizer(f"e{bits}m0", rounding="stochastic"), True) for bits in (1, 2, 3, 4)],
    (Quantizer("e3m0_div128", rounding="stochastic"), True),
    (Quantizer("int4", rounding="stochastic"), True),
    (Quantizer("int4", rounding="stochastic"), False),
    (Quantizer("int2", rounding="stochastic"), True),
    (Quantizer("int8", rounding="stochastic"), True),
    (Quantizer("e3m0", rounding="stochastic", pow2_scale=True), True),
]


def between_levels(form, signed):
    """Values in units of the scale, three within each bin of the grid, and all levels (the maximum last)."""
    levels = torch.tensor(form.levels(signed), dtype=torch.float64)
    low, high = levels[:-1], levels[1:]
    inside = torch.cat([low + part * (high - low) for part in (0.1, 0.5, 0.9)])
    return torch.cat([inside, levels])


FAMILY = 3 * sum(len(between_levels(quantizer.form, signed)) for quantizer, signed in UNBIASED)


def neighbours(values, levels):
    """The grid values next to each value, below and above (both itself where it is on the grid)."""
    upper = torch.searchsorted(levels, values).clamp(max=len(levels) - 1)
    on_grid = levels[upper] == values
    return torch.where(on_grid, values, levels[(upper - 1).clamp(min=0)]), levels[upper]


def draw(quantizer, signed):
    """(values in code units, codes (DRAWS, values)): many draws of one tensor, and the ratio that kernels saw."""
    points = between_levels(quantizer.form, signed)
    x = (points * 0.37).float().expand(DRAWS, -1)
    quantized = quantizer.quantize(x, seed=42)
    assert bool(quantized.signed) == signed
    return (x[0] / quantized.scale).double(), quantized.codes.double()


@pytest.mark.parametrize(("quantizer", "signed"), UNBIASED, ids=lambda value: str(value))
def test_stochastic_rounding_is_unbiased_with_the_variance_of_table_1(quantizer, signed, z_limit):
    values, codes = draw(quantizer, signed)
    levels = torch.tensor(quantizer.form.levels(signed), dtype=torch.float64)
    # A level may be missed by the last bit of x / scale: what is rounded then is that level, to 1e-6.
    nearest_level = levels[(values[:, None] - levels).abs().argmin(1)]
    values = torch.where((values - nearest_level).abs() < 1e-6 * nearest_level.abs(), nearest_level, values)
    low, high = neighbours(values, levels)
    on_grid = low == high
    stray = codes[:, on_grid] != values[on_grid]
    assert stray.double().mean() < 1e-4
    assert ((codes == low) | (codes == high))[:, ~on_grid].all()

    codes, values, low, high = codes[:, ~on_grid], values[~on_grid], low[~on_grid], high[~on_grid]
    assert len(values) >= 6
    limit = z_limit(FAMILY)
    variance = (values - low) * (high - values)
    z = (codes.mean(0) - values) / (variance / DRAWS).sqrt()
    assert z.abs().max() < limit

    # The square of the error takes two values, whose variance is known too; at a midpoint they are one.
    squares = (codes - values).square()
    spread = variance.sqrt() * (high + low - 2 * values).abs()
    middle = spread < 1e-3 * variance
    torch.testing.assert_close(squares.mean(0)[middle], variance[middle], rtol=1e-2, atol=0)
    z = (squares.mean(0) - variance)[~middle] / (spread[~middle] / DRAWS**0.5)
    assert z.abs().max() < limit


def test_values_far_below_the_underflow_threshold_are_unbiased(z_limit):
    # 2^20 draws of x = 2^-10 alpha: 1024 expected ones, standard deviation 32.
    x = torch.full((2**20 + 1,), 2.0**-10)
    x[-1] = 64.0
    codes = LUQ.quantize(x, seed=3).codes[:-1]
    assert set(codes.unique().tolist()) == {0, 1}
    assert abs(codes.sum(dtype=torch.int64) - 1024) / 32 < z_limit(1)


def test_the_largest_element_is_kept_exactly():
    for name, rounding, sign in product(FORMATS, ("nearest", "stochastic"), (1, -1)):
        x = torch.tensor([0.3, 0.01, -0.002, sign * 1.7]).repeat(100, 1)
        values = Quantizer(name, rounding=rounding).quantize(x, seed=1).dequantize()
        torch.testing.assert_close(values[:, 3], x[:, 3], rtol=2e-7, atol=0)


def test_underflow_and_rounding_are_chosen_apart(z_limit):
    # The schemes of Fig. 2, on a scale of 1.
    x = torch.tensor([0.3, 0.7, 1.3, 1.7, -0.3, -1.7, 64.0]).repeat(DRAWS, 1)

    def codes(rounding, underflow):
        return Quantizer("e3m0", rounding=rounding, underflow=underflow).quantize(x, seed=9).codes.double()

    assert codes("nearest", "flush")[0].tolist() == [0, 0, 1, 2, 0, -2, 64]
    assert codes("nearest", "nearest")[0].tolist() == [0, 1, 1, 2, 0, -2, 64]
    pruned, kept = codes("stochastic", "flush"), codes("nearest", "stochastic")
    assert not pruned[:, [0, 1, 4]].any()
    assert (kept[:, [2, 3, 5, 6]] == torch.tensor([1.0, 2.0, -2.0, 64.0])).all()
    limit = z_limit(6)
    for drawn, columns, variance in ((pruned, [2, 3, 5], 0.21), (kept, [0, 1, 4], 0.21)):
        z = (drawn.mean(0) - x[0])[columns] / (variance / DRAWS) ** 0.5
        assert z.abs().max() < limit


def test_stochastic_is_the_default_underflow_of_stochastic_rounding():
    assert Quantizer("e3m0", rounding="stochastic").underflow == "stochastic"
    assert Quantizer("e3m0").underflow == "nearest"
    assert Quantizer("int4").underflow is None


def test_draws_of_different_names_are_uncorrelated(z_limit):
    numel = 2**16
    x = torch.rand(numel) * 63 + 1e-3
    x[0] = 64.0
    scale, signed, _ = LUQ.measure(x)
    base = {"seed": 0, "layer": 1, "operand": 2, "step": 1, "micro_step": 1, "rank": 1}
    names = [(base, 0), (base, 1), *[({**base, field: value + 1}, 0) for field, value in base.items()]]
    errors = [LUQ.encode(x, scale, signed, make_stream(**fields), sample).double() - x for fields, sample in names]
    errors.append(errors[0].roll(1))  # and those of neighbouring elements
    errors = torch.stack(errors)
    correlation = torch.corrcoef(errors)
    pairs = correlation[tuple(torch.triu_indices(len(errors), len(errors), 1))]
    # Of independent errors, r sqrt(n) is standard normal.
    assert (pairs.abs() * numel**0.5).max() < z_limit(len(pairs))
