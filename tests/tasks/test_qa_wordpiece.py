"""The tokenizer: trained alike always, cached, read from a folder, and refused where it is another's."""

import json
import subprocess
import sys

import pytest
from questions import NORMANS, RIVERS

from luqrun.errors import UserError
from luqrun.tasks.question_answering import wordpiece

TEXTS = [NORMANS, RIVERS]
CODE = """
import hashlib, random
from luqrun.tasks.question_answering import wordpiece
draw = random.Random(1)
texts = [" ".join("".join(draw.choices("abcdeé", k=draw.randint(1, 6))) for _ in range(300)) for _ in range(40)]
print(hashlib.sha256(wordpiece.train(texts, 300).to_str().encode()).hexdigest())
"""


def test_the_same_text_makes_the_same_tokenizer_in_every_process():
    started = [subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate(timeout=100)[0] for process in started}) == 1


def test_it_is_lower_cased_wordpiece_with_berts_special_tokens():
    tokenizer = wordpiece.train(TEXTS * 3, 300)
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in wordpiece.TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("The RÉGION", add_special_tokens=False).tokens == ["the", "region"]
    found = tokenizer.encode("normanly", add_special_tokens=False)
    assert all(token.startswith("##") for token in found.tokens[1:])
    assert tokenizer.encode("x\u4e2dy", add_special_tokens=False).tokens[1] == "[UNK]"
    assert len(vocabulary) <= 300
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_it_is_cached_by_what_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = wordpiece.trained(TEXTS, 200)
    (file,) = (tmp_path / "luqrun").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(wordpiece, "train", None)  # not needed
        assert wordpiece.trained(TEXTS, 200).to_str() == first.to_str()
    wordpiece.trained(TEXTS, 210)
    wordpiece.trained([NORMANS + RIVERS], 200)
    assert len(list((tmp_path / "luqrun").iterdir())) == 3
    file.write_text("{damaged")
    assert wordpiece.trained(TEXTS, 200).to_str() == first.to_str()
    assert file.read_text() == first.to_str()


def test_without_a_place_for_the_cache_it_is_trained_each_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert wordpiece.trained(TEXTS, 200).to_str() == wordpiece.train(TEXTS, 200).to_str()
    assert "it is made again each time" in caplog.text


def test_a_folder_s_tokenizer_is_read_without_its_truncation_and_padding(tmp_path):
    made = wordpiece.train(TEXTS, 200)
    made.enable_truncation(5)
    made.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    found = wordpiece.read(tmp_path, made.get_vocab_size())
    assert len(found.encode(NORMANS).ids) > 9
    assert len(found.encode("the").ids) == 3


def test_a_vocabulary_of_lines_makes_the_same_tokens(tmp_path):
    made = wordpiece.train(TEXTS, 200)
    words = sorted(made.get_vocab(), key=made.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    found = wordpiece.read(tmp_path, len(words))
    assert found.encode(NORMANS, RIVERS).ids == made.encode(NORMANS, RIVERS).ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = wordpiece.read(tmp_path, len(words))
    assert cased.encode("The", add_special_tokens=False).tokens == ["[UNK]"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, "", "neither tokenizer.json nor vocab.txt is there"),
        ("tokenizer.json", "{", "tokenizer.json is no tokenizer"),
        ("vocab.txt", "one\ntwo\n", "vocab.txt is not a BERT's vocabulary: it has no [CLS], [SEP], [PAD], [UNK]"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt is no tokenizer"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        wordpiece.read(tmp_path, 100)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_more_tokens_than_the_network_knows_are_refused(tmp_path):
    made = wordpiece.train(TEXTS, 200)
    size = made.get_vocab_size()
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    assert wordpiece.read(tmp_path, size).get_vocab_size() == size
    with pytest.raises(UserError, match=f"has {size} tokens, the network's embedding {size - 1}"):
        wordpiece.read(tmp_path, size - 1)
