"""Networks by their shapes alone: the same as with data."""

import json

import pytest
import torch
from running import composed, quiet_machine

from luqrun.cli.validation import to_config
from luqrun.errors import UserError
from luqrun.tasks import build_task, outline_task
from luqrun.tasks.classification.data import SHAPES
from luqrun.tasks.classification.glyphs import CLASSES

SENTENCES = "dataset=sentences", "model=transformer_tiny", "schedule=sentences"
FACTS = "dataset=facts", "model=bert_tiny", "schedule=facts"


def config(*overrides):
    return to_config(composed("job=cost", *overrides))


def shapes(network):
    return {name: tuple(each.shape) for name, each in network.state_dict().items()}


def test_images_are_those_of_the_data(tmp_path):
    overrides = "dataset.glyphs.train_images=64", "dataset.glyphs.val_images=94", "dataset.batch_size=16"
    found = outline_task(config(*overrides))
    with quiet_machine(tmp_path):
        task = build_task(config(*overrides))
    assert shapes(found.network) == shapes(task.network())
    ((images),) = found.inputs.values()
    assert tuple(images.shape) == (16, 1, 20, 20)
    assert (found.examples, found.unit) == (16, "image")
    assert all(parameter.is_meta for parameter in found.network.parameters())
    assert found.network.training
    assert SHAPES["glyphs"] == (len(CLASSES), 1)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("imagenet", 1000)])
def test_named_data_sets_have_their_classes(name, classes):
    found = outline_task(config("model=resnet18", f"dataset={name}", "dataset.batch_size=2"))
    assert found.network.fc.out_features == classes
    assert found.network(**found.inputs).shape == (2, classes)


def test_sentences_have_the_vocabulary_that_was_asked_for():
    found = outline_task(config(*SENTENCES))
    assert found.examples == 1024 // 32
    assert found.network(**found.inputs).logits.shape == (32, 32, 500)
    task = build_task(config(*SENTENCES, "dataset.examples=500", "dataset.vocabulary=100"))
    same = outline_task(config(*SENTENCES, "dataset.vocabulary=100"))
    assert shapes(same.network) == shapes(task.network())


def test_windows_have_the_length_of_the_data_set():
    found = outline_task(config(*FACTS, "dataset.vocabulary=200"))
    starts, _ = found.network(**found.inputs)
    assert starts.shape == (32, 64)
    assert (found.examples, found.unit) == (32, "window")


def test_of_a_folder_of_weights_only_the_sizes_are_read(tmp_path):
    sizes = {
        **{"model_type": "bert", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    found = outline_task(
        config("dataset=squad", "model=bert", "schedule=squad", f"model.weights={tmp_path}", "cost.length=64")
    )
    assert found.network.bert.embeddings.word_embeddings.weight.shape == torch.Size([300, 32])
    assert len(found.network.bert.encoder.layer) == 3


def test_a_window_longer_than_the_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cost\.length=65 is too large"):
        outline_task(config(*FACTS, "dataset.vocabulary=200", "cost.length=65"))
