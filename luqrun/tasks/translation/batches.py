"""Sentence pairs as examples: training batches of at most so many subwords, made of pairs of about one length."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from luqrun.errors import UserError
from luqrun.tasks.translation.ragged import Ragged
from luqrun.tasks.translation.subwords import PADDING

WIDER = 1.15  # the longest pair of a bucket against the shortest, about: the rest is padding
LEAST = 32  # pairs that a bucket has, so that not always the same ones meet


class SentencePairs:
    """Pairs of subwords, each ending in END, served as a dict of int64 tensors: `source` (n, S) and `target` (n, T)."""

    def __init__(self, source: Ragged, target: Ragged):
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> dict[str, Tensor]:
        return {"source": self.source.padded(indices, PADDING), "target": self.target.padded(indices, PADDING)}


class BucketedPairs(SentencePairs):
    """A training set that batches by subwords (luqrun.tasks.task.Batched).

    tokens: a batch has at most so many subwords on either side, padding included. A pair is as long as its longer side;
    which lengths share a bucket is fixed, which pairs of it share a batch is drawn, and so is the order of the batches.
    Raises UserError where a batch has no room for the longest pair.
    """

    def __init__(self, source: Ragged, target: Ragged, tokens: int):
        super().__init__(source, target)
        lengths = np.maximum(self.source.lengths, self.target.lengths)
        if lengths.max() > tokens:
            what = f"no room for a sentence of {lengths.max()} subwords"
            raise UserError(f"dataset.batch_tokens={tokens} leaves {what}; lower dataset.max_length or raise it")
        self.buckets = [(np.flatnonzero((lengths >= low) & (lengths <= high)), tokens // high)
                        for low, high in _ranges(lengths)]  # fmt: skip

    @property
    def num_batches(self) -> int:
        return sum(-(-len(pairs) // most) for pairs, most in self.buckets)

    def batches(self, rng: np.random.Generator) -> list[np.ndarray]:
        """int64 indices of each batch; the batches of a bucket differ by one pair at most."""
        found = []
        for pairs, most in self.buckets:
            found += np.array_split(rng.permutation(pairs), -(-len(pairs) // most))
        return [found[number] for number in rng.permutation(len(found))]


def _ranges(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(shortest, longest) of each bucket, which has LEAST pairs or all there are; from the longest pairs down."""
    counts, found, high = np.bincount(lengths), [], int(lengths.max())
    while high > 0:
        low = high
        while low > 1 and (low - 1 >= high / WIDER or counts[low : high + 1].sum() < LEAST):
            low -= 1
        if counts[:low].sum() < LEAST:  # what is left is too little for one of its own
            low = 1
        found.append((low, high))
        high = low - 1
    return [each for each in found if counts[each[0] : each[1] + 1].sum()]
