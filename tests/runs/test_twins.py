"""Runs that stand on others: twins in other studies, fine-tunes that start from one checkpoint, a sweep of both."""

import dataclasses
import json
import shutil

import pytest
import yaml
from running import assert_same_tensors, last, metrics, tiny, train

from luqrun import RESULTS, __version__
from luqrun.config import CellConfig, Config, TrackingConfig
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder, run_id
from luqrun.runs.twins import adopt, base_checkpoint, diverged_base, find_twin

SIZES = ("dataset.glyphs.train_images=64", "dataset.glyphs.val_images=32", "dataset.batch_size=16", "schedule.epochs=1")
SWEEP = ("-m", "+experiment=table3/glyphs", "seed=0", "quant=luq_smp2", *SIZES, "device=cpu", "tracking.log_every=1")
FINISHED = {
    "status": "finished",
    "versions": {"luqrun": __version__},
    "results": RESULTS,
    "world_sizes": [1],
    "start": "then",
    "end": "later",
    "command": ["x"],
}
COLUMNS = ["luq_smp2_none", "luq_smp2_fnt1", "luq_smp2_fnt2", "luq_smp2_fnt3"]
DIVERGED = {**FINISHED, "status": "diverged", "diverged_at_step": 3}


def folders(outputs, study):
    """By column, the run folders of a study of table 3."""
    found = [RunFolder(path.parent) for path in (outputs / study).glob("*/config.yaml")]
    return {resolved(folder)["cell"]["column"]: folder for folder in found}


def resolved(folder):
    return yaml.safe_load((folder.path / "config.yaml").read_text())


def contents(folder):
    """Every file but the log and the lock: checkpoints, curves, json."""
    files = (path for path in folder.path.rglob("*") if path.is_file() and path.name not in ("run.log", ".lock"))
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def table3(shell, tmp_path_factory):
    """The folder in which the sweep of table 3 was run, for one seed of LUQ + SMP."""
    cwd = tmp_path_factory.mktemp("table3")
    result = shell.luqrun(cwd, *SWEEP)
    assert (result.code, "Traceback" in result.err) == (0, False), result.err
    return cwd


def test_a_sweep_fine_tunes_from_one_checkpoint_that_is_trained_once(table3):
    runs = folders(table3 / "outputs", "glyphs/table3")
    assert sorted(runs) == sorted(COLUMNS)
    base, *tuned = (runs[column] for column in COLUMNS)
    assert all(folder.run()["status"] == "finished" for folder in runs.values())
    assert {row["phase"] for row in metrics(base)} == {"train"}
    for epochs, folder in enumerate(tuned, 1):
        rows = metrics(folder)
        assert {row["phase"] for row in rows} == {"finetune"}  # nothing of the 4-bit phase is trained again
        assert len([row for row in rows if row["kind"] == "epoch"]) == epochs
        summary = folder.summary()
        assert len(summary["finetune"]) == epochs
        assert summary["before_finetune"] == base.summary()["before_finetune"]
        # The rate starts where the 4-bit phase ended and then depends on the length: the first step is the same.
        assert rows[0] == metrics(tuned[0])[0]
        assert rows[0]["step"] == 5


def test_each_run_of_a_sweep_says_which_cell_it_is(table3):
    for column, folder in folders(table3 / "outputs", "glyphs/table3").items():
        cell = {"table": "table3", "scale": "glyphs", "row": "resnet8", "column": column}
        assert resolved(folder)["cell"] == cell
        name = f"resnet8-glyphs-{column}-seed0-".replace("_none", "").replace("_fnt", "-fnt")
        assert folder.path.name.startswith(name)


def test_a_repeated_sweep_runs_nothing_again(shell, table3):
    runs = folders(table3 / "outputs", "glyphs/table3")
    before = {column: contents(folder) for column, folder in runs.items()}
    result = shell.luqrun(table3, *SWEEP)
    assert (result.code, result.err.count("this run is finished")) == (0, 4)
    assert {column: contents(folder) for column, folder in runs.items()} == before


