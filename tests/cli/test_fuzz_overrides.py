"""Any key with any value of any type: one line that names it, or a run whose config holds it. Never anything else."""

import json
import tempfile
from pathlib import Path

import pytest
from fuzzing import examples
from hypothesis import event, given
from overriding import command, complaint, overrides
from running import TINY, quiet_machine

from luqrun.cli import command as cli


@examples(8)
@given(texts=overrides)
def test_any_override_is_refused_by_name_or_obeyed(cache, texts):
    with tempfile.TemporaryDirectory() as folder, quiet_machine(cache):
        answer = command(Path(folder), cache, *TINY, *texts)
    event({0: "obeyed", 1: "refused by name", 143: "obeyed, and trained a step"}.get(answer.code, "neither"))
    assert complaint(texts, answer) is None


# What earlier versions answered with a traceback, hung on, or accepted and ignored.
REFUSED = [
    (["model=null"], ("model=null",)),
    (["dataset=[1]"], ("dataset=[1]",)),
    (["~quant=true"], ("~quant=true",)),
    (["schedule.epochs=" + "9" * 5000], ("schedule.epochs=999",)),
    (["schedule.epochs=" + "9" * 400], ("schedule.epochs=999", "at most 2147483647")),
    (["study=${run_id:}"], ("study", "run_id")),
    (["quant.skip=???"], ("not set", "quant.skip")),
    (["quant.skip=[[first]]"], ("quant.skip", "single values")),
    (["schedule.milestones=[[1]]"], ("schedule.milestones", "single values")),
    (["quant.skip=['${.}']"], ("quant.skip",)),
    (["study=???"], ("study",)),
    (["resume='~nobody/last.pt'"], ("resume=~nobody/last.pt", "no such file")),
    (["resume=" + "a" * 300], ("resume=aaa", "no such file")),
    (["cell.row='a\nb'"], ("cell.row", "line break")),
    (["schedule.lr=1e300"], ("schedule.lr=1e+300", "at most 1e+30")),
    (["schedule.optimizer=adamw", "schedule.nesterov=false", "schedule.momentum=0.99999999"], ("schedule.momentum",)),
    (["dataset.workers=100000"], ("dataset.workers=100000", "at most 256")),
    (["dataset.image_size=100000"], ("dataset.image_size=100000", "at most 4096")),
    (["tracking.profile_steps=100000"], ("tracking.profile_steps=100000", "at most 1000")),
    (["=3"], ("=3",)),
    (["='a'"], ("an override is key=value", "no key")),
    (["hydra/job_logging='1\n2'"], ("job_logging",)),
    (["+experiment=fig2/embedded", "model=bert"], ("schedule=embedded/bert", "model=bert", "embedded/bert_tiny")),
    (["hydra.job_logging=x"], ("hydra.job_logging",)),
]


@pytest.mark.parametrize(("texts", "words"), REFUSED, ids=[row[0][-1][:40] for row in REFUSED])
def test_what_once_was_no_clear_answer(cache, tmp_path, texts, words):
    answer = command(tmp_path, cache, *TINY, *texts)
    assert (answer.code, len(answer.lines)) == (1, 1), answer
    assert [word for word in words if word not in answer.lines[0]] == [], answer.lines[0]


def test_only_the_override_below_a_null_part_is_blamed(cache, tmp_path):
    answer = command(tmp_path, cache, *TINY, "quant.gradient.samples=2", "quant=fp32")
    assert answer.code == 1
    assert answer.lines == [
        "luqrun: quant.gradient.samples=2 sets a key below a part that is null here "
        "(such as quant.gradient with quant=fp32)"
    ]


def test_a_relative_interpolation_is_obeyed(cache, tmp_path):
    answer = command(tmp_path, cache, *TINY, "finetune.lr_base=${..schedule.lr}")
    assert answer.code == 143, answer
    assert answer.config["finetune"]["lr_base"] == answer.config["schedule"]["lr"]
    (path,) = tmp_path.rglob("run.json")
    assert json.loads(path.read_text())["overrides"][-1] == "finetune.lr_base=${..schedule.lr}"


def test_more_glyphs_than_memory(cache, tmp_path):
    answer = command(tmp_path, cache, *TINY, "dataset.glyphs.train_images=2000000000", work=cli.work)
    assert (answer.code, len(answer.lines)) == (1, 1), answer
    assert "dataset.glyphs.train_images=2000000000 and val_images=94" in answer.lines[0]
    assert "GiB" in answer.lines[0]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (TINY, "model.name=resnet8, dataset.batch_size=32, dataset.image_size="),
        (("dataset=facts",), "model.name=bert_tiny, dataset.batch_size=32, dataset.max_length=64"),
        (("dataset=sentences",), "transformer_tiny, dataset.batch_tokens=1024, dataset.batch_size=128, dataset.max_l"),
    ],
    ids=["images", "questions", "translation"],
)
def test_too_little_memory_is_one_line(asked, named, cache, tmp_path, monkeypatch):
    def starved(config, folder, requests):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("luqrun.train.trainer.run", starved)
    answer = command(tmp_path, cache, *asked, work=cli.work)
    assert (answer.code, len(answer.lines)) == (1, 1), answer
    assert "not enough memory for model.name=" in answer.lines[0]
    assert named in answer.lines[0]


@pytest.mark.parametrize(
    "texts",
    [["model=null"], ["study=${run_id:}"], ["seed=nan", "quant=fp32"], ["+dataset={'a b':1}"], ["cell.row=\udcff"]],
)
def test_a_real_process_answers_the_same(shell, cache, tmp_path, texts):
    (tmp_path / "here").mkdir()
    here = command(tmp_path / "here", cache, *TINY, *texts)
    there = shell.luqrun(tmp_path, *TINY, *texts)
    assert (there.code, there.err) == (here.code, here.err) == (1, here.err)


@pytest.mark.parametrize("text", ["seed=nan,0", "quant=null,fp32", "quant=[1],fp32", "schedule.lr=1e999,0.1"])
def test_a_sweep_with_a_wrong_value(shell, tmp_path, text):
    result = shell.luqrun(tmp_path, "-m", *TINY, text)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert text.partition("=")[0] in [line for line in result.err.splitlines() if line.strip()][-1]
