"""Fingerprints: found without reading the data, and the same as of the data that are read."""

import dataclasses
import json

import pytest
from running import tiny

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks import fingerprint_data
from luqrun.tasks.classification.images import CIFAR
from luqrun.tasks.fingerprint import SAMPLES, hash_of, sizes


def test_the_sizes_of_many_files_are_those_of_some_with_the_ends(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("luqrun.tasks.fingerprint._size", lambda path: asked.append(path) or len(asked))
    paths = [f"{number}" for number in range(10 * SAMPLES)]
    assert json.loads(sizes(paths)) == list(range(1, SAMPLES + 1))
    assert (asked[0], asked[-1], len(set(asked))) == (paths[0], paths[-1], SAMPLES)
    for count in (0, 1, 2, SAMPLES):
        asked.clear()
        sizes(paths[:count])
        assert asked == paths[:count]


def test_a_hash_knows_where_its_parts_end():
    assert len({hash_of(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [])}) == 4


def on(root, name):
    return dataclasses.replace(tiny(), dataset=DatasetConfig(name=name, root=str(root)))


@pytest.mark.parametrize("name", CIFAR)
def test_the_files_of_cifar_are_known_by_their_sizes(tmp_path, name):
    kind = CIFAR[name]
    files = [each for each, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    found = []
    for place, size in (("one", 10), ("two", 10), ("three", 11)):
        (tmp_path / place / kind.base_folder).mkdir(parents=True)
        for each in files:
            (tmp_path / place / kind.base_folder / each).write_bytes(bytes(size))
        found.append(fingerprint_data(on(tmp_path / place, name)))
    assert [each.pop("root") for each in found] == [str(tmp_path / place) for place in ("one", "two", "three")]
    assert found[0] == found[1] != found[2]
    (tmp_path / "four" / kind.base_folder).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"dataset\.root=.*the files of {kind.__name__} are not there, or damaged"):
        fingerprint_data(on(tmp_path / "four", name))
