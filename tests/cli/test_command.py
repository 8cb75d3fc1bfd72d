"""The command line: real processes, their exit codes, what they print and what they leave behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from running import TINY, tiny
from shell import environment
from torch import nn

from luqrun import __version__ as luqrun_version
from luqrun.runs.identity import run_id

FAST = (*TINY, "quant=fp32")


@pytest.fixture
def luqrun(shell, tmp_path):
    """luqrun(*arguments, **environment): a command in tmp_path."""
    return lambda *arguments, **variables: shell.luqrun(tmp_path, *arguments, **variables)


def runs(tmp_path, study="default"):
    return sorted(path for path in (tmp_path / "outputs" / study).glob("*") if path.is_dir())


def assert_refused(result, tmp_path, *words):
    """It ends with one line that has all the words, a failing exit code, no traceback, no summary.json."""
    assert result.code != 0
    assert "Traceback" not in result.err + result.out
    assert result.out.strip() == ""
    end = [line for line in result.err.splitlines() if line.strip()][-1]
    assert [word for word in words if word not in end] == [], result.err
    assert not list(tmp_path.rglob("summary.json"))


def test_a_run_and_the_same_command_again(luqrun, tmp_path):
    first = luqrun(*TINY, "finetune=fnt1")
    assert (first.code, "Traceback" in first.err) == (0, False)
    (folder,) = runs(tmp_path)
    assert re.fullmatch(r"resnet8-glyphs-luq-fnt1-seed0-[0-9a-f]{8}", folder.name)
    names = {path.name for path in folder.iterdir()} - {path.name for path in folder.glob("events.*")}
    files = {".lock", "config.yaml", "run.json", "run.log", "metrics.jsonl", "summary.json"}
    assert names == {*files, "checkpoints", "predictions"}
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run.keys() >= {"git_commit", "git_dirty", "versions", "device", "kernel_backend", "start", "end"}
    assert run["start"] <= run["end"]
    assert run["overrides"] == [*TINY, "finetune=fnt1"]
    assert run["command"][1:] == [*TINY, "finetune=fnt1"]
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['val/top1']:.2f}" in first.out
    assert f"outputs/default/{folder.name}" in first.out
    assert "tensorboard --logdir outputs" in first.out
    assert "epoch 2/2 (finetune)" in (folder / "run.log").read_text()

    changing = {"run.log", ".lock"}
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in changing}
    again = luqrun(*TINY, "finetune=fnt1", "tracking.log_every=5")
    assert again.code == 0
    assert "this run is finished" in again.err
    assert again.out == first.out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in kept} == kept
    assert runs(tmp_path) == [folder]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sead=1", ("sead", "seed")),
        ("+sead=1", ("sead", "seed")),
        ("task=rounding", ("task is not a key any more", "job=rounding")),
        ("quant=luqq", ("quant", "luqq", "luq_smp2", "biased_log")),
        ("+experiment=table2/nothing", ("experiment", "table2/nothing")),
        ("schedule.epochs=many", ("schedule.epochs", "many", "nteger")),
        ("schedule.epochs=0", ("schedule.epochs=0", "at least 1")),
        ("dataset.batch_size=257", ("dataset.batch_size=257", "256")),
        ("device=cuda", ("device=cuda", "auto, cpu")),
        ("model.name=resnet9", ("model.name=resnet9", "resnet8")),
        ("quant.skip=[conv99]", ("quant.skip", "conv99", "first, last, shortcut")),
        ("resume=nowhere.pt", ("nowhere.pt", "auto, never")),
        ("schedule.epochs=[1", ("schedule.epochs=[1",)),
    ],
)
def test_a_mistake_is_one_line_and_no_run(luqrun, tmp_path, override, words):
    assert_refused(luqrun(*TINY, override), tmp_path, *words)
    for path in tmp_path.rglob("run.json"):
        assert json.loads(path.read_text())["status"] == "failed"


def test_a_setting_that_is_wrong_in_itself_leaves_no_folder(luqrun, tmp_path):
    assert_refused(luqrun(*TINY, "precision=fp8"), tmp_path, "precision=fp8", "fp32, bf16")
    assert os.listdir(tmp_path) == []


def class_folders(root, size=20):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(4):
                Image.effect_noise((size, size), 60).save(root / split / label / f"{number}.png")


def test_missing_empty_and_damaged_data(luqrun, tmp_path):
    common = ("dataset=folder", "dataset.image_size=20", "dataset.batch_size=4", "dataset.workers=0", "quant=fp32")
    assert_refused(luqrun(*common), tmp_path, "dataset.root", "ROOT/train/CLASS")
    assert_refused(luqrun(*common, "dataset.root=nowhere"), tmp_path, "dataset.root=nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(luqrun(*common, "dataset.root=empty"), tmp_path, "dataset.root=empty", "empty", "ROOT/train/CLASS")
    class_folders(tmp_path / "pets")
    bad = tmp_path / "pets" / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    for workers in (0, 1):
        result = luqrun(*common, "dataset.root=pets", f"dataset.workers={workers}", f"study=w{workers}")
        assert_refused(result, tmp_path, "pets/train/dog/2.png")
        (folder,) = runs(tmp_path, f"w{workers}")
        run = json.loads((folder / "run.json").read_text())
        assert run["status"] == "failed"
        assert "2.png" in run["reason"]
    # The image repaired, the same command runs.
    Image.effect_noise((20, 20), 60).save(bad)
    result = luqrun(*common, "dataset.root=pets", "study=w0", "schedule.epochs=1", "finetune=none")
    assert result.code == 0


def test_checkpoints_that_do_not_fit(luqrun, tmp_path):
    assert luqrun(*FAST).code == 0
    (folder,) = runs(tmp_path)
    (folder / "summary.json").rename(tmp_path / "kept.json")  # as if it had been killed just before
    last = folder / "checkpoints" / "last.pt"
    good = last.read_bytes()
    assert_refused(luqrun(*FAST, "study=b", "seed=1", f"resume={last}"), tmp_path, str(last), "seed=0", "seed=1")
    class_folders(tmp_path / "pets")
    other = ("dataset=folder", "dataset.root=pets", "dataset.image_size=20", "dataset.batch_size=4", "quant=fp32")
    assert_refused(luqrun(*other, f"resume={last}"), tmp_path, str(last), "dataset.name=glyphs", "dataset.name=folder")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "foreign.pt")
    assert_refused(luqrun(*FAST, "study=c", "resume=foreign.pt"), tmp_path, "foreign.pt", "not a checkpoint of")
    for size in (30_000, len(good) - 1):  # torch has another error for each
        last.write_bytes(good[:size])
        assert_refused(luqrun(*FAST), tmp_path, "last.pt", "truncated or not a checkpoint", "resume=")
        assert last.stat().st_size == size
    last.write_bytes(good)
    result = luqrun(*FAST)
    assert result.code == 0
    # Everything but the peak memory of the other process.
    kept, summary = (json.loads(path.read_text()) for path in (tmp_path / "kept.json", folder / "summary.json"))
    assert {**kept, "peak_memory_bytes": 0} == {**summary, "peak_memory_bytes": 0}


@pytest.mark.parametrize("where", ["outputs", "outputs/default", "the run folder"])
def test_an_output_folder_that_cannot_be_written(luqrun, tmp_path, where):
    # A plain file in its place: it stops root too.
    if where == "the run folder":
        assert luqrun(*FAST).code == 0
        (folder,) = runs(tmp_path)
        folder.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "summary.json").unlink()
        where = folder.relative_to(tmp_path)
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_text("not a folder")
    assert_refused(luqrun(*FAST), tmp_path, str(where).split("/")[0])
    assert (tmp_path / where).read_text() == "not a folder"


def test_a_full_disk(luqrun, tmp_path):
    folder = tmp_path / "outputs" / "default" / run_id(tiny("quant=fp32"), {})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    assert_refused(luqrun(*FAST), tmp_path, "the disk is full", folder.name, "make room")
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed"
    assert "the disk is full" in run["reason"]
    (folder / "metrics.jsonl").unlink()
    assert luqrun(*FAST).code == 0


def test_a_sweep_over_a_file_in_the_place_of_its_folder(luqrun, tmp_path):
    (tmp_path / "outputs").write_text("not a folder")
    assert_refused(luqrun("-m", *FAST, "seed=0,1"), tmp_path, "outputs")


def test_a_sweep_goes_on_after_a_refused_job(luqrun, tmp_path):
    arguments = ("-m", *FAST, "schedule.epochs=0,1", "study=sweep")
    result = luqrun(*arguments)
    assert result.code not in (0, None)
    assert "schedule.epochs=0 is too small" in result.err
    assert "Traceback" not in result.err
    (finished,) = (path.parent for path in (tmp_path / "outputs" / "sweep").rglob("summary.json"))
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"
    # The table of the job that worked is printed, and a repeated sweep does not train it again.
    assert finished.name in result.out
    written = (finished / "metrics.jsonl").stat().st_mtime_ns
    again = luqrun(*arguments)
    assert again.code not in (0, None)
    assert "this run is finished" in again.err
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_job_that_fails_in_training_leaves_the_rest_of_the_sweep(luqrun, tmp_path):
    result = luqrun("-m", *FAST, "resume=nowhere.pt,auto", "seed=0,1", "study=sweep")
    assert result.code not in (0, None)
    assert "Traceback" not in result.err
    assert "nowhere.pt" in result.err
    done = list((tmp_path / "outputs" / "sweep").rglob("summary.json"))
    assert len(done) == 2
    assert {json.loads((path / "run.json").read_text())["status"] for path in runs(tmp_path, "sweep")} == {"finished"}


def test_a_sweep_runs_all_its_jobs(luqrun, tmp_path):
    result = luqrun("-m", *TINY, "quant=fp32,luq", "seed=0,1")
    assert result.code == 0
    names = [path.name.rsplit("-", 1)[0] for path in runs(tmp_path)]
    assert names == [f"resnet8-glyphs-{quant}-seed{seed}" for quant in ("fp32", "luq") for seed in (0, 1)]
    assert all((path / "summary.json").exists() for path in runs(tmp_path))
    assert all((path / "run.log").read_text().count("epoch 1/1") == 1 for path in runs(tmp_path))


def test_a_sweep_without_m_is_told_to_be_one_run(luqrun, tmp_path):
    result = luqrun("+experiment=fig2/embedded", *TINY)
    assert result.code == 0
    assert "which only -m runs" in result.err + result.out
    assert len(runs(tmp_path, "embedded/fig2")) == 1
    swept = luqrun("-m", *TINY, "quant=fp32", "seed=1")
    assert "which only -m runs" not in swept.err + swept.out


def test_under_torchrun(luqrun, tmp_path):
    refused = luqrun("-m", *FAST, "seed=0,1", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert_refused(refused, tmp_path, "sweep", "torchrun")
    assert luqrun(*FAST, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0").code == 0


def test_divergence_is_a_result_and_stays_one(luqrun, tmp_path):
    arguments = (*TINY, "schedule.lr=1e30")
    result = luqrun(*arguments)
    assert result.code == 0
    assert "diverged at step" in result.out
    (folder,) = runs(tmp_path)
    assert not (folder / "summary.json").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "diverged"
    logged = (folder / "run.log").read_text()
    for name in ("layer1.0.conv1/weight", "layer3.0.conv2/activation", "layer2.0.conv1/gradient"):
        assert f"{name}: clipped_share" in logged
    again = luqrun(*arguments)
    assert again.code == 0
    assert "this run diverged before" in again.err
    assert again.out == result.out
    assert json.loads((folder / "run.json").read_text()) == run


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_and_the_same_command_again(luqrun, tmp_path, asked):
    arguments = (*FAST, "schedule.epochs=12", "tracking.log_every=1")
    command = subprocess.Popen(
        [sys.executable, "-m", "luqrun", *arguments, "tracking.checkpoint_every=2"],
        cwd=tmp_path, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job, and all that it starts, ignores SIGINT unless told otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while command.poll() is None and not list(tmp_path.rglob("last.pt")):
        time.sleep(0.02)
    (folder,) = runs(tmp_path)
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["end"]) == ("running", None)
    command.send_signal(asked)
    out, err = command.communicate()
    assert command.returncode == 128 + asked
    assert (out, "Traceback" in err) == ("", False)
    assert sum(f"stopped by {asked.name}; the same command continues" in line for line in err.splitlines()) == 1
    assert err.splitlines()[-1].startswith("stopped")
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["reason"]) == ("failed", f"stopped by {asked.name}")
    assert not (folder / "summary.json").exists()
    assert [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")] == []

    done = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["progress"]["step"]
    assert 2 <= done < 96
    result = luqrun(*arguments)
    assert result.code == 0
    assert re.search(rf"continuing from .*last\.pt: epoch \d+, step {done}\n", result.err)
    resumed = json.loads((folder / "run.json").read_text())
    assert (resumed["status"], resumed["start"]) == ("finished", run["start"])
    assert not resumed.get("reason")  # of the interruption
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(1, 97))


def test_options_may_stand_among_the_overrides(luqrun, tmp_path):
    (tmp_path / "mine" / "quant").mkdir(parents=True)
    (tmp_path / "mine" / "quant" / "own.yaml").write_text("name: own\n")
    shown = luqrun("seed=7", "--config-dir", "mine", "quant=own", "--cfg", "job", "precision=bf16")
    assert shown.code == 0
    for line in ("seed: 7", "  name: own", "precision: bf16"):
        assert line in shown.out.splitlines()
    assert_refused(luqrun("seed=7", "--fast", "quant=fp32"), tmp_path, "--fast", "luqrun --help")
    assert_refused(luqrun("--cfg", "jobs"), tmp_path, "--cfg", "jobs", "'hydra', 'all'")


def test_the_version_is_ours(luqrun):
    result = luqrun("--version")
    assert (result.code, result.out) == (0, f"luqrun {luqrun_version}\n")


def test_waiting_threads_soon_sleep(tmp_path):
    # libgomp reads its variables when torch loads it, and can be asked to tell.
    variables = environment("/nowhere", OMP_DISPLAY_ENV="verbose")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        variables.pop(name, None)
    command = [sys.executable, "-m", "luqrun", "schedule.epochs=0"]  # refused, but not before torch is loaded
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert "schedule.epochs=0" in result.stderr
    assert "GOMP_SPINCOUNT = '10000'" in result.stderr