def test_the_same_sweep_in_another_study_trains_nothing(shell, table3):
    originals = folders(table3 / "outputs", "glyphs/table3")
    result = shell.luqrun(table3, *SWEEP, "study=other", "reuse=true")
    assert (result.code, result.err.count("taken over from")) == (0, 4)
    assert "train loss" not in result.err
    for column, folder in folders(table3 / "outputs", "other").items():
        original = originals[column]
        assert folder.path.name == original.path.name
        assert not folder.checkpoints.exists()
        assert (folder.summary(), metrics(folder)) == (original.summary(), metrics(original))
        record, source = folder.run(), original.run()
        assert (folder.path / record["reused"]).resolve() == original.path.resolve()
        assert "study=other" in record["overrides"]
        for key in ("status", "start", "end", "git_commit", "versions", "kernel_backend"):
            assert record[key] == source[key]
        assert (resolved(folder)["study"], resolved(folder)["cell"]["column"]) == ("other", column)
        assert f"{folder.summary()['val/top1']:.2f}" in result.out


def test_a_run_that_was_begun_goes_on_and_is_not_replaced(shell, table3):
    original = folders(table3 / "outputs", "glyphs/table3")["luq_smp2_fnt1"]
    begun = RunFolder(table3 / "outputs" / "begun" / original.path.name)
    shutil.copytree(original.checkpoints, begun.checkpoints)
    begun.write_json("run.json", {"status": "failed", "reused": "nowhere"})  # of an earlier attempt
    result = shell.luqrun(table3, *SWEEP[1:], "finetune=fnt1", "study=begun", "reuse=true")
    assert (result.code, "taken over" in result.err) == (0, False)
    assert f"continuing from {begun.checkpoints / 'last.pt'}" in result.err
    assert not begun.run().get("reused")
    assert begun.summary()["finetune"] == original.summary()["finetune"]


def test_without_its_base_a_fine_tune_is_one_line(shell, tmp_path):
    result = shell.luqrun(tmp_path, *SWEEP[1:], "finetune=fnt2")
    assert result.code not in (0, None)
    assert (result.out.strip(), "Traceback" in result.err) == ("", False)
    lines = result.err.strip().splitlines()
    assert [line for line in lines if "resume=base" in line] == [lines[-1]]
    assert all(word in lines[-1] for word in ("resnet8-glyphs-luq_smp2-seed0-", "not there", "finetune=none first"))
    (path,) = (tmp_path / "outputs" / "glyphs" / "table3").glob("*/run.json")
    assert json.loads(path.read_text())["status"] == "failed"


def test_where_the_base_diverged_its_fine_tunes_did_too(shell, tmp_path):
    result = shell.luqrun(tmp_path, *SWEEP, "finetune=none,fnt1", "schedule.lr=1e30")
    assert (result.code, "Traceback" in result.err) == (0, False)
    runs = folders(tmp_path / "outputs", "glyphs/table3")
    base, tuned = (runs[f"luq_smp2_{name}"].run() for name in ("none", "fnt1"))
    assert (base["status"], tuned["status"]) == ("diverged", "diverged")
    assert base["diverged_at_step"] == tuned["diverged_at_step"]
    assert result.out.count("diverged at step") == 2


def test_a_measurement_is_a_run_like_others(shell, tmp_path):
    result = shell.luqrun(tmp_path, "-m", "+experiment=table1/measured", "quant=forward_sr")
    assert (result.code, "Traceback" in result.err) == (0, False)
    (path,) = (tmp_path / "outputs" / "measured" / "table1").glob("rounding-forward_sr-seed0-*")
    folder = RunFolder(path)
    assert [row["drawn"] for row in folder.summary()["rounding"]] == ["stochastic"] * 6
    assert [*resolved(folder)["cell"].values()] == ["table1", "measured", "forward_sr", "rounding"]


# Twins


def config(study="a", tuned=False, **changes) -> Config:
    """A run without or with a fine-tune, as Hydra would compose it: that takes it a fifth of a second each."""
    found = tiny("quant=fp32", "finetune=fnt1", "resume=base") if tuned else tiny("quant=fp32")
    return dataclasses.replace(found, study=study, **changes)


