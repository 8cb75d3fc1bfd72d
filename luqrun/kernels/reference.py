"""The kernels in plain torch operations: slow, on any device, and the oracle of all the others.

Every backend has these functions with these signatures and returns the same codes, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luqrun.formats import Format
from luqrun.kernels.philox import random_words

FLOAT32_MAX = torch.finfo(torch.float32).max


def statistics(x: Tensor, moments: bool) -> Tensor:
    """What ranges need of x (any shape, floating): float64 tensor (4,) of max|x|, any negative, sum|x|, sum x^2.

    A NaN in x makes the maximum NaN, an Inf makes it Inf. Without `moments` the two sums are 0. Empty: zeros.
    """
    if x.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    x = x.detach().float()
    magnitude = x.abs()
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    sums = (magnitude.sum(dtype=torch.float64), x.double().square().sum()) if moments else (zero, zero)
    return torch.stack([magnitude.max().double(), (x < 0).any().double(), *sums])


def encode(
    x: Tensor,
    scale: Tensor,
    signed: Tensor,
    form: Format,
    rounding: str,
    underflow: str,
    stream: Tensor,
    sample: int = 0,
) -> Tensor:
    """Codes of x / scale in `form` (x's shape and memory format; form.code_dtype).

    scale: 0-dim float32; 0 and NaN give zero codes, so the values become 0 and NaN. signed: 0-dim bool, for
    integer formats. rounding: nearest (linear domain; ties to even for integers, away from zero for powers of two,
    Eq. 14) or stochastic (Eq. 12). underflow, for logarithmic formats below 1: flush, nearest or stochastic
    (Eq. 10). stream, sample: see luqrun.kernels.philox; read only where something is stochastic. Values beyond the
    largest code are clipped to it, non-finite ones get code 0: the quantizer makes their scale NaN.
    """
    x = x.detach().float()
    draws = None
    if "stochastic" in (rounding, underflow if form.logarithmic else None):
        draws = random_words(stream.to(x.device), sample, x.numel()).view(x.shape)
    usable = (x.abs() <= FLOAT32_MAX) & (scale > 0)
    if form.logarithmic:
        magnitude = torch.where(usable, x.abs() / scale, 0.0).clamp(max=form.limit)
        magnitude = _log_magnitude(magnitude, rounding, underflow, draws)
        codes = torch.where(x < 0, -magnitude, magnitude)
    else:
        limit = torch.where(signed, form.limit, form.unsigned_limit)
        ratio = torch.where(usable, x / scale, 0.0).clamp(torch.where(signed, -limit, 0), limit)
        codes = ratio.round() if rounding == "nearest" else _stochastic_round(ratio, draws)
    return codes.to(form.code_dtype)


def _log_magnitude(ratio: Tensor, rounding: str, underflow: str, draws: Tensor | None) -> Tensor:
    """|x| / scale >= 0 to 0 or a power of two, by arithmetic on the float32 bit pattern."""
    bits = ratio.contiguous().view(torch.int32)
    # 23 random bits (or one half) added to the mantissa carry into the exponent as often as they should.
    carry = (draws & 0x7FFFFF).to(torch.int32) if rounding == "stochastic" else 0x400000
    power = ((bits + carry) & 0x7F800000).view(torch.float32)
    if underflow == "stochastic":
        below = ((draws >> 1) < (ratio * 2.0**31).to(torch.int64)).float()
    else:
        below = (ratio >= 0.5).float() if underflow == "nearest" else torch.zeros_like(ratio)
    return torch.where(ratio >= 1, power, below)


def _stochastic_round(ratio: Tensor, draws: Tensor) -> Tensor:
    """Away from zero with probability equal to the fraction, to 31 bits (all that fit a signed comparison)."""
    magnitude = ratio.abs()
    floor = magnitude.floor()  # of the magnitude: there the fraction is exact, also for a tiny negative ratio
    return (floor + ((draws >> 1) < ((magnitude - floor) * 2.0**31).to(torch.int64))).copysign(ratio)


def describe() -> str:
    """What run.json records."""
    return f"reference (torch {torch.__version__} operations, slow)"
