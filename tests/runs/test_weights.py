"""Files of weights: which kinds are read, how one is named, and what is refused in a line that names it."""

import hashlib
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from running import assert_same_tensors, composed, tiny
from safetensors.torch import save_file
from torch import nn

from luqrun import tasks
from luqrun.cli.validation import to_config
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.weights import OF_TEXT, PACKED, find_file, fingerprint_weights, is_file, read_weights
from luqrun.tasks import fingerprint_data

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.0, -1.0])}


def write(path: Path, content, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path, metadata or None)
    else:
        torch.save(content, path)
    return path


def write_checkpoint(path: Path, *overrides) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, tiny(*overrides), {}, STATE, {}, {"epoch": 1, "batch": 0})
    return path


def refusal(weights) -> str:
    with pytest.raises(UserError) as error:
        read_weights(str(weights))
    assert "\n" not in str(error.value)
    assert str(weights) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_a_state_dict_is_read_as_it_is(tmp_path, name):
    found = read_weights(str(write(tmp_path / name, STATE)))
    assert_same_tensors(found.tensors, STATE)
    assert (found.settings, found.origin, found.recipe) == (None, "", None)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_training_scripts_put_around_it_is_taken_off(tmp_path, key, prefix):
    content = {"epoch": 3, key: {prefix + name: tensor for name, tensor in STATE.items()}}
    assert_same_tensors(read_weights(str(write(tmp_path / "w.pt", content))).tensors, STATE)


def test_a_prefix_of_some_names_stays(tmp_path):
    content = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert read_weights(str(write(tmp_path / "w.pt", content))).tensors.keys() == content.keys()


def test_a_checkpoint_says_of_what_run_it_is(tmp_path):
    found = read_weights(str(write_checkpoint(tmp_path / "last.pt", "quant=luq_smp2")))
    assert_same_tensors(found.tensors, STATE)
    assert found.origin == "model.name=resnet8, dataset.name=glyphs, quant.name=luq_smp2"
    assert found.recipe == "luq_smp2"


def test_a_pattern_means_the_one_file_that_it_fits(tmp_path):
    paths = [write(tmp_path / f"run-seed{seed}-abc" / "checkpoints" / "last.pt", STATE) for seed in (0, 1)]
    assert find_file(str(tmp_path / "run-seed1-*" / "checkpoints" / "last.pt")) == paths[1]
    text = refusal(tmp_path / "run-*" / "checkpoints" / "last.pt")
    assert "fits 2 files" in text
    assert all(str(path) in text for path in paths)


def test_a_folder_is_no_file_and_a_run_s_checkpoint_is_named(tmp_path):
    assert "is a folder, not a file; model.weights takes safetensors" in refusal(tmp_path)
    path = write(tmp_path / "checkpoints" / "last.pt", STATE)
    assert refusal(tmp_path).endswith(f"its checkpoint is {path}")
    assert [is_file(each) for each in (None, str(tmp_path), str(path))] == [False, False, True]
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere.pt")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    content = {"state_dict": STATE, "trap": Bomb()}
    path.write_bytes(pickle.dumps(content)) if how == "pickle" else torch.save(content, path)
    words = {
        "torch": "holds Python objects beside tensors (posix.system), which can run code, and is not read",
        "pickle": "a pickle that torch.save did not write, which can run code: it is not read",
    }
    assert words[how] in refusal(path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [{"model": STATE, "args": Namespace(lr=0.1)}, nn.Linear(2, 2)])
def test_python_objects_are_named(tmp_path, content):
    assert "holds Python objects beside tensors (" in refusal(write(tmp_path / "w.pt", content))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["w.safetensors", "w.pt", "last.pt"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kind, share):
    path = write_checkpoint(tmp_path / kind) if kind == "last.pt" else write(tmp_path / kind, STATE)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert f"{path} is cut off, or not a file of" in refusal(path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "last.pt")
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    assert "its content does not match its checksum; model.weights takes" in refusal(path)


def test_a_checkpoint_of_an_earlier_luqrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    path = write_checkpoint(tmp_path / "last.pt")
    monkeypatch.undo()
    assert "of an earlier luqrun (version 3 of checkpoints, here it is 4)" in refusal(path)
    progress = {"epoch": 0, "batch": 0, "step": 0}
    # Before they had a checksum.
    content = {"version": 1, "config": {}, "num_classes": 3, "model": STATE, "optimizer": {}, "progress": progress}
    assert "of an earlier luqrun (version 1 of checkpoints" in refusal(write(path, content))


def test_a_checkpoint_that_lost_its_checksum_is_told_as_one(tmp_path):
    path = write_checkpoint(tmp_path / "last.pt")
    path.write_bytes(path.read_bytes().partition(b"\nsha256 ")[0])
    assert "is a damaged checkpoint of luqrun, or one of an earlier luqrun (version 4" in refusal(path)


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("more", [{}, {"config": {"lr": 0.1}, "epoch": 3}, {"progress": 0.5}])
def test_a_checkpoint_of_another_script_may_have_a_version_too(tmp_path, key, more):
    content = {"version": 2, "optimizer": {"state": {}}, key: STATE, **more}
    assert_same_tensors(read_weights(str(write(tmp_path / "w.pt", content))).tensors, STATE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([STATE], "holds a list and no state_dict"),
        (torch.ones(2), "holds a Tensor and no state_dict"),
        ({}, "holds a dict and no state_dict"),
        ({"epoch": 3}, "holds no state_dict: epoch is a int"),
        ({"model": {"fc.weight": [1.0]}}, "holds no state_dict: fc.weight is a list"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, content, words):
    assert words in refusal(write(tmp_path / "w.pt", content))


def test_packed_codes_are_not_what_a_training_starts_from(tmp_path):
    path = write(tmp_path / "w.safetensors", STATE, **{PACKED: "how"})
    assert "holds packed codes, from which no training starts; model.weights takes what" in refusal(path)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    run, other = (write_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("a", "b"))
    other.write_bytes(run.read_bytes())
    first = fingerprint_weights(str(run))
    assert fingerprint_weights(str(other)) == first
    for number, name in enumerate(OF_TEXT):
        (tmp_path / "b" / name).write_text("{}")
        assert fingerprint_weights(str(other)) == first
        assert fingerprint_weights(str(other), OF_TEXT[: number + 1]) != first
        assert fingerprint_weights(str(other), OF_TEXT[number + 1 :]) == first
    one, two = write(tmp_path / "1.pt", STATE), write(tmp_path / "2.pt", {**STATE, "fc.bias": torch.tensor([1.0, 1.0])})
    assert fingerprint_weights(str(one)) != fingerprint_weights(str(two))


@pytest.mark.parametrize(
    ("overrides", "reads"),
    [
        (("dataset=glyphs", "model=resnet8"), False),
        (("dataset=sentences", "model=transformer_tiny", "schedule=sentences"), True),
        (("dataset=facts", "model=bert_tiny", "schedule=facts"), True),
    ],
    ids=["images", "sentences", "questions"],
)
def test_what_lies_beside_a_file_counts_where_it_is_read(tmp_path, monkeypatch, overrides, reads):
    file = write(tmp_path / "w.pt", STATE)
    config = to_config(composed(*overrides, f"model.weights={file}"))
    first = fingerprint_data(config)["weights"]
    assert first == hashlib.sha256(hashlib.sha256(file.read_bytes()).digest()).hexdigest()[:16]  # as runs recorded it
    monkeypatch.setattr(tasks, "_fingerprints", {})
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (fingerprint_data(config)["weights"] != first) == reads
