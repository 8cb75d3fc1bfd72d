"""SQuAD v1.1 as its authors pack it: one JSON file for training, one for development, plain or gzipped."""

from __future__ import annotations

import json
from pathlib import Path

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.question_answering.questions import Answer, Question, QuestionSet
from luqrun.tasks.text_files import find_file, fingerprint_files, read_lines, root_folder

FILES = {"train": "train-v1.1.json", "val": "dev-v1.1.json"}
LAYOUT = "ROOT/train-v1.1.json and ROOT/dev-v1.1.json, or the same with .gz"


def read(config: DatasetConfig) -> tuple[QuestionSet, QuestionSet]:
    """The training and the development set. Raises UserError naming dataset.root, or the file, line or question."""
    train, val = (read_file(path) for path in _paths(config))
    if repeated := len(val.questions) - len({question.id for question in val.questions}):
        raise UserError(f"{_paths(config)[1]}: {repeated} questions have the id of another one")
    return train, val


def fingerprint(config: DatasetConfig) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data: names and sizes of the files."""
    return fingerprint_files(config, _paths(config))


def _paths(config: DatasetConfig) -> list[Path]:
    """Of both files, the plain one if there are two."""
    root = root_folder(config, LAYOUT)
    found = [find_file(root, name) for name in FILES.values()]
    if None in found:
        missing = list(FILES.values())[found.index(None)]
        raise UserError(f"dataset.root={config.root}: there is no {missing} (or {missing}.gz); expected {LAYOUT}")
    return found


def read_file(path: Path) -> QuestionSet:
    """The paragraphs and questions of one file. Raises UserError naming it, and the line or the question."""
    articles = _member(_json(path), "data", list, path, "")
    contexts, questions = [], []
    for number, article in enumerate(articles):
        where = f"data[{number}]"
        for index, paragraph in enumerate(_member(article, "paragraphs", list, path, where)):
            there = f"{where}.paragraphs[{index}]"
            contexts.append(_text(paragraph, "context", path, there))
            for place, question in enumerate(_member(paragraph, "qas", list, path, there)):
                questions.append(_question(question, len(contexts) - 1, path, f"{there}.qas[{place}]"))
    if not questions:
        raise UserError(f"{path} holds no question")
    _check_answers(contexts, questions, path)
    return QuestionSet(contexts, questions)


def _question(found: object, context: int, path: Path, where: str) -> Question:
    answers = found.get("answers", []) if isinstance(found, dict) else []
    if not isinstance(answers, list):
        raise _not_squad(path, where, "answers")
    spans = []
    for number, answer in enumerate(answers):
        there = f"{where}.answers[{number}]"
        spans.append(Answer(_text(answer, "text", path, there), _member(answer, "answer_start", int, path, there)))
    name, text = _text(found, "id", path, where), _text(found, "question", path, where)
    return Question(name, text, context, tuple(spans))


def _check_answers(contexts: list[str], questions: list[Question], path: Path) -> None:
    """Each question has an answer, and each answer stands in its paragraph where it says."""
    without = [q.id for q in questions if not q.answers or not all(answer.text.strip() for answer in q.answers)]
    if without:
        count = _count(without, "question has no answer", "questions have no answer")
        raise UserError(f"{path}: {count} (the first is {without[0]}); in SQuAD v1.1 each has one")
    elsewhere = [
        question.id
        for question in questions
        for text, start in question.answers
        if start < 0 or not contexts[question.context].startswith(text, start)
    ]
    if elsewhere:
        count = _count(elsewhere, "answer is not", "answers are not")
        raise UserError(f"{path}: {count} at answer_start in the paragraph (the first is of question {elsewhere[0]})")


def _count(found: list, one: str, several: str) -> str:
    return f"1 {one}" if len(found) == 1 else f"{len(found)} {several}"


def _json(path: Path) -> object:
    text = "".join(read_lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of too many digits
        raise UserError(f"{path} is not SQuAD's JSON ({type(error).__name__})") from None


def _member(found: object, key: str, kind: type, path: Path, where: str):
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _not_squad(path, where, key)
    return value


def _text(found: object, key: str, path: Path, where: str) -> str:
    value = _member(found, key, str, path, where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: {where}.{key} holds half a surrogate pair, which is no character") from None
    return value


def _not_squad(path: Path, where: str, key: str) -> UserError:
    kinds = {"answer_start": "an integer", **dict.fromkeys(("data", "paragraphs", "qas", "answers"), "a list")}
    kind = kinds.get(key, "text")
    return UserError(f"{path} is not in SQuAD's layout: {f'{where}.{key}'.lstrip('.')} must be {kind}")
