"""resume=base: a fine-tune that starts from the checkpoint of the run without it, once trained."""

import dataclasses
import shutil

import pytest
from placed_runs import DIVERGED, FINISHED, config, contents, place
from running import assert_same_tensors, last, tiny, train

from luqrun.config import CellConfig, TrackingConfig
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.runs.start import base_checkpoint, diverged_base
from luqrun.runs.twins import adopt

SIZES = ("dataset.glyphs.train_images=64", "dataset.glyphs.val_images=32", "dataset.batch_size=16", "schedule.epochs=1")


def checkpoint_of(folder) -> None:
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.pt").write_bytes(b"weights")


def test_the_base_is_the_run_without_fine_tune(tmp_path):
    tuned = config("a/b", tuned=True, cell=CellConfig("table3"), tracking=TrackingConfig(log_every=9))
    tuned.finetune = dataclasses.replace(tuned.finetune, lr_base=0.3)
    base = place(tmp_path, config("a/b"), FINISHED, {"val/top1": 1.0})
    checkpoint_of(base)
    assert base_checkpoint(tuned, place(tmp_path, tuned), {}) == base.checkpoints / "last.pt"
    for other in (config("a/b", tuned=True, seed=1), config("c", tuned=True)):
        with pytest.raises(UserError, match="not there: run the same with finetune=none first"):
            base_checkpoint(other, place(tmp_path, other), {})


@pytest.mark.parametrize("linked", [False, True])
def test_the_checkpoint_of_a_base_that_was_taken_over_is_the_originals(tmp_path, linked):
    outputs = tmp_path / "outputs"
    if linked:  # a study that lies on another disk
        (tmp_path / "disk" / "deep" / "a").mkdir(parents=True)
        outputs.mkdir()
        (outputs / "a").symlink_to(tmp_path / "disk" / "deep" / "a")
    original = place(outputs, config("b"), FINISHED, {"val/top1": 1.0})
    checkpoint_of(original)
    base = place(outputs, config(), {"command": [], "overrides": []})
    adopt(original.path, base)
    tuned = place(outputs, config(tuned=True))
    assert base_checkpoint(config(tuned=True), tuned, {}) == original.checkpoints / "last.pt"
    outputs.rename(tmp_path / "moved")
    tuned = RunFolder(tmp_path / "moved" / "a" / tuned.path.name)
    path = base_checkpoint(config(tuned=True), tuned, {})
    assert path == tmp_path / "moved" / "b" / original.path.name / "checkpoints" / "last.pt"
    shutil.rmtree(tmp_path / "moved" / "b")
    with pytest.raises(UserError, match=r"resume=base.*checkpoints/last\.pt is gone: resume=auto"):
        base_checkpoint(config(tuned=True), tuned, {})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"status": "running"}, "is running: run the same with finetune=none first"),
        ({"status": "failed"}, "is failed: run"),
        ({"status": "diverged"}, "is diverged"),
        (FINISHED, "is finished, but .*last.pt is gone: resume=auto trains both phases"),
    ],
    ids=lambda value: value["status"] if isinstance(value, dict) else None,
)
def test_a_base_that_cannot_serve_is_named_with_its_state(tmp_path, run, words):
    base = place(tmp_path, config(), run)
    with pytest.raises(UserError, match=words) as refusal:
        base_checkpoint(config(tuned=True), place(tmp_path, config(tuned=True)), {})
    assert str(base.path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_only_a_fine_tune_with_resume_base_diverges_with_its_base(tmp_path):
    base, tuned = place(tmp_path, config(), DIVERGED), config(tuned=True)
    assert diverged_base(tuned, place(tmp_path, tuned), {}) == base.path
    for other in (config(tuned=True, resume="auto"), config(resume="base")):
        assert diverged_base(other, place(tmp_path, other), {}) is None
    base.write_json("run.json", {**DIVERGED, "results": 1})
    with pytest.raises(UserError, match=r"resume=base: .* of RESULTS 1"):
        diverged_base(tuned, place(tmp_path, tuned), {})
    base.write_json("run.json", FINISHED)
    assert diverged_base(tuned, place(tmp_path, tuned), {}) is None


def test_trained_apart_or_in_one_run_it_is_the_same(tmp_path):
    def run(study, *overrides):
        overrides = *SIZES, f"study={study}", *overrides
        return train(tmp_path / study / run_id(tiny(*overrides), {}), *overrides)

    _, base = run("apart", "resume=base")  # without fine-tune, as resume=auto
    before = contents(base)
    summary, apart = run("apart", "finetune=fnt2", "resume=base")
    _, whole = run("whole", "finetune=fnt2")
    assert_same_tensors(last(apart)["model"], last(whole)["model"])
    assert summary["finetune"] == whole.summary()["finetune"]
    best, of_whole = (checkpoint.read(each.checkpoints / "best.pt") for each in (apart, whole))
    assert best["identity"] == of_whole["identity"]
    assert_same_tensors(best["model"], of_whole["model"])
    assert contents(base) == before
    # Once begun, it goes on from its own checkpoint, with or without the base.
    shutil.rmtree(base.path)
    (apart.path / "summary.json").unlink()
    assert run("apart", "finetune=fnt2", "resume=base")[0]["finetune"] == summary["finetune"]


def test_a_base_of_other_code_is_named_and_not_taken(tmp_path):
    tuned = config(tuned=True)
    other = place(tmp_path, config(), {**FINISHED, "results": 1}, {"val/top1": 1.0})
    other.path.rename(other.path.with_name(f"{other.path.name[:-8]}00000000"))
    (other.path.with_name(f"{other.path.name[:-8]}00000000") / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"is not there: .*of the same settings, beside .*00000000, a run of RESULTS 1"):
        base_checkpoint(tuned, place(tmp_path, tuned), {})
