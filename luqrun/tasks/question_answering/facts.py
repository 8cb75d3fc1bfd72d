"""The data set that needs no file: paragraphs of generated facts, and questions about them.

    The red boat belongs to Anna Berg. Otto Lind made the brown clock. The white bell costs 42 crowns. ...
    Who owns the red boat?  Anna Berg

All is drawn anew for each paragraph, in any order, so that an answer follows from the paragraph alone. Others stand in
it that would suit the kind of question: another name, number or town. The set depends on no run seed: like SQuAD, it is
a fixed thing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from luqrun.tasks.question_answering.questions import Answer, Question, QuestionSet

DATA_SEED = 2112
VAL_QUESTIONS = 1000
FACTS = 4  # of a paragraph
QUESTIONS = 3  # about a paragraph

NAMES = ("Anna", "Otto", "Maria", "Peter", "Clara", "Hugo", "Emma", "Paul", "Julia", "Karl", "Rosa", "Felix", "Nora")
SURNAMES = ("Berg", "Lind", "Wolf", "Stone", "Winter", "Fischer", "Brook", "Hale")
TOWNS = ("Rome", "Vienna", "Oslo", "Lisbon", "Prague", "Dublin", "Athens", "Bergen", "Cairo", "Lima")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
THINGS = ("boat", "horse", "house", "chair", "lamp", "coat", "clock", "table", "violin", "wagon", "bell", "kettle")
LOWEST, HIGHEST = 10, 99  # of numbers


class Relation(NamedTuple):
    """How a fact is told, and asked for; kind: of its answer, name, town or the unit of a number."""

    fact: str
    question: str
    kind: str


RELATIONS = (
    Relation("The {thing} belongs to {answer}.", "Who owns the {thing}?", "name"),
    Relation("{answer} made the {thing}.", "Who made the {thing}?", "name"),
    Relation("The {thing} costs {answer}.", "What does the {thing} cost?", "crowns"),
    Relation("The {thing} is {answer} old.", "How old is the {thing}?", "years"),
    Relation("The {thing} weighs {answer}.", "How heavy is the {thing}?", "pounds"),
    Relation("The {thing} stands in {answer}.", "Where is the {thing}?", "town"),
    Relation("The {thing} came from {answer}.", "Where did the {thing} come from?", "town"),
)


def draw(count: int, split: int) -> QuestionSet:
    """`count` questions of one split (0: training, 1: validation)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([DATA_SEED, split])))
    contexts, questions = [], []
    while len(questions) < count:
        text, asked = _paragraph(rng)
        for number in rng.choice(FACTS, QUESTIONS, replace=False):
            question, answer = asked[number]
            questions.append(Question(f"{split}-{len(questions)}", question, len(contexts), (answer,)))
        contexts.append(text)
    return QuestionSet(contexts, questions[:count])


def _paragraph(rng: np.random.Generator) -> tuple[str, list[tuple[str, Answer]]]:
    """The text, and of each of its facts the question and the answer."""
    text, asked = "", []
    relations, things = rng.choice(len(RELATIONS), FACTS, replace=False), rng.choice(len(THINGS), FACTS, replace=False)
    for relation, thing in zip(relations, things, strict=True):
        fact, question, kind = RELATIONS[relation]
        shown = f"{_one_of(rng, COLOURS)} {THINGS[thing]}"
        answer = _answer(rng, kind)
        told = fact.format(thing=shown, answer=answer)
        asked.append((question.format(thing=shown), Answer(answer, len(text) + told.index(answer))))
        text += told + " "
    return text.rstrip(), asked


def _answer(rng: np.random.Generator, kind: str) -> str:
    if kind == "name":
        return f"{_one_of(rng, NAMES)} {_one_of(rng, SURNAMES)}"
    return _one_of(rng, TOWNS) if kind == "town" else f"{rng.integers(LOWEST, HIGHEST + 1)} {kind}"


def _one_of(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
