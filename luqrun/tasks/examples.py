"""Any map-style data set as the loaders want it: batches whose random choices follow from a key for each example."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from luqrun.tasks.task import Batch


class Collated:
    """Examples (luqrun.tasks.task) of a torch data set, whose random choices draw from torch's generator."""

    def __init__(self, dataset: Dataset, collate: Callable[[list], Batch] = default_collate):
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> Batch:
        return self.collate(seeded(self.dataset.__getitem__, indices, keys))


def seeded(get: Callable, indices: np.ndarray, keys: np.ndarray) -> list:
    """[get(index), ...], each call with torch's CPU generator seeded by its key; the generator is put back after.

    torch.manual_seed would seed the GPUs' generators too, which nothing here puts back.
    """
    state = torch.get_rng_state()
    try:
        items = []
        for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
            torch.default_generator.manual_seed(key)
            items.append(get(index))
        return items
    finally:
        torch.set_rng_state(state)
