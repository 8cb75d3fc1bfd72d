"""Real processes that are killed, doubled, moved, or run out of disk: each run ends as the one that nobody disturbed.

scripts/kill_test.py kills more.
"""

import random
import shutil
import subprocess
import sys
from contextlib import contextmanager

import kills
import pytest
from kills import TINY, differences, kill_variant, only_run
from PIL import Image
from soaking import soak, summary

from luqrun.runs import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
KILLS = 3  # of each variant
VARIANTS = {
    "fp32": (*TINY, "dataset.augment=true"),
    "bf16": kills.VARIANTS["bf16, hindsight, two micro-batches, one worker"],
    "translation": kills.VARIANTS["translation, averaged weights"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_bit_identical(shell, tmp_path, variant):
    tally = kill_variant(shell, tmp_path, VARIANTS[variant], KILLS, random.Random(variant))
    assert tally.differences == []
    assert tally.survived == tally.kills == KILLS


def test_steps_grow_neither_memory_nor_threads_nor_open_files(shell, tmp_path):
    found = summary(soak(shell, tmp_path, 160), warm_up=60)  # scripts/soak.py takes 2,000
    # A leaked batch of images alone, at 20 x 20 x 16 floats, would be 25 KiB a step: 2.4 MiB; activations far more.
    assert found["growth MiB"] < 8
    assert found["threads at the end"] <= found["threads after warm-up"]
    assert found["open_files at the end"] <= found["open_files after warm-up"] + 1  # one is open now and then
    # The log has a line for each epoch of ten steps.
    for kind, limit in (("metrics.jsonl", 100_000), ("run.log", 15_000), ("TensorBoard", 1_000_000)):
        assert found[f"{kind} bytes per 1,000 steps, second half"] < limit


LONG = (*TINY, "dataset.workers=1", "schedule.epochs=20")


def started(shell, cwd, *arguments):
    """A process that has written a checkpoint."""
    process = shell.start(cwd, *arguments)
    while not list(cwd.rglob("last.pt")):
        ended = process.wait(0.02)
        assert ended is None, ended.err
    return process


def test_a_second_process_is_refused_while_the_first_lives_and_no_longer(shell, tmp_path):
    first = started(shell, tmp_path, *LONG)
    second = shell.luqrun(tmp_path, *LONG)
    assert (second.code, second.out) == (1, "")
    refusal = second.err.strip().splitlines()[-1]
    assert f"is being run by another process (pid {first.pid} on " in refusal
    assert only_run(tmp_path, "default").run()["status"] == "running"  # not marked by the refused one
    first.kill()
    third = shell.start(tmp_path, *LONG)  # at once: neither a stale lock nor the dead one's worker is in the way
    assert first.wait().code == -9
    while "continuing from" not in (only_run(tmp_path, "default").path / "run.log").read_text():
        ended = third.wait(0.02)
        assert ended is None, ended.err
    third.kill()
    third.wait()


@contextmanager
def small_disk(path, size):
    """A disk of its own at `path`; gives a function that makes it larger."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield lambda larger: subprocess.run(["mount", "-o", f"remount,size={larger}", path], check=True)
    finally:
        subprocess.run(["umount", path], check=True)


def assert_stopped_cleanly(result, root, *words):
    """One line with the words and no traceback; the run is marked as failed, its last checkpoint is there whole."""
    assert (result.code, result.out, "Traceback" in result.err) == (1, "", False)
    lines = [line for line in result.err.splitlines() if line.startswith("luqrun: ")]
    assert len(lines) == 1
    assert [word for word in words if word not in lines[0]] == []
    folder = only_run(root, "default")
    assert folder.run()["status"] == "failed"
    assert checkpoint.read(folder.checkpoints / "last.pt")["progress"]["step"] > 1
    assert not list(folder.checkpoints.glob(".*"))


@pytest.fixture(scope="module")
def whole(shell, tmp_path_factory):
    """The run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole")
    assert shell.luqrun(path, *TINY).code == 0
    return only_run(path, "default")


def test_a_disk_that_fills_up(shell, tmp_path, whole):
    with small_disk(tmp_path / "outputs", "1800k") as enlarge:  # two checkpoints, and no third beside them
        assert_stopped_cleanly(shell.luqrun(tmp_path, *TINY), tmp_path, "the disk is full", "checkpoints", "make room")
        enlarge("8m")
        assert shell.luqrun(tmp_path, *TINY).code == 0
        assert differences(whole, only_run(tmp_path, "default")) == []


def test_a_limit_on_the_size_of_files(shell, tmp_path, whole):
    largest = (whole.checkpoints / "last.pt").stat().st_size  # of all that were written
    limited = shell.start(tmp_path, *TINY, file_size=largest - 100).wait()
    assert_stopped_cleanly(limited, tmp_path, "a file is larger than allowed", "checkpoints", "ulimit -f")
    assert shell.luqrun(tmp_path, *TINY).code == 0
    assert differences(whole, only_run(tmp_path, "default")) == []


def class_folders(root):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(12):
                Image.effect_noise((20, 20), 60).save(root / split / label / f"{number}.png")


def test_a_run_folder_goes_on_where_it_was_moved_or_copied_to(shell, tmp_path):
    class_folders(tmp_path / "pets")
    images = ("dataset=folder", f"dataset.root={tmp_path / 'pets'}", "dataset.image_size=20", "dataset.batch_size=4")
    arguments = (*TINY[3:], *images, "dataset.workers=0")
    here, there, copied = (tmp_path / name for name in ("here", "there", "copied"))
    for path in (here, there, copied):
        path.mkdir()
    assert shell.luqrun(copied, *arguments, "study=whole").code == 0
    process = started(shell, here, *arguments)
    process.kill()
    process.wait()
    shutil.copytree(here / "outputs" / "default", copied / "outputs" / "other")
    (here / "outputs").rename(there / "outputs")
    for cwd, study in ((there, "default"), (copied, "other")):
        result = shell.luqrun(cwd, *arguments, f"study={study}")
        assert (result.code, "continuing from" in result.err) == (0, True)
        assert differences(only_run(copied, "whole"), only_run(cwd, study)) == []
    assert not (here / "outputs").exists()
