"""job=plan: every job with its state, its folder and the time that is left; nothing is started, and nothing written."""

import dataclasses
import os
import re

import pytest
from omegaconf import OmegaConf
from placed_runs import DIVERGED, FINISHED, place
from running import TINY, tiny

from luqrun.cli import plan
from luqrun.runs.folder import RunFolder

SUMMARY = {"val/top1": 1.0, "train_seconds": 90.0, "evaluation_seconds": 30.0}


@pytest.fixture
def luqrun(shell, tmp_path):
    return lambda *arguments, **variables: shell.luqrun(tmp_path, *arguments, **variables)


def made(tmp_path, *overrides, run=FINISHED, summary=None, study="default") -> RunFolder:
    config = dataclasses.replace(tiny("quant=fp32", *overrides), study=study)
    folder = place(tmp_path / "outputs", config, {**run, "device": "cpu"}, summary)
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder


def contents(tmp_path):
    return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def rows(result) -> list[tuple[str, ...]]:
    """Of the table: state, time left where there is one, job where there are several."""
    return [tuple(re.split(r"  +", line)[:-1]) for line in result.out.splitlines()[1:-1]]


def test_every_job_has_its_state_its_folder_and_its_time(luqrun, tmp_path):
    folders = [
        made(tmp_path, summary=SUMMARY),
        made(tmp_path, "seed=1", run=DIVERGED),
        made(tmp_path, "seed=2", run={**FINISHED, "reused": "../x"}, summary=SUMMARY),
        made(tmp_path, "seed=3", "schedule.epochs=3", run={**FINISHED, "status": "failed"}),
        made(tmp_path, "seed=4", summary=SUMMARY, study="other"),
    ]
    folders[3].append_metrics({"kind": "epoch", "epoch": 1})
    before = contents(tmp_path)
    sweep = ("-m", *TINY, "quant=fp32", "reuse=true")
    result = luqrun(*sweep, "seed=0,1,2,4,5", "job=plan")
    assert (result.code, result.err) == (0, "")
    assert rows(result) == [
        ("finished", "seed=0"),
        ("diverged", "seed=1"),
        ("taken over", "seed=2"),
        ("taken over", "seed=4"),
        ("missing", "2 min", "seed=5"),
    ]
    paths = [line.split()[-1] for line in result.out.splitlines()[1:-1]]
    assert paths[:3] == [str(folder.path.relative_to(tmp_path)) for folder in folders[:3]]
    assert result.out.splitlines()[-1] == (
        "5 jobs: 1 finished, 1 diverged, 2 taken over, 1 missing; 2 min left, one after the other, by finished runs of "
        "the same kind"
    )
    begun = luqrun("-m", *TINY, "quant=fp32,luq", "schedule.epochs=3", "seed=3", "job=plan")
    assert rows(begun) == [("begun", "4 min", "quant=fp32"), ("missing", "~ 6 min", "quant=luq")]
    assert begun.out.endswith("; 10 min left, one after the other (~: by runs of another recipe)\n")
    assert contents(tmp_path) == before


def test_the_folders_are_those_that_the_command_makes(luqrun, tmp_path):
    command = ("-m", *TINY, "quant=fp32", "seed=0,1")
    planned = luqrun(*command, "job=plan")
    assert [row[0] for row in rows(planned)] == ["missing", "missing"]
    assert "how long 2 of them take, no finished run of the same kind tells" in planned.out
    assert list(tmp_path.iterdir()) == []
    assert luqrun(*command).code == 0
    again = luqrun(*command, "job=plan")
    assert [row[0] for row in rows(again)] == ["finished", "finished"]
    paths = [[line.split()[-1] for line in each.out.splitlines()[1:-1]] for each in (planned, again)]
    assert paths[0] == paths[1]
    assert all((tmp_path / path / "summary.json").is_file() for path in paths[0])


def test_a_single_run_has_a_plan_too(luqrun, tmp_path):
    made(tmp_path, summary=SUMMARY)
    result = luqrun(*TINY, "quant=fp32", "+job=plan", "schedule.epochs=2")
    assert (result.code, result.err) == (0, "")
    (row,) = rows(result)
    assert row[:2] == ("missing", "4 min")


def test_the_jobs_of_an_experiment_that_measures(luqrun):
    result = luqrun("-m", "+experiment=table1/measured", "job=plan")
    assert result.code == 0
    assert all("/rounding-" in line for line in result.out.splitlines()[1:-1])


def test_what_would_be_refused_is_told_with_the_reason(luqrun, tmp_path):
    result = luqrun("-m", *TINY, "quant=fp32", "seed=0,-1,1", "job=plan")
    assert result.code == 1
    assert [row[0] for row in rows(result)] == ["missing", "refused", "missing"]
    assert result.err == "luqrun: job 2 of 3 would be refused: seed=-1 is too small; it must be at least 0\n"
    single = luqrun(*TINY, "resume=nowhere.pt", "job=plan")
    assert single.code == 1
    assert single.err.startswith("luqrun: job 1 of 1 would be refused: resume=nowhere.pt: no such file; allowed: auto")
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_comes_twice_counts_once(luqrun):
    result = luqrun("-m", *TINY, "quant=fp32", "tracking.log_every=1,2", "job=plan")
    assert [row[0] for row in rows(result)] == ["missing", "again"]
    assert "2 jobs: 1 missing, 1 again;" in result.out


