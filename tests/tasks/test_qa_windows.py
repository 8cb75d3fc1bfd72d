"""Windows: what they hold, where their answers are, and how text is cut from the context again."""

import itertools

import numpy as np
import pytest
from questions import NORMANS, RIVERS

from luqrun.errors import UserError
from luqrun.tasks.padding import padding_share
from luqrun.tasks.question_answering import wordpiece
from luqrun.tasks.question_answering.questions import Answer, Question, QuestionSet
from luqrun.tasks.question_answering.windows import MAX_QUESTION, BatchedWindows, Windows, chosen, tokens_of

NUMBERS = " ".join(f"w{number:02d}" for number in range(100))  # a token a word


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece.train([NORMANS, RIVERS, *[NUMBERS] * 3, "who is it"], 500)


def asked(context, answer, text="Who is it"):
    return QuestionSet([context], [Question("q", text, 0, (Answer(answer, context.index(answer)),))])


def windows(context, answer, tokenizer, max_length=96, stride=8, **how):
    return Windows(asked(context, answer, **how), tokenizer, max_length, stride)


def test_a_window_is_question_and_context_between_special_tokens(tokenizer):
    found = windows("Rollo was their leader.", "their leader", tokenizer)
    assert len(found) == 1
    batch = found.batch(np.array([0]), None)
    tokens = [tokenizer.id_to_token(number) for number in batch["input_ids"][0].tolist()]
    question = tokenizer.encode("Who is it", add_special_tokens=False).tokens
    context = tokenizer.encode("Rollo was their leader.", add_special_tokens=False).tokens
    assert tokens == ["[CLS]", *question, "[SEP]", *context, "[SEP]"]
    before = len(question) + 2
    assert batch["token_type_ids"][0].tolist() == [0] * before + [1] * (len(context) + 1)
    assert batch["context"][0].tolist() == [False] * before + [True] * len(context) + [False]
    assert batch["attention_mask"].all()
    # As the tokenizer itself would do it.
    whole = tokenizer.encode("Who is it", "Rollo was their leader.")
    assert (whole.tokens, whole.type_ids) == (tokens, batch["token_type_ids"][0].tolist())
    start, stop = batch["start"].item(), batch["stop"].item()
    assert found.text(0, start, stop) == "their leader"


def test_windows_overlap_by_the_stride_and_cover_the_context(tokenizer):
    found = windows(NUMBERS, "w60 w61", tokenizer, max_length=40, stride=10)
    room = 40 - 3 - len(found.questions[0])
    spans = sorted((window.begin, window.end) for window in map(found.__getitem__, range(len(found))))
    assert spans[0] == (0, room)
    assert spans[-1][1] == 100
    assert all(end - begin == room for begin, end in spans[:-1])
    assert all(after[0] == before[1] - 10 for before, after in itertools.pairwise(spans))
    assert len({begin for begin, _ in spans}) == len(spans) > 2


def test_the_answer_is_where_a_window_has_it_whole_and_else_at_the_start(tokenizer):
    found = windows(NUMBERS, "w60 w61 w62", tokenizer, max_length=40, stride=10)
    held = 0
    for index in range(len(found)):
        window = found[index]
        if window.begin <= 60 and window.end > 62:
            held += 1
            assert found.text(index, window.start, window.stop) == "w60 w61 w62"
        else:
            assert (window.start, window.stop) == (0, 0)
    assert held in (1, 2)
    assert held < len(found)


def test_a_batch_is_padded_to_its_longest_window(tokenizer):
    of = QuestionSet(
        [NUMBERS, "Rollo was their leader."],
        [
            Question("1", "Who", 1, (Answer("Rollo", 0),)),
            Question("2", "Who is it", 0, (Answer("w05", NUMBERS.index("w05")),)),
        ],
    )
    found = Windows(of, tokenizer, 60, 8)
    batch = found.batch(np.array([1, 0]), None)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (2, 60)
    assert lengths.tolist() == [60, len(found._tokens(found[0]))]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == tokenizer.token_to_id("[PAD]")).all()
    assert not batch["context"][padding].any()
    alone = found.batch(np.array([0]), None)
    assert alone["input_ids"][0].tolist() == batch["input_ids"][1, : lengths[1]].tolist()


