"""A folder of weights: what is read, what is refused, and that no pickle is."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from questions import SIZES, config, write_squad, write_weights
from safetensors.torch import load_file, save_file

from luqrun import tasks
from luqrun.errors import UserError
from luqrun.tasks.question_answering.networks import read_network
from luqrun.tasks.question_answering.weights import fingerprint_weights, read_shapes, weights_folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "bert")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bert")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_squad(tmp_path_factory.mktemp("squad") / "data")


def run_config(root, folder, *overrides):
    lengths = "dataset.max_length=48", "dataset.stride=8"
    return config(root, "model=bert", f"model.weights={folder}", *lengths, *overrides)


def network(folder, **changes):
    model = config(None, "model=bert", f"model.weights={folder}").model
    for key, value in changes.items():
        setattr(model, key, value)
    return read_network(model, Path(folder))


def change(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, edit) -> None:
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_network_has_the_folder_s_sizes_weights_and_dropout(folder, caplog):
    with caplog.at_level("INFO"):
        found = network(folder)
    stored, state = load_file(folder / "model.safetensors"), found.state_dict()
    read = {name.removeprefix("bert."): tensor for name, tensor in state.items() if not name.startswith("qa_outputs")}
    assert read.keys() == {name for name in stored if not name.startswith("pooler")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in read.items())
    assert {module.p for module in found.modules() if isinstance(module, torch.nn.Dropout)} == {0.25, 0.1}
    assert "2 layers of 16; the span head is random, 2 tensors are not needed" in caplog.text


def test_the_dropout_of_the_command_line_goes_before(folder):
    found = network(folder, dropout=0.0)
    assert {module.p for module in found.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_a_span_head_and_names_of_converted_weights_are_read(folder):
    head = torch.full((2, SIZES["hidden_size"]), 0.5)

    def edit(tensors):
        names = {name: f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma") for name in tensors}
        renamed = {new.replace("LayerNorm.bias", "LayerNorm.beta"): tensors[name].half() for name, new in names.items()}
        return {**renamed, "qa_outputs.weight": head, "qa_outputs.bias": torch.tensor([1.0, 2.0])}

    expected = network(folder).state_dict()
    rewrite(folder, edit)
    found = network(folder).state_dict()
    assert torch.equal(found.pop("qa_outputs.weight"), head)
    assert found.pop("qa_outputs.bias").tolist() == [1.0, 2.0]
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float()), name


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickle_is_refused_and_never_loaded(folder, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for call in (tasks.fingerprint_data, tasks.build_task):
        text = refused(call, run_config(root, folder))
        assert "there is no model.safetensors; its pytorch_model.bin is a pickle, which can run code" in text
    assert not Path("exploded").exists()


def test_what_is_not_there_is_told(folder, root, tmp_path):
    assert "there is no such file or folder" in refused(tasks.fingerprint_data, run_config(root, tmp_path / "nowhere"))
    (folder / "config.json").unlink()
    assert "there is no config.json" in refused(tasks.fingerprint_data, run_config(root, folder))
    (folder / "model.safetensors").unlink()
    assert "there is no model.safetensors; expected" in refused(tasks.fingerprint_data, run_config(root, folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "is of a network of the kind roberta; allowed: bert"),
        ({"hidden_size": 0}, "hidden_size=0 must be an integer"),
        ({"vocab_size": "many"}, "vocab_size=many must be an integer"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
        ({"type_vocab_size": 1}, "type_vocab_size=1"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key"),
        ({"hidden_act": "magic"}, "hidden_act=magic is not known"),
        ({"hidden_act": ["gelu"]}, "hidden_act=['gelu'] is not known"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5 must be"),
        ({"num_hidden_layers": 3}, "it has 2 layers, not 3"),
        ({"num_hidden_layers": 10_000_000}, "it has 2 layers, not 10000000"),
        (
            {"vocab_size": 401},
            "embeddings.word_embeddings.weight has the shape [400, 16], and config.json says [401, 16]",
        ),
        ({"intermediate_size": 25}, "has the shape [24, 16], and config.json says [25, 16]"),
    ],
)
def test_a_config_that_is_no_bert_s_or_not_of_these_weights_is_refused(folder, changes, words):
    change(folder, **changes)
    assert words in refused(network, folder)


def test_weights_of_another_network_are_refused(folder):
    rewrite(folder, lambda tensors: {name: each for name, each in tensors.items() if "1.output.dense" not in name})
    assert "2 tensors are not there, such as bert.encoder.layer.1.output.dense.weight" in refused(network, folder)
    rewrite(folder, lambda tensors: {f"model.{name}": each for name, each in tensors.items()})
    assert "is not a BERT's: it has no encoder.layer" in refused(network, folder)


def test_numbers_that_are_not_floating_point_are_refused(folder):
    rewrite(folder, lambda tensors: {name: each.to(torch.int8) for name, each in tensors.items()})
    assert "holds torch.int8" in refused(network, folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: b"",
        lambda stored: stored[:5],
        lambda stored: b"\xff" * 8 + stored[8:],
        lambda stored: stored[:8] + b"}" + stored[9:],
        lambda stored: (2).to_bytes(8, "little") + b"[]",
        lambda stored: stored[:-100],
        lambda stored: pickle.dumps(Bomb()),
    ],
)
def test_a_damaged_file_of_weights_is_named(folder, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refused(network, folder)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_config_that_holds_no_keys_is_named(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(network, folder)


def test_a_window_beyond_the_positions_is_refused(folder, root):
    config = run_config(root, folder, "dataset.max_length=97")
    assert refused(tasks.build_task, config) == "dataset.max_length=97 is more than the 96 positions of the network"


def test_a_vocabulary_of_another_network_is_refused(folder, root):
    change(folder, vocab_size=50)
    assert "the network's embedding 50" in refused(tasks.build_task, run_config(root, folder))


def test_the_fingerprint_is_of_the_weights_and_not_of_the_place(folder, original, root):
    first = fingerprint_weights(str(original))
    assert fingerprint_weights(str(folder)) == first
    assert tasks.fingerprint_data(run_config(root, folder))["weights"] == first
    assert tasks.build_task(run_config(root, folder)).data.fingerprint == tasks.fingerprint_data(
        run_config(root, original)
    )
    seen = {first}

    def new() -> str:
        found = fingerprint_weights(str(folder))
        assert found not in seen
        return seen.add(found) or found

    rewrite(folder, lambda tensors: {name: each + 1 for name, each in tensors.items()})
    new()
    change(folder, layer_norm_eps=1e-6)
    new()
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    new()
    (folder / "README.md").write_text("What this is.")
    assert fingerprint_weights(str(folder)) in seen


def test_of_generated_questions_the_weights_alone_tell(folder):
    assert tasks.fingerprint_data(config(None)) == {}
    found = tasks.fingerprint_data(config(None, f"model.weights={folder}"))
    assert found == {"weights": fingerprint_weights(str(folder))}


def test_shapes_are_read_without_the_numbers(folder):
    expected = {name: tuple(each.shape) for name, each in load_file(folder / "model.safetensors").items()}
    assert read_shapes(weights_folder(str(folder))) == expected


def test_an_evaluation_needs_the_span_head(folder, root):
    found = run_config(root, folder, "job=evaluate")
    text = refused(tasks.build_task(found).network)
    assert f"{folder / 'model.safetensors'} is not a BERT's: 2 tensors are not there, such as qa_outputs." in text
    stored = load_file(folder / "model.safetensors")
    head = {"qa_outputs.weight": torch.ones(2, SIZES["hidden_size"]), "qa_outputs.bias": torch.ones(2)}
    save_file({**stored, **head}, folder / "model.safetensors")
    assert torch.equal(tasks.build_task(found).network().qa_outputs.weight, head["qa_outputs.weight"])


def test_a_run_from_weights_takes_and_keeps_their_tokenizer_and_sizes(folder, root):
    task = tasks.build_task(run_config(root, folder))
    assert task.artifacts().keys() == {"tokenizer.json", "config.json"}
    assert task.artifacts()["config.json"] == (folder / "config.json").read_text()
    assert task.data.sizes == {"vocab_size": 400}
    batch = task.data.val.batch(np.arange(4), None)
    losses = [found.loss for found in task.predict(task.network().eval(), batch)]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