def place(outputs, config, run=None, summary=None) -> RunFolder:
    """The folder of a run under `outputs`, with what was written there."""
    folder = RunFolder(outputs / config.study / run_id(config))
    folder.path.mkdir(parents=True, exist_ok=True)
    if run is not None:
        folder.write_json("run.json", run)
    if summary is not None:
        folder.write_json("summary.json", summary)
    return folder


def test_a_run_has_the_same_name_in_every_table():
    plain = tiny("quant=luq")
    cell = CellConfig("table2", "glyphs", "resnet8", "luq")
    others = [{"reuse": True}, {"resume": "base"}, {"study": "a/b"}, {"cell": cell}]
    others = [dataclasses.replace(plain, **other) for other in others] + [tiny("+experiment=fig2/glyphs")]
    assert plain not in others
    assert {run_id(other) for other in others} == {run_id(plain)}


@pytest.mark.parametrize("study", ["b", "a/b", "z"])
@pytest.mark.parametrize("twins_study", ["c", "a/c", "y/b"])
def test_a_twin_is_found_in_any_study_beside(tmp_path, study, twins_study):
    folder = place(tmp_path, config(study), {"status": "running"})
    twin = place(tmp_path, config(twins_study), FINISHED, {"val/top1": 1.0})
    place(tmp_path, config("elsewhere", seed=1), FINISHED, {"val/top1": 2.0})
    assert find_twin(config(study), folder) == twin.path


@pytest.mark.parametrize(
    ("run", "summary", "found"),
    [
        (FINISHED, {"val/top1": 1.0}, True),
        (DIVERGED, None, True),
        (FINISHED, None, False),
        ({**FINISHED, "status": "running"}, {"val/top1": 1.0}, False),
        ({**FINISHED, "versions": {"luqrun": "0.0.1"}}, {"val/top1": 1.0}, False),
        ({**FINISHED, "versions": None}, {"val/top1": 1.0}, False),
        ({**FINISHED, "results": RESULTS - 1}, {"val/top1": 1.0}, False),
        ({**FINISHED, "world_sizes": [2]}, {"val/top1": 1.0}, False),
        ({**FINISHED, "reused": "../../c/run"}, {"val/top1": 1.0}, False),  # the original is
        ({**FINISHED, "reused": None}, {"val/top1": 1.0}, True),
        (None, {"val/top1": 1.0}, False),
        (["finished"], {"val/top1": 1.0}, False),
    ],
    ids=str,
)
def test_a_twin_has_finished_or_diverged_in_this_version(tmp_path, run, summary, found):
    folder, twin = place(tmp_path, config()), place(tmp_path, config("b"), run, summary)
    assert find_twin(config(), folder) == (twin.path if found else None)


def test_damaged_runs_are_no_twins(tmp_path):
    folder = place(tmp_path, config())
    for study, name in (("b", "run.json"), ("c", "summary.json")):
        half = place(tmp_path, config(study), FINISHED, {"val/top1": 1.0})
        (half.path / name).write_text('{"status": "fin')
    assert find_twin(config(), folder) is None
    whole = place(tmp_path, config("d"), FINISHED, {"val/top1": 1.0})
    assert find_twin(config(), folder) == whole.path


def test_a_run_is_not_its_own_twin_and_a_folder_of_ones_own_has_none(tmp_path):
    folder = place(tmp_path, config(), FINISHED, {"val/top1": 1.0})
    assert find_twin(config(), folder) is None
    for path in ("by/hand", f"b/{run_id(config())}"):  # hydra.run.dir
        assert find_twin(config(), RunFolder(tmp_path / path)) is None


def adopted(outputs, twin) -> tuple[dict, RunFolder]:
    """What `adopt` gives for a run that has just begun in study a."""
    folder = place(outputs, config(), {"status": "running", "command": ["c"], "overrides": ["o"]})
    return adopt(twin.path, folder), folder


def test_what_is_taken_over(tmp_path):
    twin = place(tmp_path, config("b"), FINISHED, {"val/top1": 1.0})
    twin.append_metrics({"kind": "epoch"})
    twin.checkpoints.mkdir()
    summary, folder = adopted(tmp_path, twin)
    assert summary == folder.summary() == twin.summary()
    assert sorted(contents(folder)) == ["metrics.jsonl", "run.json", "summary.json"]
    assert folder.run() == {**FINISHED, "command": ["c"], "overrides": ["o"], "reused": f"../../b/{twin.path.name}"}
    # A third study goes back to the run itself.
    assert find_twin(config("0"), place(tmp_path, config("0"))) == twin.path


