"""Parallel text as it lies on disk: what is read, what tells it from other text, and each way it can be wrong."""

import gzip

import pytest

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.translation.parallel_text import find_files, fingerprint, read_pairs

ENGLISH, GERMAN = "A dog runs.\nTwo cats\u2028sleep.\n", "Ein Hund läuft.\nZwei Katzen schlafen.\n"


def config(root, **changes) -> DatasetConfig:
    return DatasetConfig(name="parallel", root=str(root), source="en", target="de", **changes)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.en").write_text(ENGLISH)
        (tmp_path / f"{split}.de.gz").write_bytes(gzip.compress(GERMAN.encode()))
    return tmp_path


def test_plain_and_compressed_sides_are_read_line_by_line(root):
    files = find_files(config(root))
    assert list(files) == ["train", "val", "test"]
    pairs = read_pairs(*files["val"])
    assert pairs.source == ["A dog runs.", "Two cats sleep."]  # what only Unicode calls the end of a line is a space
    assert pairs.target == ["Ein Hund läuft.", "Zwei Katzen schlafen."]


def test_a_test_set_may_be_absent_and_the_others_may_not(root):
    for side in ("en", "de.gz"):
        (root / f"test.{side}").unlink()
    assert list(find_files(config(root))) == ["train", "val"]
    (root / "val.de.gz").unlink()
    with pytest.raises(UserError, match=r"dataset\.root=.*: there is no val\.de \(or val\.de\.gz\); expected ROOT/"):
        find_files(config(root))


def test_one_side_of_a_test_set_is_a_mistake(root):
    (root / "test.en").unlink()
    with pytest.raises(UserError, match=r"there is no test\.en"):
        find_files(config(root))


def test_each_data_set_has_its_usual_names(root):
    names = {"multi30k": "test_2016_flickr", "wmt14": "newstest2013"}
    for name, stem in names.items():
        with pytest.raises(UserError, match=stem):
            find_files(DatasetConfig(name=name, source="en", target="de"))


def test_other_languages_are_other_files(root):
    with pytest.raises(UserError, match=r"there is no train\.fr"):
        find_files(DatasetConfig(name="parallel", root=str(root), source="en", target="fr"))


def test_no_root_or_none_there(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.root is not given; dataset=parallel expects ROOT/"):
        find_files(DatasetConfig(name="parallel", source="en", target="de"))
    with pytest.raises(UserError, match="there is no such folder"):
        find_files(config(tmp_path / "nowhere"))


WRONG = {
    "lengths": (b"one\ntwo\n", b"eins\n", r"left\.en has 2 lines, .*right\.de has 1"),
    "utf-8": (b"one\ntwo\n", b"eins\nzw\xffi\n", r"right\.de, line 2: not UTF-8"),
    "empty line": (b"one\n\nthree\n\n", b"eins\nzwei\ndrei\nvier\n", r"left\.en, line 2: empty, and 1 more"),
    "blank target": (b"one\n", b" \t\n", r"right\.de, line 1: empty"),
    "nothing": (b"", b"", r"are empty"),
}


@pytest.mark.parametrize(("left", "right", "said"), WRONG.values(), ids=WRONG)
def test_wrong_text_is_named_with_file_and_line(left, right, said, tmp_path):
    (tmp_path / "left.en").write_bytes(left)
    (tmp_path / "right.de").write_bytes(right)
    with pytest.raises(UserError, match=said) as mistake:
        read_pairs(tmp_path / "left.en", tmp_path / "right.de")
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("name", ["train.en", "test.de.gz"])
def test_the_fingerprint_is_of_all_files(name, root):
    before = fingerprint(config(root))
    with (root / name).open("a") as file:
        file.write("More.\n")
    assert fingerprint(config(root)) != before
