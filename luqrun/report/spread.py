"""Means over seeds, and whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from luqrun.errors import UserError


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (None for one value) and number of values."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self):
        deviation = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{deviation} ({self.count})"


def bounds(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """One-sided bounds of the values' mean: it is above the first, and below the second, each with `confidence`.

    Student's t for independent seeds; infinite for a single value.
    """
    spread = Spread.of(values)
    if spread.count < 2:
        return -math.inf, math.inf
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError("bounds of a mean need scipy: pip install 'luqrun[plot]'") from None
    reach = t.ppf(confidence, spread.count - 1) * spread.deviation / math.sqrt(spread.count)
    return spread.mean - reach, spread.mean + reach
