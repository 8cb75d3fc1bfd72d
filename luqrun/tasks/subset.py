"""The part of a training set that dataset.limit keeps."""

from __future__ import annotations

import numpy as np

from luqrun.errors import UserError

SEED = 2112


def subset(count: int, limit: int | None, what: str) -> np.ndarray:
    """Indices (int64, ascending) of the training examples that `limit` keeps of `count`: a fixed random part; those of
    smaller limits are nested. what: the examples in the plural. Raises UserError for more than there are."""
    if limit is None:
        return np.arange(count)
    if limit > count:
        raise UserError(f"dataset.limit={limit} is more than the {count} training {what} there are")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(SEED)))
    return np.sort(rng.permutation(count)[:limit])
