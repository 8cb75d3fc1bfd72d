"""How much of the training batches of text is padding."""

from __future__ import annotations

import numpy as np

from luqrun.tasks.task import Batched

MEASURED = 200  # batches; all of a large set's would take longer than a line of the log is worth


def padding_share(train: Batched, *sides: np.ndarray) -> float:
    """The share of padding among the tokens of an epoch's first MEASURED batches, of all where it has fewer.

    sides: int (examples,), how many tokens an example has on each side of a batch, which is padded to the longest one
    of it there.
    """
    batches = train.batches(np.random.Generator(np.random.Philox(0)))[:MEASURED]
    parts = [lengths[batch] for batch in batches for lengths in sides]
    return 1 - sum(part.sum() for part in parts) / sum(part.max() * len(part) for part in parts)


def describe_padding(train: Batched, *sides: np.ndarray) -> str:
    """Such as "about 6.8 % of a training batch is padding"."""
    return f"about {100 * padding_share(train, *sides):.2g} % of a training batch is padding"
