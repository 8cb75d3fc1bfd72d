"""Tensors on which the rules of blocks differ, and the quantizers with blocks that tests compare."""

from itertools import product

import numpy as np
import torch

UNBIASED_E4M3 = 6 * 16 / 17  # the largest value that a scale, at most 1/17 too small, leaves below 6

E8M0 = {"block": 32, "scale_format": "e8m0"}
E4M3 = {"block": 16, "scale_format": "e4m3"}
FP32 = {"block": 32, "scale_format": "fp32"}
TILE = {"block": [16, 16]}

# Name -> keys beside format and rounding. Eden has one rounding: its elements go to the nearest.
SCALES = {
    "rceil": E8M0,
    "floor": {**E8M0, "scale_rounding": "floor"},
    "ceil": {**E8M0, "scale_rounding": "ceil"},
    "even": {**E8M0, "scale_rounding": "even"},
    "down": {**E8M0, "scale_rounding": "down"},
    "quest": {**E8M0, "scale_rounding": "down", "range": "rms"},
    "e8m0 largest": {**E8M0, "largest": UNBIASED_E4M3},
    "down largest": {**E8M0, "scale_rounding": "down", "largest": 4.3},
    "e8m0 headroom": {**E8M0, "scale_rounding": "floor", "headroom": 0.75},
    "fp32": FP32,
    "fp32 rms": {**FP32, "range": "rms", "largest": 5.3},
    "fp32 headroom": {**FP32, "headroom": 0.7},
    "e4m3": E4M3,
    "e4m3 largest": {**E4M3, "largest": UNBIASED_E4M3},
    "e4m3 rms": {**E4M3, "range": "rms"},
    "e4m3 headroom": {**E4M3, "headroom": 0.7},
    "four over six, mse": {**E4M3, "four_over_six": "mse"},
    "four over six, mae": {**E4M3, "four_over_six": "mae"},
    "eden": {**E4M3, "largest": UNBIASED_E4M3 / 0.93, "eden": True},
}
FORMATS = ("e1m2", "e2m2", "int4")  # beside e2m1

# Squared error x 1e3 on N(0, 1) as published (Quartet II), by the keys that reach it.
PUBLISHED = {
    "nvfp4": (E4M3, 9.0),
    "nvfp4, four over six": ({**E4M3, "four_over_six": "mse"}, 7.6),
    "nvfp4, tiles": ({**E4M3, **TILE}, 12.4),
    "nvfp4, stochastic": ({**E4M3, "rounding": "stochastic", "largest": UNBIASED_E4M3}, 23.5),
    "ms-eden": ({**E4M3, "largest": UNBIASED_E4M3 / 0.93, "eden": True}, 9.4),
}
# 17.5 is published: that of two candidates with draws of their own. Here they share the words of an element.
STOCHASTIC_FOUR_OVER_SIX = {
    **E4M3, "rounding": "stochastic", "largest": UNBIASED_E4M3, "four_over_six": "mse"
}  # fmt: skip


def normal(*shape, seed=1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _next(values: list[float]) -> list[float]:
    """Each value with the float32 before and after it."""
    values = np.float32(values)
    return [*np.nextafter(values, np.float32(0)), *values, *np.nextafter(values, np.float32(np.inf))]


def maxima(exponents) -> torch.Tensor:
    """(n, 4): short blocks whose maxima lie where one of the exponent rules steps, and next to it."""
    steps = [m * 2.0**k for m, k in product((1, 1.5, 1.75, UNBIASED_E4M3 / 4, 1.4375, 1.0751, 1.25), exponents)]
    top = torch.tensor(np.float32(_next(steps)))
    return top[:, None] * torch.tensor([1.0, -0.7, 0.41, -0.083])


def ties(anchor: float) -> torch.Tensor:
    """(n, 16): in rows of maximum 6 s, with s an E4M3 number, the ties between codes of e2m1 and what lies next to
    them. The last row holds `anchor`: 6 * 448 makes the tensor scale 1, and so does 6 * 256 under a bound of 256."""
    middles = _next([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rows = np.float32([[6.0, *middles[start : start + 15]] for start in (0, 6)])
    rows = np.pad(rows, [(0, 0), (0, 16 - rows.shape[1])])
    scales = np.float32([2.0**-9, 0.125, 1, 1.125, 1.75, 8, 240])
    rows = (scales[:, None, None] * rows).reshape(-1, 16) * np.where(np.arange(16) % 2, -1, 1)
    return torch.tensor(np.float32([*rows, [anchor, *[0] * 15]]))


def matrices() -> dict[str, torch.Tensor]:
    """Name -> a matrix with blocks along its rows. What is tiny needs scales or values below 2^-126."""
    mixed = normal(13, 70) * torch.exp2(120 * torch.rand(13, 70, generator=torch.Generator().manual_seed(2)) - 60)
    rows = torch.exp2(-torch.arange(29.0))[:, None]
    blocks_of_zeros = normal(6, 70)
    blocks_of_zeros[1], blocks_of_zeros[3, 32:], blocks_of_zeros[4, :32] = 0, 0, -0.0
    huge = normal(7, 70) / normal(7, 70).abs().max() * 3e38
    huge[2, 5] = torch.finfo(torch.float32).max
    return {
        "normal": normal(17, 70),
        "wide": mixed,
        "rows apart": normal(29, 70) * rows,  # scales of e4m3 from 256 down to its subnormals and to zero
        "outliers": normal(9, 70) * (1 + 1000 * (normal(9, 70, seed=4) > 2)),
        "small integers": (4 * normal(9, 70)).round(),  # exact in several scales: ties of errors
        "zeros": torch.zeros(3, 70),
        "blocks of zeros": blocks_of_zeros,
        "ties": ties(6 * 448),
        "ties, bound of 256": ties(6 * 256),
        "maxima": maxima((-90, -3, 0, 2, 90)),
        "huge": huge,
        "one": torch.tensor([[-0.37]]),
        "one column": normal(40, 1),
        "bfloat16": normal(5, 70).bfloat16(),
        "float16": (100 * normal(5, 70)).half(),
        "float64": normal(5, 70).double() ** 3,
        "tiny": normal(7, 70) * 2.0**-122,
        "tiny maxima": maxima((-149, -148, -147, -140, -128, -127, -126, -125, -124)),
        "subnormal": normal(7, 70) * 2.0**-140,
        "smallest": (5 * normal(7, 70)).round() * 2.0**-149,
        "tiny blocks": normal(29, 70) * 2.0**-110 * rows,
    }


TINY = ("tiny", "tiny maxima", "subnormal", "smallest", "tiny blocks")
EMPTY = [((0,), -1), ((3, 0), 1), ((3, 0), 0), ((0, 32), -1), ((2, 0, 33), -1), ((2, 0, 33), 1)]


def strided() -> list[tuple[torch.Tensor, int]]:
    """(tensor, axis): other axes, and memory in other orders than row-major."""
    image = (normal(2, 37, 3, 5) * torch.exp2(4 * normal(2, 37, 3, 5, seed=3))).to(memory_format=torch.channels_last)
    return [
        (normal(37, 19), 0),
        (normal(37, 19), -2),
        (normal(3, 37, 5), 1),
        (normal(3, 5, 37), 2),
        (normal(70), 0),
        (normal(19, 74)[:, ::2], -1),
        (normal(37, 19).t(), -1),
        (normal(37, 19).t(), 0),
        (normal(1, 40).expand(3, 40), -1),
        (normal(90)[3:], -1),
        (image, 1),
        (image, 0),
        (image, -1),
        (image[:, 2:, 1:], 1),
    ]
