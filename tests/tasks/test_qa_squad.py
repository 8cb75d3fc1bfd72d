"""SQuAD's files: what is read, and what is wrong with a file, in one line."""

import json
import re

import pytest
from questions import NORMANS, RIVERS, config, question, sample, squad, write_squad

from luqrun import tasks
from luqrun.errors import UserError
from luqrun.tasks.question_answering import squad as module
from luqrun.tasks.question_answering.questions import Answer, Question


def read(root):
    return module.read(config(root).dataset)


@pytest.mark.parametrize("compressed", [False, True])
def test_paragraphs_questions_and_answers_are_read_in_order(tmp_path, compressed):
    train, val = read(write_squad(tmp_path / "data", compressed=compressed))
    assert train == val
    assert train.contexts == [NORMANS, RIVERS]
    assert [each.id for each in train.questions] == ["n1", "n2", "r1", "r2"]
    start = NORMANS.index("a région")
    both = Answer("Normandy", NORMANS.index("Normandy")), Answer("a région in France", start)
    assert train.questions[0] == Question("n1", "What did the Normans name?", 0, both)
    assert train.questions[3].context == 1


def test_of_a_plain_and_a_compressed_file_the_plain_one_is_read(tmp_path):
    root = write_squad(tmp_path / "data", compressed=True)
    write_squad(root, val=squad((RIVERS, [question("only", "Long?", "1,230 km", context=RIVERS)])))
    assert [each.id for each in read(root)[1].questions] == ["only"]


def test_a_mark_of_byte_order_is_no_mistake(tmp_path):
    root = write_squad(tmp_path / "data")
    path = root / "dev-v1.1.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(root)[1].questions) == 4


def refused(root) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_questions_without_answers_are_counted_and_the_first_is_named(tmp_path):
    content = sample()
    content["data"][0]["paragraphs"][0]["qas"][1]["answers"] = []
    del content["data"][0]["paragraphs"][1]["qas"][0]["answers"]
    root = write_squad(tmp_path / "data", train=content)
    assert re.search(r"train-v1\.1\.json: 2 questions have no answer \(the first is n2\)", refused(root))


def test_answers_that_stand_elsewhere_are_counted_and_the_first_question_is_named(tmp_path):
    content = sample()
    for number, place in ((0, 3), (1, -1)):
        content["data"][0]["paragraphs"][number]["qas"][1]["answers"][0]["answer_start"] = place
    root = write_squad(tmp_path / "data", val=content)
    expected = r"dev-v1\.1\.json: 2 answers are not at answer_start in the paragraph \(the first is of question n2\)"
    assert re.search(expected, refused(root))


def test_ids_of_the_development_set_are_not_repeated(tmp_path):
    twice = squad((NORMANS, [question("n", "Who?", "Rollo"), question("n", "Where?", "France")]))
    assert "1 questions have the id of another one" in refused(write_squad(tmp_path / "data", val=twice))


def test_invalid_utf_8_is_told_with_its_line(tmp_path):
    root = write_squad(tmp_path / "data")
    path = root / "train-v1.1.json"
    lines = path.read_bytes().split(b"\n")
    number = next(place for place, line in enumerate(lines) if "région".encode() in line)
    lines[number] = lines[number].replace("é".encode(), b"\xe9")
    path.write_bytes(b"\n".join(lines))
    assert f"train-v1.1.json, line {number + 1}: not UTF-8 (byte " in refused(root)


def test_broken_json_is_told_with_its_line(tmp_path):
    root = write_squad(tmp_path / "data")
    path = root / "train-v1.1.json"
    path.write_text(path.read_text()[:-40])
    assert re.search(r"train-v1\.1\.json, line \d+: not JSON \(.+\)", refused(root))


@pytest.mark.parametrize("stored", [b"[" * 100_000, b"1" * 5000])
def test_json_that_python_does_not_read_is_refused(tmp_path, stored):
    root = write_squad(tmp_path / "data")
    (root / "dev-v1.1.json").write_bytes(stored)
    assert "dev-v1.1.json" in refused(root)


@pytest.mark.parametrize("change", [lambda stored: stored[:-9], lambda stored: b"no gzip", lambda stored: b""])
def test_a_damaged_compressed_file_is_named(tmp_path, change):
    root = write_squad(tmp_path / "data", compressed=True)
    path = root / "dev-v1.1.json.gz"
    path.write_bytes(change(path.read_bytes()))
    assert "dev-v1.1.json.gz" in refused(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("data"), "data must be a list"),
        (lambda content: content["data"].insert(0, 3), r"data[0].paragraphs must be a list"),
        (
            lambda content: content["data"][0]["paragraphs"][1].pop("context"),
            "data[0].paragraphs[1].context must be text",
        ),
        (lambda content: content["data"][0]["paragraphs"][0]["qas"][0].update(id=7), "qas[0].id must be text"),
        (lambda content: content["data"][0]["paragraphs"][0]["qas"][0].update(answers={}), "answers must be a list"),
        (
            lambda content: content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=True),
            "qas[0].answers[0].answer_start must be an integer",
        ),
        (lambda content: content["data"][0]["paragraphs"][0]["qas"][0].update(question="\ud800"), "surrogate"),
        (lambda content: content.update(data=[]), "holds no question"),
        (lambda content: content["data"][0].update(paragraphs=[]), "holds no question"),
    ],
)
def test_another_layout_is_told_with_the_place(tmp_path, change, words):
    content = json.loads(json.dumps(sample()))
    change(content)
    root = write_squad(tmp_path / "data")
    (root / "train-v1.1.json").write_text(json.dumps(content))
    assert words in refused(root)


def test_missing_files_and_folders_are_told_with_the_layout(tmp_path):
    root = write_squad(tmp_path / "data")
    (root / "dev-v1.1.json").unlink()
    text = refused(root)
    missing = "there is no dev-v1.1.json (or dev-v1.1.json.gz); expected ROOT/train-v1.1.json"
    assert f"dataset.root={root}: {missing}" in text
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    bare = config(root)
    bare.dataset.root = None
    for call in (tasks.fingerprint_data, tasks.build_task):
        with pytest.raises(UserError, match=r"dataset\.root is not given; dataset=squad expects ROOT/"):
            call(bare)


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_the_place(tmp_path):
    def found(root):
        return module.fingerprint(config(root).dataset)

    first, other = write_squad(tmp_path / "one"), write_squad(tmp_path / "two")
    one, two = found(first), found(other)
    assert (one.pop("root"), two.pop("root")) == (str(first), str(other))
    assert one == two
    path = other / "dev-v1.1.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert found(other)["names_and_sizes"] != one["names_and_sizes"]
