"""Questions as windows: [CLS] question [SEP] a part of the context [SEP], of at most max_length tokens.

Contexts and questions are kept as tokens, once each; a window is put together when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luqrun.errors import UserError
from luqrun.tasks.question_answering.questions import Answer, QuestionSet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_QUESTION = 64  # tokens; what is longer is cut
SPECIAL = ("[CLS]", "[SEP]", "[PAD]")
AROUND = 3  # [CLS] and two [SEP]
POOL = 32  # batches whose windows are sorted by length together


class Window(NamedTuple):
    """Of a question, by its index: the tokens [begin, end) of its context, and the positions in the window where its
    first answer starts and ends; 0, the position of [CLS], where the window does not hold it whole."""

    question: int
    begin: int
    end: int
    start: int
    stop: int


class Windows:
    """Examples (luqrun.tasks.task): every window of a set of questions, from the shortest to the longest.

    tokenizer: with the tokens SPECIAL, whose truncation and padding are off. Raises UserError where dataset.stride
    leaves no room to go on.
    """

    def __init__(self, of: QuestionSet, tokenizer: Tokenizer, max_length: int, stride: int):
        self.of = of
        self.cls, self.sep, self.pad = map(tokenizer.token_to_id, SPECIAL)
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        contexts = tokenizer.encode_batch(list(of.contexts), add_special_tokens=False)
        self.contexts = [np.array(each.ids, np.int32) for each in contexts]
        self.offsets = [np.array(each.offsets, np.int32).reshape(-1, 2) for each in contexts]
        texts = [question.text for question in of.questions]
        questions = [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
        self.cut = sum(len(ids) > MAX_QUESTION for ids in questions)
        self.questions = [np.array(ids[:MAX_QUESTION], np.int32) for ids in questions]
        longest = max(map(len, self.questions))
        room = max_length - longest - AROUND
        if room <= stride:
            raise UserError(
                f"dataset.stride={stride} must be less than the {max(room, 0)} tokens of context for which "
                f"dataset.max_length={max_length} has room beside the longest question ({longest} and {AROUND} more)"
            )
        found = [window for number in range(len(of.questions)) for window in self._windows(number, max_length, stride)]
        table = np.array(found, np.int32).reshape(-1, len(Window._fields))
        lengths = np.array([len(self.questions[each.question]) + AROUND + each.end - each.begin for each in found])
        order = lengths.argsort(kind="stable")
        self.table, self.lengths = table[order], lengths[order]

    def _windows(self, number: int, max_length: int, stride: int) -> Iterator[Window]:
        question, before = self.of.questions[number], len(self.questions[number]) + AROUND - 1
        length, room = len(self.contexts[question.context]), max_length - len(self.questions[number]) - AROUND
        first, last = tokens_of(self.offsets[question.context], question.answers[0])
        begin = 0
        while True:
            end = min(begin + room, length)
            inside = begin <= first <= last < end
            start, stop = (before + first - begin, before + last - begin) if inside else (0, 0)
            yield Window(number, begin, end, start, stop)
            if end == length:
                return
            begin += room - stride

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Window:
        return Window(*self.table[index].tolist())

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> dict[str, Tensor]:
        """input_ids, token_type_ids, attention_mask: int64 (n, length), padded to the longest of them. start, stop:
        int64 (n,), where the answer is. context: bool (n, length), where it may be."""
        chosen = [self[index] for index in indices.tolist()]
        rows = [self._tokens(window) for window in chosen]
        shape = len(rows), max(map(len, rows))
        ids, kinds, mask = np.full(shape, self.pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        context = np.zeros(shape, bool)
        for row, (window, tokens) in enumerate(zip(chosen, rows, strict=True)):
            before = len(self.questions[window.question]) + AROUND - 1
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            kinds[row, before : len(tokens)] = 1
            context[row, before : len(tokens) - 1] = True
        spans = np.array([(window.start, window.stop) for window in chosen], np.int64)
        return {
            "input_ids": torch.from_numpy(ids),
            "token_type_ids": torch.from_numpy(kinds),
            "attention_mask": torch.from_numpy(mask),
            "start": torch.from_numpy(spans[:, 0].copy()),
            "stop": torch.from_numpy(spans[:, 1].copy()),
            "context": torch.from_numpy(context),
        }

    def _tokens(self, window: Window) -> np.ndarray:
        question = self.of.questions[window.question]
        part = self.contexts[question.context][window.begin : window.end]
        return np.concatenate([[self.cls], self.questions[window.question], [self.sep], part, [self.sep]])

    def text(self, index: int, first: int, last: int) -> str:
        """The context's text from position `first` to `last` of window `index`, as it is written there."""
        window = self[index]
        context = self.of.questions[window.question].context
        shift = window.begin - (len(self.questions[window.question]) + AROUND - 1)
        offsets = self.offsets[context]
        return self.of.contexts[context][offsets[first + shift, 0] : offsets[last + shift, 1]]


class BatchedWindows(Windows):
    """A training set that makes batches of windows of about one length (luqrun.tasks.task.Batched): less is padding,
    which costs time and would take part in the ranges of activations.

    Windows are drawn POOL batches at a time and sorted within; the order of the batches is drawn. Those of an epoch's
    last, incomplete batch are left out. Raises UserError for a batch_size that the windows do not fill once.
    """

    def __init__(self, of: QuestionSet, tokenizer: Tokenizer, max_length: int, stride: int, batch_size: int):
        super().__init__(of, tokenizer, max_length, stride)
        self.batch_size, self.num_batches = batch_size, len(self) // batch_size
        if not self.num_batches:
            raise UserError(
                f"dataset.batch_size={batch_size} is more than the {len(self)} training windows "
                "(all, or what dataset.limit leaves)"
            )

    def batches(self, rng: np.random.Generator) -> list[np.ndarray]:
        drawn, found = rng.permutation(len(self))[: self.num_batches * self.batch_size], []
        for first in range(0, len(drawn), POOL * self.batch_size):
            pool = np.sort(drawn[first : first + POOL * self.batch_size])  # the set is in the order of lengths
            found += np.split(pool, len(pool) // self.batch_size)
        return [found[number] for number in rng.permutation(len(found))]


def tokens_of(offsets: np.ndarray, answer: Answer) -> tuple[int, int]:
    """The first and the last token that have characters of the answer; the last is before the first where none has.

    offsets: int (tokens, 2), where each token begins and ends in the text.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    first = np.searchsorted(ends, answer.start, side="right")
    last = np.searchsorted(starts, answer.start + len(answer.text), side="left") - 1
    return int(first), int(last)


def chosen(of: QuestionSet, indices: Sequence[int]) -> QuestionSet:
    """These questions alone, with their paragraphs."""
    kept = [of.questions[index] for index in indices]
    places = {number: place for place, number in enumerate(dict.fromkeys(question.context for question in kept))}
    moved = [question._replace(context=places[question.context]) for question in kept]
    return QuestionSet([of.contexts[number] for number in places], moved)
