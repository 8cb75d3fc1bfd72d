"""Runs that stand on others: twins in other studies, fine-tunes that start from one checkpoint, a sweep of both."""

import dataclasses
import json
import shutil

import pytest
import yaml
from placed_runs import DIVERGED, FINISHED, config, contents, place
from running import metrics, tiny

from luqrun import RESULTS
from luqrun.config import CellConfig
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.runs.twins import adopt, find_twin

SIZES = ("dataset.glyphs.train_images=64", "dataset.glyphs.val_images=32", "dataset.batch_size=16", "schedule.epochs=1")
SWEEP = ("-m", "+experiment=table3/embedded", "seed=0", "quant=luq_smp2", *SIZES, "device=cpu", "tracking.log_every=1")
COLUMNS = ["luq_smp2_none", "luq_smp2_fnt1", "luq_smp2_fnt2", "luq_smp2_fnt3"]


def folders(outputs, study):
    """By column, the run folders of a study of table 3."""
    found = [RunFolder(path.parent) for path in (outputs / study).glob("*/config.yaml")]
    return {resolved(folder)["cell"]["column"]: folder for folder in found}


def resolved(folder):
    return yaml.safe_load((folder.path / "config.yaml").read_text())


@pytest.fixture(scope="module")
def table3(shell, tmp_path_factory):
    """The folder in which the sweep of table 3 was run, for one seed of LUQ + SMP."""
    cwd = tmp_path_factory.mktemp("table3")
    result = shell.luqrun(cwd, *SWEEP)
    assert (result.code, "Traceback" in result.err) == (0, False), result.err
    return cwd


def test_a_sweep_fine_tunes_from_one_checkpoint_that_is_trained_once(table3):
    runs = folders(table3 / "outputs", "embedded/table3")
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
    for column, folder in folders(table3 / "outputs", "embedded/table3").items():
        cell = {"table": "table3", "scale": "embedded", "row": "resnet8", "column": column}
        assert resolved(folder)["cell"] == cell
        name = f"resnet8-glyphs-{column}-seed0-".replace("_none", "").replace("_fnt", "-fnt")
        assert folder.path.name.startswith(name)


def test_a_repeated_sweep_runs_nothing_again(shell, table3):
    runs = folders(table3 / "outputs", "embedded/table3")
    before = {column: contents(folder) for column, folder in runs.items()}
    result = shell.luqrun(table3, *SWEEP)
    assert (result.code, result.err.count("this run is finished")) == (0, 4)
    assert {column: contents(folder) for column, folder in runs.items()} == before


def test_the_same_sweep_in_another_study_trains_nothing(shell, table3):
    originals = folders(table3 / "outputs", "embedded/table3")
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
    original = folders(table3 / "outputs", "embedded/table3")["luq_smp2_fnt1"]
    begun = RunFolder(table3 / "outputs" / "begun" / original.path.name)
    shutil.copytree(original.checkpoints, begun.checkpoints)
    begun.write_json("run.json", {**FINISHED, "status": "failed", "reused": "nowhere"})  # of an earlier attempt
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
    (path,) = (tmp_path / "outputs" / "embedded" / "table3").glob("*/run.json")
    assert json.loads(path.read_text())["status"] == "failed"


def test_where_the_base_diverged_its_fine_tunes_did_too(shell, tmp_path):
    result = shell.luqrun(tmp_path, *SWEEP, "finetune=none,fnt1", "schedule.lr=1e30")
    assert (result.code, "Traceback" in result.err) == (0, False)
    runs = folders(tmp_path / "outputs", "embedded/table3")
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


def test_a_run_has_the_same_name_in_every_table():
    plain = tiny("quant=luq")
    cell = CellConfig("table2", "embedded", "resnet8", "luq")
    others = [{"reuse": True}, {"resume": "base"}, {"study": "a/b"}, {"cell": cell}]
    others = [dataclasses.replace(plain, **other) for other in others] + [tiny("+experiment=fig2/embedded")]
    assert plain not in others
    assert {run_id(other, {}) for other in others} == {run_id(plain, {})}


@pytest.mark.parametrize("study", ["b", "a/b", "z"])
@pytest.mark.parametrize("twins_study", ["c", "a/c", "y/b"])
def test_a_twin_is_found_in_any_study_beside(tmp_path, study, twins_study):
    folder = place(tmp_path, config(study), {"status": "running"})
    twin = place(tmp_path, config(twins_study), FINISHED, {"val/top1": 1.0})
    place(tmp_path, config("elsewhere", seed=1), FINISHED, {"val/top1": 2.0})
    assert find_twin(config(study), folder, {}) == twin.path


@pytest.mark.parametrize(
    ("run", "summary", "found"),
    [
        (FINISHED, {"val/top1": 1.0}, True),
        (DIVERGED, None, True),
        (FINISHED, None, False),
        ({**FINISHED, "status": "running"}, {"val/top1": 1.0}, False),
        ({**FINISHED, "versions": None}, {"val/top1": 1.0}, True),  # they decide nothing
        ({**FINISHED, "results": RESULTS - 1}, {"val/top1": 1.0}, False),
        ({**FINISHED, "world_sizes": [2]}, {"val/top1": 1.0}, False),
        ({**FINISHED, "world_sizes": [2, 1]}, {"val/top1": 1.0}, False),  # resumed by hand
        ({**FINISHED, "reused": "../../c/run"}, {"val/top1": 1.0}, False),  # the original is
        ({**FINISHED, "reused": None}, {"val/top1": 1.0}, True),
        (None, {"val/top1": 1.0}, False),
        (["finished"], {"val/top1": 1.0}, False),
    ],
    ids=str,
)
def test_a_twin_has_finished_or_diverged_with_these_numbers_and_processes(tmp_path, run, summary, found):
    folder, twin = place(tmp_path, config()), place(tmp_path, config("b"), run, summary)
    assert find_twin(config(), folder, {}) == (twin.path if found else None)


def test_damaged_runs_are_no_twins(tmp_path):
    folder = place(tmp_path, config())
    for study, name in (("b", "run.json"), ("c", "summary.json")):
        half = place(tmp_path, config(study), FINISHED, {"val/top1": 1.0})
        (half.path / name).write_text('{"status": "fin')
    assert find_twin(config(), folder, {}) is None
    whole = place(tmp_path, config("d"), FINISHED, {"val/top1": 1.0})
    assert find_twin(config(), folder, {}) == whole.path


def test_a_run_is_not_its_own_twin_and_a_folder_of_ones_own_has_none(tmp_path):
    folder = place(tmp_path, config(), FINISHED, {"val/top1": 1.0})
    assert find_twin(config(), folder, {}) is None
    for path in ("by/hand", f"b/{run_id(config(), {})}"):  # hydra.run.dir
        assert find_twin(config(), RunFolder(tmp_path / path), {}) is None


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
    assert find_twin(config("0"), place(tmp_path, config("0")), {}) == twin.path


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
