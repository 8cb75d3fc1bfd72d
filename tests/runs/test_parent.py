"""Going on: a finished run with more epochs is the run of so many epochs, or is refused in one line that says why."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from placed_runs import DIVERGED, FINISHED, place
from running import TINY, assert_same_tensors, last, tiny

from luqrun.config import ScheduleConfig
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder
from luqrun.runs.parent import OPEN_ENDED, parent_checkpoint
from luqrun.runs.twins import adopt
from luqrun.train.schedules import SCHEDULES, learning_rate

STEP = (*TINY, "quant=luq_hindsight", "schedule.name=step", "schedule.milestones=[2]")
CLOCK = ("train_seconds", "evaluation_seconds", "images_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def outputs(shell, tmp_path_factory):
    """outputs[N]: the run of N epochs, and outputs["on"] that of 3 which went on with that of 1."""
    here = tmp_path_factory.mktemp("runs")

    def run(study, *arguments):
        before = set((here / "outputs" / study).glob("*"))
        result = shell.luqrun(here, f"study={study}", *arguments)
        assert result.code == 0, result.err
        (path,) = set((here / "outputs" / study).glob("*")) - before
        return RunFolder(path), result

    one, _ = run("a", *STEP)
    three, _ = run("b", *STEP, "schedule.epochs=3")
    on, result = run("a", f"resume={one.path.relative_to(here)}", "schedule.epochs=3")
    return {1: one, 3: three, "on": on, "text": result.err}


def test_it_is_the_longer_run_bit_for_bit(outputs):
    on, three = outputs["on"], outputs[3]
    assert on.path.name == three.path.name
    for part in ("model", "optimizer"):
        assert_same_tensors(last(on)[part], last(three)[part])
    ours, theirs = ({k: v for k, v in each.summary().items() if k not in CLOCK} for each in (on, three))
    assert ours == theirs
    assert "continuing from" in outputs["text"]
    assert "epoch 2/3" in outputs["text"]
    assert "epoch 1/3" not in outputs["text"]


def test_its_best_epoch_may_be_one_of_the_parent(outputs):
    best = [checkpoint.read(outputs[name].checkpoints / "best.pt") for name in ("on", 3)]
    assert best[1]["progress"]["epoch"] == 1  # no later one is better
    assert_same_tensors(*({k: v for k, v in each.items() if k != "progress"} for each in best))
    assert_same_tensors(*({k: each["progress"][k] for k in ("epoch", "step", "best")} for each in best))
    assert outputs["on"].summary()["best_metric"] == best[0]["progress"]["best"]


def test_it_names_its_parent_and_leaves_it_alone(outputs):
    on, one = outputs["on"], outputs[1]
    assert (on.path / on.run()["parent"]).resolve() == one.path.resolve()
    assert on.run()["status"] == "finished"
    assert one.run()["status"] == "finished"
    assert "parent" not in one.run()
    assert last(one)["progress"]["epoch"] == 1


def test_its_result_in_another_study_names_no_parent(outputs, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", {"command": [], "overrides": []})
    adopt(outputs["on"].path, folder)
    assert "parent" not in folder.run()


def test_the_rates_of_open_ended_schedules_do_not_depend_on_the_epochs():
    def rates(name, epochs):
        config = ScheduleConfig(name=name, epochs=epochs, warmup_epochs=0.0 if name == "onecycle" else 1.5)
        return [learning_rate(config, step, 10) for step in range(20)]

    assert {name for name in SCHEDULES if rates(name, 2) == rates(name, 5)} == set(OPEN_ENDED)


def parent(tmp_path, *overrides, run=FINISHED):
    """The folder of a run that nobody trained."""
    config = tiny(*overrides)
    folder = place(tmp_path / "outputs", config, run, {"val/top1": 1.0})
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.pt").write_bytes(b"weights")
    return folder


def refused(folder, *overrides) -> str:
    with pytest.raises(UserError) as refusal:
        parent_checkpoint(tiny(*overrides, f"resume={folder.path}"))
    text = str(refusal.value)
    assert text.startswith(f"resume={folder.path} ")
    assert "\n" not in text
    return text


OPEN = ("quant=fp32", "schedule.name=step", "schedule.epochs=4")
ON = (*OPEN, "schedule.epochs=6")


def test_where_it_starts(tmp_path):
    folder = parent(tmp_path, *OPEN)
    for more in (ON, (*ON, "finetune=fnt2"), (*OPEN, "finetune=fnt2"), OPEN):
        assert parent_checkpoint(tiny(*more, f"resume={folder.path}")) == folder.checkpoints / "last.pt"


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (OPEN, (*ON, "quant=luq"), "is a run with quant.name=fp32, this one has quant.name=luq; only"),
        (OPEN, (*ON, "seed=3"), "is a run with seed=0, this one has seed=3"),
        (OPEN, (*ON, "schedule.name=cosine"), "with schedule.name=step, this one has schedule.name=cosine"),
        (OPEN, (*OPEN, "schedule.epochs=2"), "of 4 epochs, more than schedule.epochs=2; to go on it must be larger"),
        ((*OPEN, "finetune=fnt1"), (*ON, "finetune=fnt1"), "ends in a fine-tune of 1 epochs, after which the schedule"),
        (
            (*OPEN, "finetune=fnt1"),
            (*OPEN, "finetune=fnt2"),
            "with finetune.name=fnt1, this one has finetune.name=fnt2",
        ),
        ((*OPEN, "schedule.average=2"), (*ON, "schedule.average=2"), "with schedule.average=2, which left the average"),
        (("quant=fp32",), ("quant=fp32", "schedule.epochs=2"), "with schedule.name=onecycle, whose learning rates"),
        (OPEN, (*ON, "job=rounding"), "with job=train, this one has job=rounding"),
    ],
)
def test_what_would_be_another_training_is_refused(tmp_path, theirs, ours, words):
    assert words in refused(parent(tmp_path, *theirs), *ours)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            {**FINISHED, "status": "failed", "reason": "stopped by SIGTERM"},
            "has not finished (stopped by SIGTERM): its",
        ),
        ({**FINISHED, "status": "running"}, "has not finished (running): its own command, or resume="),
        (DIVERGED, "diverged at step 3: there is nothing to go on from"),
        ({**FINISHED, "results": 1}, "is a run of RESULTS 1 (an earlier or later luqrun"),
    ],
)
def test_a_run_without_an_end_to_go_on_from_is_refused(tmp_path, run, words):
    assert words in refused(parent(tmp_path, *OPEN, run=run), *ON)


def test_a_run_that_trained_nothing_is_refused(tmp_path):
    folder = parent(tmp_path, *OPEN)
    settings = OmegaConf.load(folder.path / "config.yaml")
    OmegaConf.save({**settings, "job": "evaluate"}, folder.path / "config.yaml")
    assert "is of job=evaluate, which trains nothing: there are no epochs to go on with" in refused(folder, *ON)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    folder = parent(tmp_path, *OPEN)
    (folder.checkpoints / "last.pt").unlink()
    assert f"has finished, but {folder.checkpoints / 'last.pt'} is gone" in refused(folder, *ON)
    (folder.path / "config.yaml").write_text("quant: [\n")
    assert "is not the folder of a run (config.yaml is not YAML); such a one is outputs/STUDY/RUN_ID" in refused(folder)
    (folder.path / "run.json").unlink()
    assert "(run.json is not there)" in refused(folder)


def test_a_mistake_is_one_line_before_anything_starts(outputs, shell):
    here = outputs[1].path.parents[2]
    one = outputs[1].path.relative_to(here)
    before = sorted(here.rglob("*"))
    for more, words in (
        (("schedule.epochs=2", "quant=luq"), "is a run with quant.name=luq_hindsight, this one has quant.name=luq"),
        (("schedule.epochs=2", "schedule.name=cosine"), "this one has schedule.name=cosine"),
        (("schedule.epochs=2", "schedule.milestones=[1]"), "with schedule.milestones=[2], this one has"),
    ):
        result = shell.luqrun(here, f"resume={one}", *more)
        assert (result.code, result.out) == (1, "")
        (line,) = result.err.splitlines()
        assert words in line
        assert line.startswith(f"luqrun: resume={one} ")
    assert sorted(here.rglob("*")) == before


def test_a_checkpoint_of_an_earlier_layout_is_refused(outputs, shell, tmp_path, monkeypatch):
    copy = shutil.copytree(outputs[1].path, tmp_path / "outputs" / "a" / outputs[1].path.name)
    content = checkpoint.read(copy / "checkpoints" / "last.pt")
    config = tiny(*STEP)
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION - 1)
    keys = ("model", "optimizer", "progress")
    checkpoint.save(copy / "checkpoints" / "last.pt", config, {}, *(content[key] for key in keys))
    result = shell.luqrun(tmp_path, f"resume={copy}", "schedule.epochs=2")
    assert result.code == 1
    end = result.err.splitlines()[-1]
    assert "last.pt is of an earlier luqrun (version 3 of checkpoints, here it is 4)" in end
    (left,) = {path.parent for path in tmp_path.glob("outputs/a/*/run.json")} - {copy}
    assert json.loads((left / "run.json").read_text())["status"] == "failed"
