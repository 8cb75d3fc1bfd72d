"""Joint subwords: text that comes back as it was, the same subwords each time, a cache that may be damaged."""

import numpy as np
import pytest

from luqrun.tasks.translation.parallel_text import Pairs
from luqrun.tasks.translation.sentences import generate
from luqrun.tasks.translation.subwords import END, PADDING, SPECIAL, UNKNOWN, subwords_of

TEXTS = generate(500)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "luqrun"


def test_text_of_both_languages_comes_back_as_it_was():
    subwords = subwords_of(TEXTS["train"], 400)
    for side in TEXTS["val"]:
        ids = subwords.encode(side)
        assert subwords.decode([ids[index] for index in range(len(side))]) == side


def test_each_sentence_ends_and_what_follows_is_not_read():
    subwords = subwords_of(TEXTS["train"], 400)
    ids = subwords.encode(["The dog sees a house."])[0].tolist()
    assert ids[-1] == END
    assert PADDING not in ids
    assert subwords.decode([[*ids, 5, 6, 7], [*ids, PADDING, PADDING]]) == ["The dog sees a house."] * 2
    assert subwords.decode([[]]) == [""]


def test_what_was_never_seen_is_unknown_and_not_lost():
    subwords = subwords_of(TEXTS["train"], 400)
    ids = subwords.encode(["The 猫 sees a house."])[0].tolist()
    assert ids.count(UNKNOWN) == 1
    assert subwords.decode([ids]) == ["The sees a house."]


def test_a_special_subword_that_stands_in_a_text_is_text():
    subwords = subwords_of(TEXTS["train"], 400)
    for special in SPECIAL:
        ids = subwords.encode([f"The {special} sees a house."])[0].tolist()
        assert PADDING not in ids
        assert ids.index(END) == len(ids) - 1


def test_there_are_at_most_as_many_as_asked_for():
    assert len(subwords_of(TEXTS["train"], 150)) == 150
    assert len(SPECIAL) < len(subwords_of(TEXTS["train"], 10_000)) < 1000  # a small text has no more


def test_they_are_learnt_once_and_again_where_the_cache_is_damaged(own_cache, caplog):
    first = subwords_of(TEXTS["train"], 300)
    (file,) = own_cache.glob("subwords-*.json")
    written = file.stat().st_mtime_ns
    assert subwords_of(TEXTS["train"], 300).json == first.json
    assert file.stat().st_mtime_ns == written
    file.write_text(first.json[:100])
    assert subwords_of(TEXTS["train"], 300).json == first.json
    assert "damaged" in caplog.text
    fewer = Pairs(TEXTS["train"].source[:-1], TEXTS["train"].target[:-1])
    subwords_of(fewer, 300)
    assert len(list(own_cache.glob("subwords-*.json"))) == 2


def test_a_cache_that_cannot_be_written_is_said(own_cache, caplog):
    own_cache.write_text("no folder")
    assert len(subwords_of(TEXTS["train"], 200)) == 200
    assert "cannot keep " in caplog.text


def test_a_long_text_is_encoded_piece_by_piece(monkeypatch):
    subwords = subwords_of(TEXTS["train"], 400)
    whole = subwords.encode(TEXTS["train"].source)
    monkeypatch.setattr("luqrun.tasks.translation.subwords.CHUNK", 7)
    pieces = subwords.encode(TEXTS["train"].source)
    assert np.array_equal(whole.flat, pieces.flat)
    assert np.array_equal(whole.lengths, pieces.lengths)
    assert len(subwords.encode([])) == 0