def test_a_diverged_twin_is_a_result_too(tmp_path):
    summary, folder = adopted(tmp_path, place(tmp_path, config("b"), DIVERGED))
    assert summary == {"diverged": 3}
    assert (folder.run()["status"], folder.run()["diverged_at_step"]) == ("diverged", 3)
    assert folder.summary() is None


def test_a_result_that_was_taken_over_in_part_is_not_finished(tmp_path, monkeypatch):
    twin = place(tmp_path, config("b"), FINISHED, {"val/top1": 1.0})
    monkeypatch.setattr(RunFolder, "update_run", lambda self, **fields: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adopted(tmp_path, twin)
    assert not (tmp_path / "a" / twin.path.name / "summary.json").exists()


# resume=base


def checkpoint_of(folder) -> None:
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.pt").write_bytes(b"weights")


def test_the_base_is_the_run_without_fine_tune(tmp_path):
    tuned = config("a/b", tuned=True, cell=CellConfig("table3"), tracking=TrackingConfig(log_every=9))
    tuned.finetune = dataclasses.replace(tuned.finetune, lr_base=0.3)
    base = place(tmp_path, config("a/b"), FINISHED, {"val/top1": 1.0})
    checkpoint_of(base)
    assert base_checkpoint(tuned, place(tmp_path, tuned)) == base.checkpoints / "last.pt"
    for other in (config("a/b", tuned=True, seed=1), config("c", tuned=True)):
        with pytest.raises(UserError, match="not there: run the same with finetune=none first"):
            base_checkpoint(other, place(tmp_path, other))


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
    assert base_checkpoint(config(tuned=True), tuned) == original.checkpoints / "last.pt"
    outputs.rename(tmp_path / "moved")
    tuned = RunFolder(tmp_path / "moved" / "a" / tuned.path.name)
    path = base_checkpoint(config(tuned=True), tuned)
    assert path == tmp_path / "moved" / "b" / original.path.name / "checkpoints" / "last.pt"
    shutil.rmtree(tmp_path / "moved" / "b")
    with pytest.raises(UserError, match=r"resume=base.*checkpoints/last\.pt is gone: resume=auto"):
        base_checkpoint(config(tuned=True), tuned)


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
        base_checkpoint(config(tuned=True), place(tmp_path, config(tuned=True)))
    assert str(base.path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_only_a_fine_tune_with_resume_base_diverges_with_its_base(tmp_path):
    base, tuned = place(tmp_path, config(), DIVERGED), config(tuned=True)
    assert diverged_base(tuned, place(tmp_path, tuned)) == base.path
    for other in (config(tuned=True, resume="auto"), config(resume="base")):
        assert diverged_base(other, place(tmp_path, other)) is None
    base.write_json("run.json", {**DIVERGED, "results": 1})
    with pytest.raises(UserError, match=r"resume=base: .* of RESULTS 1"):
        diverged_base(tuned, place(tmp_path, tuned))
    base.write_json("run.json", FINISHED)
    assert diverged_base(tuned, place(tmp_path, tuned)) is None


def test_trained_apart_or_in_one_run_it_is_the_same(tmp_path):
    def run(study, *overrides):
        overrides = *SIZES, f"study={study}", *overrides
        return train(tmp_path / study / run_id(tiny(*overrides)), *overrides)

    _, base = run("apart", "resume=base")  # without fine-tune, as resume=auto
    before = contents(base)
    summary, apart = run("apart", "finetune=fnt2", "resume=base")
    _, whole = run("whole", "finetune=fnt2")
    assert_same_tensors(last(apart)["model"], last(whole)["model"])
    assert summary["finetune"] == whole.summary()["finetune"]
    assert contents(base) == before
    # Once begun, it goes on from its own checkpoint, with or without the base.
    shutil.rmtree(base.path)
    (apart.path / "summary.json").unlink()
    assert run("apart", "finetune=fnt2", "resume=base")[0]["finetune"] == summary["finetune"]
