"""Questions about paragraphs, as they are read or generated: text alone, no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """A span of a context: its text, and the index of its first character."""

    text: str
    start: int


class Question(NamedTuple):
    """context: the index of its paragraph. answers: at least one; training takes the first, a score the best."""

    id: str
    text: str
    context: int
    answers: tuple[Answer, ...]


class QuestionSet(NamedTuple):
    """Paragraphs, and questions about them in their order."""

    contexts: Sequence[str]
    questions: Sequence[Question]
