"""Sweeps, as whole processes: every job is in the table, a failure ends nothing, and nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import TINY, quiet_machine
from shell import Result, environment

from luqrun.cli import command as cli
from luqrun.cli import sweeps
from luqrun.cli.sweeps import Died, Failed, Job, Refused
from luqrun.runs.folder import RunFolder
from luqrun.train.trainer import Trainer

FAST = (*TINY, "quant=fp32")


class Forked:
    """`luqrun ARGUMENTS` in the folder `cwd`, in a fork of this process: what is patched here is patched there."""

    def __init__(self, cwd, cache, *arguments, **variables):
        self.files = [cwd / f"{name}{time.monotonic_ns()}" for name in ("out", "err")]
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                for number, path in enumerate(self.files, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
                os.chdir(cwd)
                os.environ.update(environment(cache, **variables))
                sys.argv = ["luqrun", *arguments]
                with quiet_machine(cache):  # the threads that OpenMP had here are not in a fork: it must ask for none
                    cli.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def result(self) -> Result:
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return Result(code, *(path.read_text() for path in self.files))


@pytest.fixture
def luqrun(tmp_path, cache):
    return lambda *arguments, **variables: Forked(tmp_path, cache, *arguments, **variables).result()


def table(result) -> dict[str, str]:
    """The closing table: job -> status."""
    rows = result.out.rpartition("\nstatus ")[2].splitlines()[1:-1]
    return {re.split(r"  +", row)[-2 if "outputs/" in row else -1]: row.split("  ")[0] for row in rows}


def complaints(result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("luqrun: ")]


def test_a_failure_has_its_traceback_in_its_log_and_the_rest_goes_on(luqrun, tmp_path, monkeypatch):
    fit = Trainer.fit

    def failing(self):
        if self.config.seed == 1:
            raise RuntimeError("a bug")
        fit(self)

    monkeypatch.setattr(Trainer, "fit", failing)
    sweep = ("-m", *FAST, "seed=0,1,-1,2", "hydra.sweeper.max_batch_size=1")
    result = luqrun(*sweep)
    assert result.code == 1
    assert table(result) == {"seed=0": "finished", "seed=1": "failed", "seed=-1": "refused", "seed=2": "finished"}
    first, second, third = complaints(result)
    assert first == "luqrun: seed=-1 is too small; it must be at least 0"  # where it was its turn
    assert second.startswith("luqrun: job 2 of 4 (seed=1) failed: RuntimeError: a bug; the traceback is in ")
    assert third == "luqrun: job 3 of 4 (seed=-1) was refused: seed=-1 is too small; it must be at least 0"
    assert "Error executing job" not in result.err
    log = Path(second.rpartition(" ")[2]).read_text()
    assert "Traceback (most recent call last)" in log
    assert "RuntimeError: a bug" in log
    run = json.loads((Path(second.rpartition(" ")[2]).parent / "run.json").read_text())
    assert (run["status"], run["reason"]) == ("failed", "RuntimeError: a bug")

    monkeypatch.undo()
    again = luqrun(*sweep)
    assert table(again) == {**table(result), "seed=1": "finished"}
    assert again.err.count("this run is finished") == 2
    assert again.err.count("epoch 1/1") == 1


def test_interrupted_between_two_jobs(luqrun, monkeypatch):
    def ended(number, job_return):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "ended", ended)
    result = luqrun("-m", *FAST, "seed=0,1")
    assert result.code == 130
    assert table(result) == {"seed=0": "finished", "seed=1": "not run"}
    assert complaints(result) == ["luqrun: interrupted; the same command goes on with what is missing"]


def test_a_job_that_fails_when_asked_to_stop_ends_the_sweep(luqrun, monkeypatch):
    def full(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "train_step", full)
    result = luqrun("-m", *FAST, "seed=0,1")
    assert result.code == 128 + signal.SIGTERM
    assert table(result)["seed=1"] == "not run"
    assert complaints(result)[0].startswith("luqrun: the disk is full")


def test_two_sweeps_at_once_share_their_jobs(tmp_path, cache, monkeypatch):
    fit = Trainer.fit

    def beside_each_other(self):
        (tmp_path / f"in{os.getpid()}").touch()
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("in*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # until the other sweep is in a job too
        fit(self)

    monkeypatch.setattr(Trainer, "fit", beside_each_other)
    sweep = ("-m", *FAST, "seed=0,1,2")
    both = [Forked(tmp_path, cache, *sweep) for _ in range(2)]
    results = [one.result() for one in both]
    for result in results:
        assert result.code == 0
        assert list(table(result)) == ["seed=0", "seed=1", "seed=2"]
        assert set(table(result).values()) <= {"finished", "elsewhere"}
    folders = [path.parent for path in tmp_path.glob("outputs/default/*/summary.json")]
    assert len(folders) == 3
    assert all((folder / "run.log").read_text().count("epoch 1/1") == 1 for folder in folders)
    trained = [result.err.count("epoch 1/1") for result in results]
    assert sum(trained) == 3
    assert all(trained)
    assert all(len((folder / "metrics.jsonl").read_text().splitlines()) == 5 for folder in folders)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what a process holds is read from Linux' /proc")
def test_jobs_leave_nothing_behind(luqrun, tmp_path, monkeypatch):
    """Of five jobs, the first warms up and the fourth fails. Over 20 (scripts/leaks.py) it is 3 MiB in 16 jobs."""
    fit = Trainer.fit

    def failing(self):
        kept = self.model  # in a frame of the traceback
        if self.config.seed == 3:
            raise RuntimeError(f"a bug with {len(list(kept.parameters()))} tensors")
        fit(self)

    monkeypatch.setattr(Trainer, "fit", failing)
    measure = "+hydra.callbacks.leaks._target_=luqrun.bench.leaks.Measure"
    luqrun("-m", *TINY, "seed=range(5)", measure, f"+hydra.callbacks.leaks.path={tmp_path}/rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 5
    for name in ("threads", "handles", "tensors"):
        assert len({row[name] for row in rows[1:]}) == 1, [row[name] for row in rows]
    assert rows[-1]["resident_mib"] - rows[1]["resident_mib"] < 20, rows


def test_optuna_survives_divergence_and_the_same_command_trains_nothing_again(luqrun, tmp_path):
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    search = ("-m", "hydra/sweeper=optuna_lr", "hydra.sweeper.n_trials=3", *FAST, "finetune=fnt1", "study=tune")
    lr = "schedule.lr=choice(0.05,1e30)"
    result = luqrun(*search, lr)
    assert result.code == 0, result.err
    rates = re.findall(r"schedule\.lr=(\S+) finetune\.lr_base=(\S+)", result.out.rpartition("\nstatus")[2])
    assert len(rates) == 3
    assert all(1e-3 <= float(base) <= 0.3 for _, base in rates)
    assert set(table(result).values()) == {"finished", "diverged"}
    found = (tmp_path / "outputs" / "tune" / "optimization_results.yaml").read_text()
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    best = max(summary["val/top1"] for summary in summaries)
    assert float(re.search(r"best_value: (\S+)", found)[1]) == best
    assert "schedule.lr: 0.05" in found
    again = luqrun(*search, lr)
    assert table(again) == table(result)
    assert again.err.count("epoch 1/2") == 0
    failed = luqrun(*search, "seed=-1")
    assert failed.code == 1
    assert set(table(failed).values()) == {"refused"}
    assert "Traceback" not in failed.err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_processes_of_submitit_are_queued_again_and_told_of(tmp_path, cache):
    """One job is refused; the other is preempted: its step ends, a checkpoint is there, the next process goes on."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    sweep = ("-m", "hydra/launcher=submitit_local", *FAST, "schedule.epochs=0,15", "tracking.checkpoint_every=0")
    command = subprocess.Popen(
        [sys.executable, "-m", "luqrun", *sweep, "tracking.log_every=0"],
        cwd=tmp_path, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while command.poll() is None and not list(tmp_path.glob("outputs/default/*/checkpoints/last.pt")):
        time.sleep(0.05)
    (folder,) = (path.parent for path in tmp_path.glob("outputs/default/*/checkpoints"))
    os.kill(int(re.match(r"pid (\d+)", (folder / ".lock").read_text())[1]), signal.SIGUSR2)
    result = Result(command.wait(), *command.communicate())
    log = (folder / "run.log").read_text()
    assert log.count("stopped by SIGUSR2; the same command continues from the last checkpoint") == 1
    assert log.count("Requeued job") == 1
    assert log.count("continuing from") == 1
    assert all(log.count(f"epoch {number}/15 ") == 1 for number in range(1, 16))
    assert result.code == 1
    assert table(result) == {"schedule.epochs=0": "refused", "schedule.epochs=15": "finished"}
    assert complaints(result) == [
        "luqrun: job 1 of 2 (schedule.epochs=0) was refused: schedule.epochs=0 is too small; it must be at least 1, "
        "or 0 to fine-tune model.weights alone (with finetune.epochs above 0)"
    ]
    assert "Traceback" not in result.err


def test_what_slurm_is_asked_for(luqrun, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    for name, text in (("srun", ""), ("sbatch", f"cp $1 {tmp_path}/script; echo no such partition >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    asked = {}
    for option in ("submitit_slurm_node", "submitit_slurm_nodes"):
        refused = luqrun("-m", f"hydra/launcher={option}", *FAST, "hydra.launcher.partition=x", "seed=0,1", PATH=path)
        assert refused.code == 1
        (line,) = complaints(refused)
        assert "could not be started" in line
        assert "no such partition" in line
        asked[option] = (tmp_path / "script").read_text()
        wanted = {"--requeue", "--signal=USR2@120", "--partition=x", "--time=1440", "--array=0-1%2"}
        assert wanted <= set(re.findall(r"^#SBATCH (\S+)", asked[option], re.MULTILINE))
    assert "--gpus-per-node=1" in asked["submitit_slurm_node"]
    for word in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "export SLURM_KILL_BAD_EXIT=1"):
        assert word in asked["submitit_slurm_nodes"]


def test_outcomes(tmp_path):
    def job(status=None, error=None, reason=None):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if status:
            RunFolder(folder).write_json("run.json", {"status": status, "reason": reason})
        if status == "finished":
            RunFolder(folder).write_json("summary.json", {"val/top1": 12.345})
        return Job(["seed=0"], folder, error)

    assert job("finished").outcome()[:2] == ("finished", "12.35")
    assert job("diverged").outcome()[:2] == ("diverged", "")
    assert job().outcome()[:2] == ("not run", "")
    assert job("finished", Refused("no")).outcome()[:2] == ("refused", "")
    assert job("failed", Failed("a bug")).outcome()[:2] == ("failed", "")
    assert job("running", Died("killed")).outcome()[:2] == ("killed", "")
    assert job("failed", Died("stopped")).outcome()[:2] == ("failed", "")
    assert job("failed").outcome()[:2] == ("failed", "")
    assert job("failed", reason="stopped by SIGTERM").outcome()[:2] == ("interrupted", "")
    assert job(None, Died("killed")).outcome()[:2] == ("killed", "")
    damaged = job()
    (damaged.folder / "run.json").write_text("{")
    assert damaged.outcome()[:2] == ("damaged", "")
    busy = job("running")
    process = os.fork()
    if process == 0:
        with RunFolder(busy.folder).locked():
            (busy.folder / "held").touch()
            time.sleep(60)
    try:
        while not (busy.folder / "held").exists():
            time.sleep(0.01)
        assert busy.outcome()[:2] == ("elsewhere", "")
        (busy.folder / "run.json").unlink()  # it has its folder, and is about to say that it runs
        assert busy.outcome()[:2] == ("elsewhere", "")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert busy.outcome()[:2] == ("not run", "")


def test_what_a_job_has_of_its_own():
    jobs = [
        Job(["a=1", "b='x y'", "c=3"], Path("x")),
        Job(["a=1", "b='x z'", "c=3"], Path("y"), Died("gone\nquietly")),
    ]
    assert sweeps.own_overrides(jobs) == [""" "b='x y'" """.strip(), """ "b='x z'" """.strip()]
    assert sweeps.own_overrides(jobs[:1]) == [""" a=1 "b='x y'" c=3 """.strip()]
    assert sweeps.failures(jobs) == [""" job 2 of 2 ("b='x z'") died: gone quietly """.strip()]
