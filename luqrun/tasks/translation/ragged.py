"""Sentences of many lengths in one array, which processes share and which takes little memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Ragged:
    """Lists of small integers. flat: int32, one after the other; lengths: int64, how many each has."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray):
        self.flat, self.lengths = flat, lengths
        self.ends = lengths.cumsum()

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        lists = list(lists)
        lengths = np.array([len(each) for each in lists], np.int64)
        return cls(np.fromiter((one for each in lists for one in each), np.int32, lengths.sum()), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """All lists of all parts."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("flat", "lengths")))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.ends[index] - self.lengths[index] : self.ends[index]]

    def select(self, indices: np.ndarray) -> Ragged:
        """The lists of these indices, in their order."""
        lengths = self.lengths[indices]
        shift = self.ends[indices] - lengths - (lengths.cumsum() - lengths)  # from where they come to where they go
        return Ragged(self.flat[np.arange(lengths.sum()) + np.repeat(shift, lengths)], lengths)

    def cut(self, longest: int) -> Ragged:
        """Each list of at most so many, its last one kept."""
        lengths = np.minimum(self.lengths, longest)
        inside = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        flat = self.flat[np.repeat(self.ends - self.lengths, lengths) + inside]
        if len(lengths):
            flat[lengths.cumsum() - 1] = self.flat[self.ends - 1]
        return Ragged(flat, lengths)

    def padded(self, indices: np.ndarray, padding: int) -> Tensor:
        """int64 (n, the longest of them)."""
        found = np.full((len(indices), self.lengths[indices].max()), padding, np.int64)
        for row, index in zip(found, indices, strict=True):
            row[: self.lengths[index]] = self[index]
        return torch.from_numpy(found)
