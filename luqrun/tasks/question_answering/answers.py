"""From logits to answers, and how well an answer fits: SQuAD's exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

N_BEST = 20  # starts, and ends, of a window that are looked at
LONGEST = 30  # tokens of an answer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Span(NamedTuple):
    """The best answer of a window: the sum of its two logits, and its first and last position; None where all of the
    best starts and ends lie outside of the context, or too far from each other."""

    score: float
    first: int
    last: int


def best_spans(starts: Tensor, ends: Tensor, context: Tensor) -> list[Span | None]:
    """The best answer of each window, among the pairs of its N_BEST best starts and ends.

    starts, ends: logits, float (n, length), -inf at padding; context: bool (n, length), where an answer may lie.
    """
    count = min(N_BEST, starts.shape[1])
    (start_logits, firsts), (end_logits, lasts) = starts.float().topk(count), ends.float().topk(count)
    scores = start_logits.double()[:, :, None] + end_logits.double()[:, None, :]
    inside = context.gather(1, firsts)[:, :, None] & context.gather(1, lasts)[:, None, :]
    lengths = lasts[:, None, :] - firsts[:, :, None] + 1
    scores = scores.masked_fill(~(inside & (lengths >= 1) & (lengths <= LONGEST)), -torch.inf)
    best, pairs = scores.flatten(1).max(1)
    firsts = firsts.gather(1, (pairs // count)[:, None])[:, 0]
    lasts = lasts.gather(1, (pairs % count)[:, None])[:, 0]
    found = zip(best.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    return [Span(score, first, last) if score > -torch.inf else None for score, first, last in found]


def normalized(text: str) -> str:
    """In lower case, without ASCII punctuation, then without the words a, an and the, single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> float:
    """1.0 if both are the same when normalized, else 0.0."""
    return float(normalized(prediction) == normalized(answer))


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of the shares of words in common, of the prediction's and of the answer's, a word as often as
    both have it; 0 without one."""
    ours, theirs = normalized(prediction).split(), normalized(answer).split()
    common = (Counter(ours) & Counter(theirs)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def grade(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """{"f1", "em"}: per cent, means over the questions, each counted with the answer of its own that fits best.

    predictions: text by question id, 0 for a question that is not among them; answers: at least one text for each.
    """
    sums = {"f1": 0.0, "em": 0.0}
    for name, texts in answers.items():
        if name in predictions:
            sums["f1"] += max(f1(predictions[name], text) for text in texts)
            sums["em"] += max(exact(predictions[name], text) for text in texts)
    return {name: 100.0 * value / len(answers) for name, value in sums.items()}
