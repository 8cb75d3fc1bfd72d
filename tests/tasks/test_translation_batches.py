"""Training batches of sentences: what fits, what is padding, and that an epoch is a function of what is drawn."""

import numpy as np
import pytest
import torch

from luqrun.errors import UserError
from luqrun.tasks.padding import padding_share
from luqrun.tasks.translation.batches import BucketedPairs, SentencePairs
from luqrun.tasks.translation.ragged import Ragged
from luqrun.tasks.translation.subwords import END, PADDING

TOKENS = 400


def lists(count, seed, longest=60):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.07, count) + 1, longest)
    return [[*rng.integers(3, 90, length - 1).tolist(), END] for length in lengths]


@pytest.fixture(scope="module")
def pairs():
    return BucketedPairs(Ragged.of(lists(3000, 1)), Ragged.of(lists(3000, 2)), TOKENS)


def rng(seed):
    return np.random.Generator(np.random.Philox(seed))


def test_every_pair_comes_once_an_epoch_in_as_many_batches_each_time(pairs):
    for seed in range(3):
        batches = pairs.batches(rng(seed))
        assert len(batches) == pairs.num_batches
        assert sorted(np.concatenate(batches)) == list(range(len(pairs)))


def test_no_batch_has_more_subwords_on_a_side_than_asked_for(pairs):
    sizes = [pairs.batch(indices, None)["source"].numel() for indices in pairs.batches(rng(0))]
    sizes += [pairs.batch(indices, None)["target"].numel() for indices in pairs.batches(rng(0))]
    assert max(sizes) <= TOKENS
    assert np.mean(sizes) > TOKENS / 2


def test_little_of_it_is_padding(pairs):
    longer = [max(len(a), len(b)) for a, b in zip(lists(3000, 1), lists(3000, 2), strict=True)]
    side = Ragged.of([3] * (length - 1) + [END] for length in longer)
    alike = BucketedPairs(side, side, TOKENS)
    assert 0 <= padding_share(alike, side.lengths, side.lengths) < 0.1


def test_the_same_draw_makes_the_same_epoch_and_another_one_another(pairs):
    once, again, other = (pairs.batches(rng(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(*each) for each in zip(once, again, strict=True))
    together = [{frozenset(each.tolist()) for each in batches} for batches in (once, other)]
    assert len(together[0] & together[1]) < len(once) / 10  # of few long sentences all share a batch


def test_few_sentences_and_one_length_are_batches_too():
    one = BucketedPairs(Ragged.of([[3, END]]), Ragged.of([[4, 5, END]]), TOKENS)
    assert [each.tolist() for each in one.batches(rng(0))] == [[0]]
    alike = BucketedPairs(Ragged.of([[3, END]] * 1000), Ragged.of([[4, END]] * 1000), 100)
    assert {len(each) for each in alike.batches(rng(0))} == {50}


def test_a_batch_without_room_for_the_longest_sentence_is_refused():
    with pytest.raises(UserError, match=r"dataset\.batch_tokens=8 leaves no room for a sentence of 9 subwords"):
        BucketedPairs(Ragged.of([[3] * 8 + [END]]), Ragged.of([[3, END]]), 8)


def test_a_batch_is_padded_after_its_sentences():
    pairs = SentencePairs(Ragged.of([[3, 4, END], [5, END]]), Ragged.of([[6, END], [7, 8, 9, END]]))
    batch = pairs.batch(np.array([1, 0]), None)
    assert torch.equal(batch["source"], torch.tensor([[5, END, PADDING], [3, 4, END]]))
    assert torch.equal(batch["target"], torch.tensor([[7, 8, 9, END], [6, END, PADDING, PADDING]]))


def test_lists_are_selected_cut_and_joined():
    lists = [[5, 6, 7, 8], [9], [4, 3, 2]]
    ragged = Ragged.joined([Ragged.of(lists[:1]), Ragged.of(lists[1:])])
    assert [each.tolist() for each in (ragged[0], ragged[1], ragged[2])] == lists
    chosen = ragged.select(np.array([2, 0, 2]))
    assert [chosen[i].tolist() for i in range(3)] == [lists[2], lists[0], lists[2]]
    cut = ragged.cut(2)
    assert [cut[i].tolist() for i in range(3)] == [[5, 8], [9], [4, 2]]  # the last one is kept
    assert len(Ragged.of([]).cut(3)) == len(Ragged.of([]).select(np.array([], np.int64))) == 0
