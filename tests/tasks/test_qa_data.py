"""Data sets of questions by name: what their keys may be, the subset, the generated facts, the YAML files."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from questions import config, plain, sample, write_squad

from luqrun import tasks
from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.question_answering import facts, squad
from luqrun.tasks.question_answering.data import NAMES, NETWORKS
from luqrun.tasks.subset import subset

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_squad(tmp_path_factory.mktemp("squad") / "data")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model=resnet8"],
            "model.name=resnet8 does not answer questions, as dataset=facts asks; allowed: bert, bert_tiny",
        ),
        (["model.stem=small"], "model.stem=small"),
        (["model.dropout=1"], "model.dropout=1.0 must be at least 0 and less than 1"),
        (["dataset.max_length=null"], "dataset.max_length is not given"),
        (["dataset.max_length=513"], "dataset.max_length=513 is more than the 512 positions of the network"),
        (["dataset.stride=-1"], "dataset.stride=-1"),
        (["dataset.stride=64"], "dataset.stride=64 must be less than dataset.max_length=64"),
        (["dataset.batch_size=0"], "dataset.batch_size=0"),
        (["dataset.workers=-1"], "dataset.workers=-1"),
        (["dataset.limit=0"], "dataset.limit=0"),
        (["dataset.examples=0"], "dataset.examples=0"),
        (["dataset.examples=null"], "dataset.examples is not given"),
        (["dataset.vocabulary=5"], "dataset.vocabulary=5"),
        (["model=bert", "model.weights=DIR", "dataset.vocabulary=500"], "dataset.vocabulary=500 is not read with"),
        (["model.weights=/"], "a folder as model.weights is read by model=bert, which has their sizes then, not by"),
        (["dataset.root=DIR"], "dataset.root=DIR is not read by dataset=facts"),
        (["dataset.image_size=32"], "dataset.image_size=32 is not read by dataset=facts"),
        (["dataset.augment=false"], "dataset.augment=False is not read by dataset=facts"),
        (["dataset.source=en"], "dataset.source=en is not read by dataset=facts"),
        (["dataset.batch_tokens=100"], "dataset.batch_tokens=100 is not read"),
        (["schedule.label_smoothing=0.1"], "schedule.label_smoothing=0.1 is not read by dataset=facts"),
    ],
)
def test_a_wrong_value_names_its_key(overrides, words):
    overrides = overrides if any(each.startswith("model=") for each in overrides) else ["model=bert_tiny", *overrides]
    wrong = plain("dataset=facts", "schedule=facts", *overrides)
    for call in (tasks.validate_task, tasks.build_task):
        with pytest.raises(UserError) as error:
            call(wrong)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_squad_reads_no_number_of_examples(root):
    with pytest.raises(UserError, match=r"dataset\.examples=9 is not read by dataset=squad; it reads max_length"):
        tasks.validate_task(config(root, "dataset.examples=9"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model=bert_tiny",
            r"model\.name=bert_tiny does not classify images, as dataset=glyphs asks; "
            r"allowed: .*resnet8.*; it goes with dataset=facts$",
        ),
        ("model.dropout=0.1", r"model\.dropout=0\.1 is read by networks for text alone"),
    ],
)
def test_images_have_no_network_or_key_of_text(override, words):
    with pytest.raises(UserError, match=words):
        tasks.validate_task(plain(override))


@pytest.mark.parametrize("name", ["transformers", "tokenizers", "sacrebleu"])
def test_without_the_extra_there_is_one_line_that_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^{name} not found.*pip install 'luqrun\[text\]'$"):
        tasks.build_task(config(None))


def test_what_is_wrong_with_a_file_is_told_where_the_data_are_built(tmp_path):
    content = sample()
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    with pytest.raises(UserError, match="1 question has no answer"):
        tasks.build_task(config(write_squad(tmp_path / "data", train=content)))


def test_a_limit_keeps_a_part_of_the_questions():
    data = tasks.build_task(config(None, "dataset.limit=10")).data
    whole, kept = facts.draw(64, 0), subset(64, 10, "questions")
    assert [each.id for each in data.train.of.questions] == [whole.questions[index].id for index in kept]
    for question in data.train.of.questions:
        for text, start in question.answers:
            assert data.train.of.contexts[question.context].startswith(text, start)
    described = data.describe()
    counts = "10 of 64 training questions in 10 windows, and 1,000 validation questions in 1,000 windows"
    assert re.fullmatch(counts + r"; about [\d.]+ % of a training batch is padding", described)


def test_a_batch_or_a_limit_beyond_the_questions_is_refused(root):
    with pytest.raises(UserError, match=r"dataset\.batch_size=5 is more than the 4 training windows"):
        tasks.build_task(config(root, "dataset.batch_size=5"))
    with pytest.raises(UserError, match=r"dataset\.limit=5 is more than the 4 training questions"):
        tasks.build_task(config(root, "dataset.limit=5"))


def test_the_tokenizer_and_the_network_follow_from_the_training_text(root):
    found = tasks.build_task(config(root, "dataset.vocabulary=120"))
    assert found.data.sizes == {"vocab_size": 120}
    assert found.network().bert.embeddings.word_embeddings.weight.shape == (120, 128)
    part = tasks.build_task(config(root, "dataset.vocabulary=120", "dataset.limit=4"))
    assert part.tokenizer.to_str() == found.tokenizer.to_str()
    assert found.artifacts()["tokenizer.json"] == found.tokenizer.to_str(pretty=True)


def test_facts_are_always_the_same_and_those_of_validation_others():
    one, other = facts.draw(300, 0), facts.draw(300, 1)
    assert one == facts.draw(300, 0)
    assert facts.draw(100, 0).questions == one.questions[:100]
    assert not set(one.contexts) & set(other.contexts)


def test_facts_have_one_answer_each_and_others_of_its_kind_beside_it():
    found, others = facts.draw(2000, 0), 0
    assert len(found.questions) == 2000
    for question in found.questions:
        (answer,) = question.answers
        context = found.contexts[question.context]
        assert context.startswith(answer.text, answer.start)
        assert len(re.findall(r"\.(?: |$)", context)) == facts.FACTS
        thing = re.search(rf"({'|'.join(facts.COLOURS)}) ({'|'.join(facts.THINGS)})", question.text)[0]
        begin, end = context.rfind(". ", 0, answer.start), context.index(".", answer.start)
        assert thing in context[max(begin, 0) : end]  # in the sentence of the answer
        names = re.findall(rf"(?:{'|'.join(facts.NAMES)}) (?:{'|'.join(facts.SURNAMES)})", context)
        others += question.text.startswith("Who") and len(names) > 1
    assert others > 100
    assert len({question.text for question in found.questions}) > 400


def test_squad_and_facts_are_of_the_same_kind(root):
    generated = facts.draw(4, 0)
    train, _ = squad.read(config(root).dataset)
    assert type(train) is type(generated)
    assert type(train.questions[0]) is type(generated.questions[0])


@pytest.mark.parametrize("name", NAMES)
def test_each_yaml_fits_the_schema(name):
    text = (CONF / "dataset" / f"{name}.yaml").read_text()
    config = OmegaConf.merge(OmegaConf.structured(DatasetConfig), OmegaConf.create(text))
    assert config.name == name
    assert not OmegaConf.missing_keys(config)
    assert f" dataset={name}" in text.splitlines()[0].partition(" luqrun")[2]


def test_each_network_has_a_yaml():
    for name in NETWORKS:
        assert OmegaConf.load(CONF / "model" / f"{name}.yaml").name == name


def test_the_order_of_batches_covers_all_windows_once(root):
    from luqrun.tasks.loader import eval_loader

    found = config(root)
    data = tasks.build_task(found).data
    seen = [batch["start"] for batch in eval_loader(data.val, found.dataset)]
    np.testing.assert_array_equal(np.concatenate(seen), data.val.table[:, 3])
