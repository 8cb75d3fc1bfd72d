"""The run folder: names without a clock, files that are there whole or as they were."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import yaml
from running import composed, tiny

from luqrun.cli.validation import to_config
from luqrun.config import Config
from luqrun.runs import folder as run_folder
from luqrun.runs.folder import (
    Busy,
    RunFolder,
    of_the_result,
    provenance,
    run_id,
    what_decides_the_result,
    write_atomically,
)

SAME_RESULT = [
    "study=other",
    "resume=never",
    "reuse=true",
    "cell.table=fig2",
    "device=auto",
    "compile=true",
    "dataset.workers=3",
    "schedule.finetune_lr=0.3",
    "finetune.lr_base=0.3",
    "dataset.root=/somewhere",
    "tracking.log_every=7",
    "tracking.checkpoint_every=1",
]
OTHER_RESULT = [
    "task=rounding",
    "seed=1",
    "precision=bf16",
    "model=resnext8",
    "model.stem=small",
    "dataset.limit=100",
    "dataset.augment=true",
    "dataset.batch_size=16",
    "dataset.glyphs.noise=0.2",
    "quant=fp32",
    "quant.gradient.samples=2",
    "quant.skip=[first]",
    "schedule.lr=0.2",
    "schedule.epochs=2",
    "schedule.accumulate=2",
    "finetune=fnt1",
    "finetune.epochs=4",
    "distributed.batch_norm=sync",
    "distributed.range=global",
]


def test_run_id_is_readable_and_has_no_clock(monkeypatch):
    name = run_id(tiny("finetune=fnt3"))
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert run_id(tiny("finetune=fnt3")) == name
    assert re.fullmatch(r"resnet8-glyphs-luq-fnt3-seed0-[0-9a-f]{8}", name)
    assert re.fullmatch(r"resnet8-glyphs-fp32-seed7-[0-9a-f]{8}", run_id(tiny("quant=fp32", "seed=7")))


@pytest.mark.parametrize("override", SAME_RESULT)
def test_run_id_is_the_same_for_what_does_not_change_the_result(override):
    assert tiny(override) != tiny()
    assert run_id(tiny(override)) == run_id(tiny())


def test_run_id_differs_for_everything_that_changes_the_result():
    names = [run_id(tiny(override)) for override in OTHER_RESULT]
    assert len({run_id(tiny()), *names}) == len(OTHER_RESULT) + 1


def test_every_top_level_key_was_thought_of():
    covered = {override.split("=")[0].split(".")[0] for override in SAME_RESULT + OTHER_RESULT}
    assert covered == {field.name for field in fields(Config)}


def test_the_root_of_a_folder_data_set_is_part_of_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute, relative, other = (
        run_id(to_config(composed("dataset=folder", f"dataset.root={root}"))) for root in (tmp_path / "a", "a", "b")
    )
    assert absolute == relative
    assert absolute != other


def test_run_id_makes_a_folder_name_of_any_name(tmp_path):
    config = tiny()
    for name in ("a/b c", "../up", "ü" * 400, "x" * 400):
        config.quant = replace(config.quant, name=name)
        identity = run_id(config)
        assert len(os.fsencode(identity)) <= 255
        (tmp_path / identity).mkdir()
        assert (tmp_path / identity).parent == tmp_path


def test_what_decides_the_result_is_plain_json():
    values = what_decides_the_result(tiny())
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize("overrides", [(), ("finetune=fnt1",), ("task=rounding",), ("distributed.range=global",)])
def test_what_decides_the_result_is_the_same_of_a_config_read_again(overrides):
    config = tiny(*overrides)
    assert of_the_result(yaml.safe_load(yaml.safe_dump(asdict(config)))) == what_decides_the_result(config)


@pytest.mark.parametrize("root", ["a\0b", "\ud800", 3.5, [1], {}])
def test_a_root_that_is_no_path_stays_as_it_is(root):
    config = {"dataset": {"name": "folder", "root": root, "workers": 3}, "schedule": None, "finetune": [], "cell": 1}
    assert of_the_result(config) == {"dataset": {"name": "folder", "root": root}, "schedule": None, "finetune": []}
    assert config["dataset"]["workers"] == 3  # not changed


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


def test_a_folder_is_locked_while_its_process_lives(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        message = rf"{tmp_path} is being run by another process \(pid {holder.pid} on "
        with pytest.raises(Busy, match=message), RunFolder(tmp_path).locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder(tmp_path).locked():  # nothing is left of a dead one
        pass
