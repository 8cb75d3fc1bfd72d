"""A run of translation from end to end: what its folder holds, and that its numbers are those of its predictions."""

import json
import shutil

import pytest
import sacrebleu
import torch
from kills import curves
from running import composed, metrics, quiet_machine

from luqrun.cli.results import closing_table
from luqrun.cli.validation import to_config
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.twins import adopt
from luqrun.tasks.translation.sentences import generate
from luqrun.tasks.translation.subwords import Subwords
from luqrun.train import trainer

RUN = (
    *("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "dataset.examples=60", "device=cpu"),
    *("dataset.batch_tokens=200", "dataset.vocabulary=150", "dataset.max_length=24", "quant=luq", "finetune=fnt1"),
    *("schedule.epochs=2", "schedule.average=2", "tracking.log_every=2", "tracking.health_every=3"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(summary, folder, config)"""
    path, config = tmp_path_factory.mktemp("run"), to_config(composed(*RUN))
    with quiet_machine():
        return trainer.run(config, RunFolder(path)), RunFolder(path), config


@pytest.mark.parametrize("split", ["val", "test"])
def test_bleu_is_that_of_the_kept_translations_to_the_digit(finished, split):
    summary, folder, _ = finished
    hypotheses = (folder.path / "predictions" / f"{split}.hyp.txt").read_text().split("\n")[:-1]
    bleu = sacrebleu.BLEU()
    found = bleu.corpus_score(hypotheses, [generate(60)[split].target])
    assert summary[f"{split}/bleu"] == found.score
    assert summary["bleu_signature"] == str(bleu.get_signature())


def test_validation_comes_each_epoch_and_the_test_once(finished):
    summary, folder, _ = finished
    epochs, tests = metrics(folder, "epoch"), metrics(folder, "test")
    assert [row["phase"] for row in epochs] == ["train", "train", "finetune"]
    assert [row["val/bleu"] for row in epochs][-1] == summary["val/bleu"]
    assert not [key for row in epochs for key in row if key.startswith("test/")]
    (last,) = tests
    assert (last["test/bleu"], last["test/loss"]) == (summary["test/bleu"], summary["test/loss"])
    assert folder.run()["metric"]["name"] == "val/bleu"
    assert [len(curves(folder)[name]) for name in ("val/bleu", "test/bleu")] == [3, 1]
    assert summary["tokens_per_second"] > 0


def test_the_folder_keeps_the_subwords_that_its_network_was_trained_with(finished):
    _, folder, _ = finished
    subwords = Subwords((folder.path / "tokenizer.json").read_text())
    weights = torch.load(folder.checkpoints / "last.pt", weights_only=True)
    assert len(subwords) == weights["vocabulary"] == len(weights["model"]["model.shared.weight"])
    assert weights["progress"]["average"] is None  # it was used when the schedule ended


def test_the_closing_table_says_which_bleu_it_is(finished):
    summary, folder, config = finished
    shown = closing_table(config, summary, folder.path, (), folder.metric())
    assert "BLEU" in shown
    assert "on test data" in shown
    assert summary["bleu_signature"] in shown


def test_versions_of_what_reads_the_text_are_recorded():
    from luqrun.runs.folder import provenance

    versions = provenance()["versions"]
    assert {"transformers", "tokenizers", "sacrebleu"} <= versions.keys()
    assert json.dumps(versions)


def test_a_run_goes_on_with_its_own_subwords_alone(finished, tmp_path):
    _, folder, config = finished
    copy = RunFolder(shutil.copytree(folder.path, tmp_path / "run"))
    tokenizer = copy.path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("[", "[ ", 1))
    with quiet_machine(), pytest.raises(UserError, match=r"tokenizer\.json is not what its data give now"):
        trainer.Trainer(config, copy, torch.device("cpu"))


def test_a_twin_takes_over_the_translations_too(finished, tmp_path):
    _, folder, _ = finished
    (tmp_path / "twin").mkdir()
    twin = RunFolder(tmp_path / "twin")
    twin.update_run(command=[], overrides=[])
    adopt(folder.path, twin)
    for name in ("predictions/test.hyp.txt", "predictions/val.hyp.txt", "tokenizer.json"):
        assert (twin.path / name).read_text() == (folder.path / name).read_text()
