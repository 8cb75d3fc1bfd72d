"""The run folder: names without a clock, files that are there whole or as they were."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from luqrun.runs import folder as run_folder
from luqrun.runs.folder import LOCK, Busy, RunFolder, provenance, write_atomically


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(run_folder.Path, "replace", lambda self, target: done.append(target.name))
    write_atomically(tmp_path / "summary.json", b"12345")
    assert done == [5, "summary.json"]


def test_a_folder_that_holds_nothing_yet(tmp_path):
    folder = RunFolder(tmp_path)
    assert (folder.summary(), folder.run(), folder.metrics_size()) == (None, {}, 0)
    folder.truncate_metrics(0)
    assert os.listdir(tmp_path) == []


def test_run_json_keeps_the_fields_it_is_not_given(tmp_path):
    folder = RunFolder(tmp_path)
    folder.update_run(status="running", start="now")
    folder.update_run(status="finished")
    assert folder.run() == {"status": "finished", "start": "now"}


def test_metrics_are_on_disk_at_once_and_cut_to_a_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1})
    size = folder.metrics_size()
    folder.append_metrics({"step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    folder.truncate_metrics(size)
    folder.append_metrics({"step": 2, "again": True})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "again": True}]
    folder.truncate_metrics(10_000)  # never grows
    assert folder.metrics_size() == size + len(lines[1]) + 1


def test_curves_are_cut_to_a_checkpoint(tmp_path):
    folder, (first, second) = RunFolder(tmp_path), (tmp_path / f"events.out.tfevents.{n}" for n in (1, 2))
    first.write_bytes(b"12345")
    written = folder.written()
    assert written == {"metrics_bytes": 0, "event_bytes": {first.name: 5}}
    first.write_bytes(b"12345678")
    second.write_bytes(b"1234")
    folder.append_metrics({"step": 1})
    folder.rewind({"metrics_bytes": 0})  # of a checkpoint that says nothing of curves
    assert (folder.metrics_size(), first.read_bytes(), second.exists()) == (0, b"12345678", True)
    folder.rewind(written)
    assert (first.read_bytes(), second.exists()) == (b"12345", False)
    folder.rewind({})
    assert not first.exists()


def test_provenance_names_versions_and_the_commit():
    found = provenance()
    assert found["versions"].keys() >= {"python", "luqrun", "torch", "torchvision", "numba"}
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", found["git_commit"])
    assert isinstance(found["command"], list)


def test_provenance_of_an_installed_package_takes_no_commit_of_a_repository_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "luqrun" / "runs" / "folder.py"))
    assert provenance()["git_commit"] is None


def test_asking_for_the_commit_leaves_the_repository_alone(tmp_path, monkeypatch):
    """A plain `git status` writes the index anew, and one that is killed meanwhile leaves its lock."""
    (tmp_path / "luqrun").mkdir()
    tracked = tmp_path / "pyproject.toml"
    tracked.write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    os.utime(tracked, (1, 1))  # as if it might have changed
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "luqrun" / "runs" / "folder.py"))
    found = provenance()
    assert (len(found["git_commit"]), found["git_dirty"]) == (40, False)
    assert (tmp_path / ".git" / "index").read_bytes() == before


HOLDER = """
import sys, time
from luqrun.runs.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(60)
"""
TRIER = """
import sys
from luqrun.runs.folder import Busy, RunFolder
print(RunFolder(sys.argv[1]).is_locked())
try:
    with RunFolder(sys.argv[1]).locked():
        print("locked")
except Busy as busy:
    print(busy)
"""


def try_elsewhere(folder) -> list[str]:
    """Whether another process sees the folder locked, and what it gets when it locks it."""
    result = subprocess.run([sys.executable, "-c", TRIER, folder], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_a_folder_is_locked_while_its_process_lives(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        assert RunFolder(tmp_path).is_locked()
        message = rf"{tmp_path} is being run by another process \(pid {holder.pid} on "
        with pytest.raises(Busy, match=message), RunFolder(tmp_path).locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert not RunFolder(tmp_path).is_locked()
    with RunFolder(tmp_path).locked():  # nothing is left of a dead one
        pass


ASKER = """
import sys
from luqrun.runs.folder import RunFolder
print("asking", flush=True)
while True:
    RunFolder(sys.argv[1]).is_locked()
"""


def test_who_only_asks_keeps_nobody_from_the_lock(tmp_path):
    (tmp_path / LOCK).touch()
    asker = subprocess.Popen([sys.executable, "-c", ASKER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert asker.stdout.readline() == "asking\n"
        for _ in range(200):
            with RunFolder(tmp_path).locked():
                pass
    finally:
        asker.kill()
        asker.communicate()


def test_a_lock_is_not_lost_by_asking_for_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with RunFolder(tmp_path / "run").locked():
        for name in ("run", "link"):  # closing any handle of the file would give it up
            assert RunFolder(tmp_path / name).is_locked()
            with pytest.raises(Busy, match="by this process already"), RunFolder(tmp_path / name).locked():
                pass
        seen, refused = try_elsewhere(tmp_path / "run")
        assert seen == "True"
        assert f"by another process (pid {os.getpid()} on " in refused
    assert not RunFolder(tmp_path / "link").is_locked()
    assert try_elsewhere(tmp_path / "run") == ["False", "locked"]
