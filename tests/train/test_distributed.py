"""Whole jobs of several processes that stop, lose a process, and go on, with as many processes or others.

torchrun starts them where it has a part in what is tested: it hands on signals, restarts, or dies.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from jobs import LIMIT, RUN, STEPS, Ranks, finish, processes_of, reached, run_folder, start
from running import assert_same_tensors, last, metrics

from luqrun.runs.folder import RunFolder

PROCESSES = 3  # of more than two the sums depend on their order


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    for part in ("model", "optimizer"):
        assert_same_tensors(last(one)[part], last(other)[part])
    assert metrics(one) == metrics(other)


@pytest.fixture(scope="module")
def ranks(shell):
    """ranks(cwd, processes, *overrides): a job without torchrun."""
    return lambda cwd, processes, *overrides: Ranks(shell, cwd, processes, *RUN, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(ranks, tmp_path_factory):
    """The folder of a job that was left alone."""
    cwd = tmp_path_factory.mktemp("whole")
    code, console = ranks(cwd, PROCESSES).finish()
    assert code == 0, console
    return cwd


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a job that lost a process, was started again by torchrun, and then asked to stop; its console."""
    cwd = tmp_path_factory.mktemp("stopped")
    job = start(cwd, PROCESSES, options=("--max-restarts=1",))
    reached(cwd, 4)
    os.kill(processes_of(job)[0], signal.SIGKILL)
    while job.poll() is None and "continuing from" not in (cwd / "console").read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    code, console = finish(job, cwd)
    assert code != 0
    assert "exitcode: -9" in console or "Signal 9" in console, console
    return cwd, console


def test_a_second_job_on_the_same_run_is_refused(ranks, uninterrupted):
    with run_folder(uninterrupted).locked():  # as the first process of another job does
        code, console = ranks(uninterrupted, PROCESSES).finish()
    assert code != 0
    assert console.count("luqrun (rank 0)") == console.count("is being run by another process") == 1
    assert "luqrun (rank 1)" not in console


def test_a_finished_run_is_shown_once(ranks, uninterrupted):
    before = sorted(path.stat().st_mtime_ns for path in run_folder(uninterrupted).path.glob("checkpoints/*"))
    code, console = ranks(uninterrupted, PROCESSES).finish()
    assert code == 0
    assert console.count("this run is finished") == console.count("top-1 %") == 1
    assert sorted(path.stat().st_mtime_ns for path in run_folder(uninterrupted).path.glob("checkpoints/*")) == before


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_restarted_and_asked_to_stop_a_job_goes_on_with_any_number_of_processes(
    ranks, uninterrupted, stopped, tmp_path, processes
):
    """With as many as before by the same command, bit-identically; with others as another run, by resume=PATH."""
    before, console = stopped
    assert console.count("stopped by SIGTERM; the same command continues from the last checkpoint") == 1
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    folder = begun = run_folder(tmp_path)
    done = last(begun)["progress"]["step"]
    assert 3 <= done < STEPS
    path = begun.checkpoints / "last.pt"
    code, console = ranks(tmp_path, processes, *([f"resume={path}"] * (processes != PROCESSES))).finish()
    assert code == 0, console
    assert console.count(f"step {done}\n") == 1
    if processes != PROCESSES:
        why = f"a run by {PROCESSES} processes, this one has {processes}, whose last checkpoint resume={path} takes"
        assert f"{begun.path}, {why}" in console
        (folder,) = [RunFolder(each) for each in begun.path.parent.iterdir() if each != begun.path]
        assert folder.run()["world_sizes"] == [PROCESSES, processes]
    assert last(folder)["progress"]["step"] == STEPS
    assert (folder.run()["world_size"], folder.run()["status"]) == (processes, "finished")
    if processes == PROCESSES:
        assert_same_run(folder, run_folder(uninterrupted))


def test_a_process_that_dies_ends_the_others(ranks, tmp_path):
    job = ranks(tmp_path, 2)
    reached(tmp_path, 2)
    job.ranks[1].kill()
    code, console = job.finish()
    assert code == 1
    assert "another process of this job has ended" in console
    assert run_folder(tmp_path).summary() is None


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux alone tells a process that its parent died")
def test_without_torchrun_the_processes_write_a_checkpoint_and_end(tmp_path):
    """SIGUSR1 ends torchrun itself, if it is not told to pass it on."""
    job = start(tmp_path, 2, "schedule.epochs=100")
    reached(tmp_path, 4)
    processes = processes_of(job)
    job.send_signal(signal.SIGUSR1)
    finish(job, tmp_path)
    deadline = time.monotonic() + LIMIT
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "stopped by SIGTERM; the same command continues" in (tmp_path / "console").read_text()


def test_what_a_process_refuses_is_on_the_console(ranks, tmp_path):
    code, console = ranks(tmp_path, 2, "dataset.batch_size=23").finish()
    assert code != 0
    assert "luqrun (rank 1): dataset.batch_size=23 must be a multiple of the 2 processes" in console
    assert not (tmp_path / "outputs").exists()
