"""The best span of a window, and SQuAD's exact match and F1."""

import random
import string

import pytest
import torch

from luqrun.tasks.question_answering import answers
from luqrun.tasks.question_answering.answers import Span, best_spans, exact, f1, grade, normalized


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Normans", "normans"),
        ("a U.S.-led, an (open) theatre", "usled open theatre"),
        ("A.", ""),  # punctuation goes first, and leaves an article
        ("the-end", "theend"),
        ("anthem of a band\n", "anthem of band"),
        ("“Rollo” — 10 %", "“rollo” — 10"),  # ASCII's punctuation alone
        ("", ""),
    ],
)
def test_texts_are_normalized_as_squad_does(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "score"),
    [
        ("the Normans!", "Normans", 1.0, 1.0),
        ("Rollo the leader", "leader Rollo", 0.0, 1.0),
        ("to be or not to be", "to be", 0.0, 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("in France", "Normandy, a region in France", 0.0, 2 * 1 * 0.5 / 1.5),
        ("Paris", "Rome", 0.0, 0.0),
        ("", "Rome", 0.0, 0.0),
        ("the", "a", 1.0, 0.0),  # nothing is left of both: the same, and without a word in common
    ],
)
def test_a_prediction_is_graded_by_its_words(prediction, answer, em, score):
    assert exact(prediction, answer) == em
    assert f1(prediction, answer) == pytest.approx(score)


def test_a_question_counts_with_its_best_answer_and_one_without_prediction_with_none():
    found = grade({"1": "Rollo", "2": "the king"}, {"1": ["a leader", "Rollo"], "2": ["king Rollo"], "3": ["Rome"]})
    assert found["em"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)


def words_of(text: str) -> list[str]:
    """Letter by letter, with no pattern."""
    found, word = "", ""
    for letter in [*(letter for letter in text.lower() if letter not in string.punctuation), " "]:
        if letter.isalnum():
            word += letter
        else:
            found += (" " if word in ("a", "an", "the") else word) + letter
            word = ""
    return found.split()


def straight(prediction: str, answer: str) -> tuple[float, float]:
    """(exact match, F1) by another way: words are crossed out one by one."""
    ours, theirs = words_of(prediction), words_of(answer)
    left, common = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / max(len(ours), 1), common / max(len(theirs), 1)
    return float(ours == theirs), 2 * precision * recall / (precision + recall) if common else 0.0


def test_grades_are_those_of_another_implementation_to_the_digit():
    draw = random.Random(3)
    pieces = ["The", "the", "a", "an", "Rollo", "rollo's", "king", "10", "—", "U.S.", "a-b", "(an)"]

    def text() -> str:
        return draw.choice(["", " ", ", "]).join(draw.choices(pieces, k=draw.randint(0, 5)))

    texts = {str(number): [text() for _ in range(draw.randint(2, 4))] for number in range(2000)}
    predictions = {name: each[0] for name, each in texts.items()}
    golds = {name: each[1:] for name, each in texts.items()}
    em = score = 0.0
    for name, each in golds.items():
        em += max(straight(predictions[name], gold)[0] for gold in each)
        score += max(straight(predictions[name], gold)[1] for gold in each)
    assert grade(predictions, golds) == {"em": 100.0 * em / 2000, "f1": 100.0 * score / 2000}
    assert min(em, score) > 100


def logits(length, **at):
    """-10 everywhere but at the positions given as p3=2.0."""
    found = torch.full((1, length), -10.0)
    for name, value in at.items():
        found[0, int(name[1:])] = value
    return found


def inside(length, first, last):
    places = torch.arange(length)
    return ((places >= first) & (places <= last))[None]


def test_the_best_pair_is_found_not_the_pair_of_the_best():
    starts, ends = logits(40, p10=5.0, p4=4.5), logits(40, p6=5.0, p12=1.0)
    assert best_spans(starts, ends, inside(40, 3, 38)) == [Span(9.5, 4, 6)]  # 10 to 6 would go backwards


def test_an_answer_lies_in_the_context_and_is_not_too_long():
    starts, ends = logits(80, p0=9.0, p5=3.0, p40=1.0), logits(80, p0=9.0, p35=4.0, p34=2.0)
    context = inside(80, 4, 70)
    assert best_spans(starts, ends, context) == [Span(5.0, 5, 34)]  # 30 tokens; up to 35 there are 31
    assert best_spans(starts, ends, ~context) == [Span(18.0, 0, 0)]


def test_only_the_best_starts_and_ends_are_paired(monkeypatch):
    starts, ends = logits(40, p0=9.0, p1=8.0, p5=3.0), logits(40, p6=4.0)
    monkeypatch.setattr(answers, "N_BEST", 2)
    assert best_spans(starts, ends, inside(40, 4, 38)) == [None]
    monkeypatch.setattr(answers, "N_BEST", 3)
    assert best_spans(starts, ends, inside(40, 4, 38)) == [Span(7.0, 5, 6)]


def test_padding_is_no_answer_and_windows_do_not_see_each_other():
    starts = torch.cat([logits(12, p5=1.0), logits(12, p3=2.0)])
    ends = torch.cat([logits(12, p5=1.0), logits(12, p3=2.0)])
    starts[0, 8:] = ends[0, 8:] = -torch.inf
    context = torch.cat([inside(12, 3, 6), inside(12, 3, 10)])
    assert best_spans(starts, ends, context) == [Span(2.0, 5, 5), Span(4.0, 3, 3)]


def test_all_pairs_of_a_short_window_are_searched():
    torch.manual_seed(7)
    starts, ends, context = torch.randn(50, 19), torch.randn(50, 19), inside(19, 5, 17).expand(50, -1)
    for row, span in enumerate(best_spans(starts, ends, context)):
        pairs = [(starts[row, i].item() + ends[row, j].item(), i, j) for i in range(5, 18) for j in range(i, 18)]
        assert span == max(pairs)
