"""The share of padding, against a count of it in batches as they are served."""

import numpy as np
import pytest

from luqrun.tasks import padding
from luqrun.tasks.translation.batches import BucketedPairs
from luqrun.tasks.translation.ragged import Ragged
from luqrun.tasks.translation.subwords import PADDING


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(3)
    sides = [Ragged.of([7] * length for length in rng.integers(1, 40, 2000)) for _ in range(2)]
    return BucketedPairs(*sides, tokens=120)


def counted(pairs, batches) -> float:
    tokens = [ids for batch in batches for ids in pairs.batch(batch, None).values()]
    return sum(int((ids == PADDING).sum()) for ids in tokens) / sum(ids.numel() for ids in tokens)


def test_both_sides_of_some_batches_are_measured(pairs):
    drawn, sides = pairs.batches(np.random.Generator(np.random.Philox(0))), (pairs.source.lengths, pairs.target.lengths)
    assert len(drawn) > padding.MEASURED
    found = padding.padding_share(pairs, *sides)
    assert found == pytest.approx(counted(pairs, drawn[: padding.MEASURED]))
    assert found == pytest.approx(counted(pairs, drawn), abs=0.02)
    assert padding.describe_padding(pairs, *sides) == f"about {100 * found:.2g} % of a training batch is padding"


def test_where_there_are_few_all_are_measured(pairs):
    few = BucketedPairs(pairs.source.select(np.arange(50)), pairs.target.select(np.arange(50)), tokens=120)
    drawn = few.batches(np.random.Generator(np.random.Philox(0)))
    found = padding.padding_share(few, few.source.lengths, few.target.lengths)
    assert found == pytest.approx(counted(few, drawn))