@pytest.fixture
def many(tokenizer):
    """A training set of windows of many lengths, three to a batch."""
    contexts = [" ".join(["Rollo", *NUMBERS.split()[:length]]) for length in range(200) if length % 100 < 60]
    questions = [Question(str(n), "Who", n, (Answer("Rollo", 0),)) for n in range(len(contexts))]
    return BatchedWindows(QuestionSet(contexts, questions), tokenizer, 100, 8, batch_size=3)


def rng(seed):
    return np.random.Generator(np.random.Philox(seed))


def test_an_epoch_has_each_window_once_but_for_a_last_incomplete_batch(many):
    for seed in range(3):
        batches = many.batches(rng(seed))
        assert len(batches) == many.num_batches == len(many) // 3
        assert {len(batch) for batch in batches} == {3}
        assert len(np.unique(np.concatenate(batches))) == 3 * len(batches)
    once, again, other = (many.batches(rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(once, again)
    assert not np.array_equal(np.sort(np.concatenate(once)), np.sort(np.concatenate(other))) or len(many) % 3 == 0
    together = [{tuple(sorted(batch)) for batch in batches} for batches in (once, other)]
    assert len(together[0] & together[1]) < len(once) / 4


def test_a_batch_has_windows_of_about_one_length(many):
    drawn = rng(0).permutation(len(many))[: 3 * many.num_batches].reshape(-1, 3)
    random = 1 - many.lengths[drawn].sum() / (3 * many.lengths[drawn].max(1).sum())
    assert padding_share(many, many.lengths) < random / 3
    assert (np.diff(many.lengths) >= 0).all()


def test_a_batch_that_the_windows_do_not_fill_is_refused(tokenizer):
    of = asked(NORMANS, "Rollo")
    with pytest.raises(UserError, match=r"dataset\.batch_size=9 is more than the 1 training windows"):
        BatchedWindows(of, tokenizer, 200, 8, batch_size=9)


def test_text_is_cut_from_the_context_as_it_is_written(tokenizer):
    for text, answer in ((NORMANS, "a région in France"), (RIVERS, "1,230 km"), (RIVERS, "Switzerland;")):
        found = windows(text, answer, tokenizer)
        window = found[0]
        assert window.start > 0
        assert found.text(0, window.start, window.stop) == answer


def test_a_long_question_is_cut_and_counted(tokenizer):
    found = windows(NORMANS, "Rollo", tokenizer, max_length=120, text="who " * 80)
    assert found.cut == 1
    assert len(found.questions[0]) == MAX_QUESTION
    assert windows(NORMANS, "Rollo", tokenizer, max_length=120, text="who " * 64).cut == 0


@pytest.mark.parametrize(
    ("max_length", "stride", "room"), [(40, 35, None), (40, 34, 34), (8, 2, 2), (6, 0, 0), (4, 0, 0)]
)
def test_a_stride_without_room_is_refused(tokenizer, max_length, stride, room):
    if room is None:
        room = 40 - 3 - len(tokenizer.encode("Who is it", add_special_tokens=False).ids)
        stride = room
    with pytest.raises(UserError, match=rf"dataset\.stride={stride} must be less than the {room} tokens of context"):
        windows(NUMBERS, "w05", tokenizer, max_length=max_length, stride=stride)


def test_an_answer_has_every_token_that_it_touches():
    offsets = np.array([(0, 3), (4, 8), (8, 9), (10, 14)])
    assert tokens_of(offsets, Answer("xxxx", 4)) == (1, 1)
    assert tokens_of(offsets, Answer("xx", 6)) == (1, 1)  # part of a word
    assert tokens_of(offsets, Answer("xxxxxx", 4)) == (1, 2)  # a space at its end
    assert tokens_of(offsets, Answer("xxxxxxx", 2)) == (0, 2)
    first, last = tokens_of(offsets, Answer(" ", 3))
    assert last < first  # nothing of it is a token


def test_an_answer_without_tokens_trains_on_the_start(tokenizer):
    of = QuestionSet(["Rollo was"], [Question("q", "Who", 0, (Answer(" ", 5),))])
    window = Windows(of, tokenizer, 40, 4)[0]
    assert (window.start, window.stop) == (0, 0)


def test_a_subset_keeps_questions_with_their_paragraphs():
    of = QuestionSet(
        ["one", "two", "three"],
        [Question(str(number), "?", number // 2, (Answer("o", 0),)) for number in range(6)],
    )
    part = chosen(of, [1, 4, 5])
    assert part.contexts == ["one", "three"]
    assert [(each.id, each.context) for each in part.questions] == [("1", 0), ("4", 1), ("5", 1)]