def test_fine_tunes_from_a_base_and_a_run_that_goes_on_take_their_own_epochs_alone(luqrun, tmp_path):
    one = made(tmp_path, "schedule.name=step", summary=SUMMARY)
    one.checkpoints.mkdir()
    (one.checkpoints / "last.pt").touch()
    common = (*TINY, "quant=fp32", "schedule.name=step", "job=plan")
    assert rows(luqrun(*common, "schedule.epochs=3", f"resume={one.path}"))[0][:2] == ("missing", "4 min")
    assert rows(luqrun(*common, "finetune=fnt2", "resume=base"))[0][:2] == ("missing", "4 min")  # of 120 s each
    assert rows(luqrun(*common, "finetune=fnt2"))[0][:2] == ("missing", "6 min")


def test_a_fine_tune_from_a_base_needs_it_before_or_in_the_same_command(luqrun, tmp_path):
    common = ("-m", *TINY, "quant=fp32", "resume=base", "job=plan")
    alone = luqrun(*common, "finetune=fnt1")
    assert [row[0] for row in rows(alone)] == ["refused"]
    assert "is not there: run the same with finetune=none first" in alone.err
    assert [row[0] for row in rows(luqrun(*common, "finetune=none,fnt1"))] == ["missing", "missing"]
    made(tmp_path, run=DIVERGED)
    assert [row[0] for row in rows(luqrun(*common, "finetune=fnt1"))] == ["missing"]


@pytest.mark.parametrize("why", ["refused", "elsewhere", "its checkpoint is gone"])
def test_a_fine_tune_from_a_base_that_has_no_end_in_this_command_is_refused(luqrun, tmp_path, locked, why):
    finished = why == "its checkpoint is gone"
    run, summary = (FINISHED, SUMMARY) if finished else ({**FINISHED, "status": "running"}, None)
    base = made(tmp_path, run=run, summary=summary)
    if why == "refused":
        (base.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(tiny("seed=3"))))
        base.append_metrics({"kind": "epoch", "epoch": 1})
    elif why == "elsewhere":
        locked(base)
    result = luqrun("-m", *TINY, "quant=fp32", "resume=base", "finetune=none,fnt1", "job=plan")
    assert [row[0] for row in rows(result)] == ["finished" if finished else why, "refused"]
    assert result.code == 1
    path = base.path.relative_to(tmp_path)
    assert f"job 2 of 2 would be refused: resume=base: the run without fine-tuning, {path}, is" in result.err


def test_a_fine_tune_from_a_base_that_is_to_be_taken_over_is_not(luqrun, tmp_path):
    made(tmp_path, summary=SUMMARY, study="other")
    result = luqrun("-m", *TINY, "quant=fp32", "reuse=true", "resume=base", "finetune=none,fnt1", "job=plan")
    assert [row[0] for row in rows(result)] == ["taken over", "missing"]


def test_a_job_that_is_refused_twice_is_told_twice(luqrun):
    result = luqrun("-m", *TINY, "seed=-1", "tracking.log_every=1,2", "job=plan")
    assert [row[0] for row in rows(result)] == ["refused", "refused"]
    assert result.err.count("seed=-1 is too small") == 2


def test_a_folder_that_was_set_by_hand_tells_no_time(luqrun, tmp_path):
    made(tmp_path, summary=SUMMARY)
    assert rows(luqrun(*TINY, "quant=fp32", "seed=1", "hydra.run.dir=here", "job=plan"))[0][:2] == (
        "missing",
        "unknown",
    )


@pytest.fixture
def locked():
    """locked(folder): another process works there until the test ends."""
    processes = []

    def locked(folder: RunFolder) -> None:
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            with folder.locked():
                os.write(write, b".")
                os.read(os.pipe()[0], 1)
        processes.append(process)
        os.read(read, 1)

    yield locked
    for process in processes:
        os.kill(process, 9)
        os.waitpid(process, 0)


def test_what_another_process_runs_is_left_to_it(luqrun, tmp_path, locked):
    locked(made(tmp_path, run={**FINISHED, "status": "running"}))
    assert rows(luqrun("-m", *TINY, "quant=fp32", "job=plan"))[0][0] == "elsewhere"


def test_jobs_of_several_processes_have_their_own_folders(luqrun):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    one = luqrun("-m", *TINY, "job=plan")
    several = luqrun("-m", *TINY, "hydra/launcher=submitit_slurm_nodes", "hydra.launcher.nodes=1", "job=plan")
    assert (several.code, several.err) == (0, "")
    assert [row[0] for row in rows(several)] == ["missing"]
    assert one.out.splitlines()[1].split()[-1] != several.out.splitlines()[1].split()[-1]


def test_a_search_has_no_plan(luqrun, tmp_path):
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    result = luqrun("-m", "hydra/sweeper=optuna_lr", "study=tune", *TINY, "job=plan")
    assert (result.code, result.out) == (1, "")
    (line,) = [line for line in result.err.splitlines() if line.startswith("luqrun: ")]
    assert "job=plan: which jobs hydra/sweeper=optuna_lr runs follows from their results" in line


def test_a_plan_is_asked_for_by_one_word():
    assert plan.taken_from(["-m", "seed=0", "job=plan"]) == ["-m", "seed=0"]
    assert plan.asked
    assert plan.taken_from(["job=planned", "study=plan"]) == ["job=planned", "study=plan"]
    assert not plan.asked
