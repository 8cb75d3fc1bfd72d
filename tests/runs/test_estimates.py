"""How long a run will take, by finished runs whose files say how long they took."""

import dataclasses
import json
import os

import pytest
from omegaconf import OmegaConf
from placed_runs import FINISHED, place
from running import tiny

from luqrun.runs.estimates import TRIED, Estimate, Estimates, epochs_done

SUMMARY = {"val/top1": 1.0, "train_seconds": 30.0, "evaluation_seconds": 10.0}


def finished(outputs, config, summary=SUMMARY, age=0, **run):
    """The folder of a finished run."""
    folder = place(outputs, config, {**FINISHED, "device": "cpu", **run}, summary)
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    os.utime(folder.path / "summary.json", (1e9 - age, 1e9 - age))
    return folder


def estimate(outputs, *overrides, done=0, processes=1):
    return Estimates(outputs).of(tiny("device=auto", *overrides), processes, done)


def test_an_epoch_takes_as_long_as_those_of_a_run_of_the_same_kind(tmp_path):
    finished(tmp_path, tiny("schedule.epochs=3", "finetune=fnt1"))
    assert estimate(tmp_path, "schedule.epochs=5", "seed=7", "schedule.lr=0.3") == Estimate(50.0, True)
    assert estimate(tmp_path, "schedule.epochs=5", "finetune=qaf1", "study=b/c", done=2) == Estimate(40.0, True)
    assert estimate(tmp_path, "schedule.epochs=5", done=9) == Estimate(0.0, True)


@pytest.mark.parametrize(
    "other",
    [
        "dataset.batch_size=16",
        "schedule.accumulate=2",
        "model=vit_tiny",
        "dataset.glyphs.train_images=128",
        "precision=bf16",
        "compile=true",
    ],
)
def test_of_another_kind_nothing_is_known(tmp_path, other):
    finished(tmp_path, tiny("schedule.epochs=4"))
    assert estimate(tmp_path, other) is None
    assert estimate(tmp_path, processes=2) is None
    assert estimate(tmp_path) == Estimate(10.0, True)


def test_a_run_of_another_recipe_tells_about(tmp_path):
    finished(tmp_path, tiny("schedule.epochs=4"))
    assert estimate(tmp_path, "quant=fp32") == Estimate(10.0, False)
    assert estimate(tmp_path, "quant.gradient.samples=2") == Estimate(10.0, False)
    finished(tmp_path, tiny("schedule.epochs=2", "quant=fp32"), age=100)
    assert estimate(tmp_path, "quant=fp32") == Estimate(20.0, True)


def test_the_newest_run_counts_and_a_named_device(tmp_path):
    finished(tmp_path, tiny("seed=1"), {**SUMMARY, "train_seconds": 0.0}, age=5)
    finished(tmp_path, dataclasses.replace(tiny("seed=2"), study="a/b"), age=2, device="NVIDIA H200")
    assert estimate(tmp_path) == Estimate(40.0, True)
    assert estimate(tmp_path, "device=cpu") == Estimate(10.0, True)
    assert estimate(tmp_path, "device=cuda") == Estimate(40.0, True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "quant: ["),
        ("config.yaml", "seed: 0\n"),
        ("run.json", "{}"),
        ("run.json", '{"world_sizes": []}'),
        ("summary.json", "{}"),
        ("summary.json", "[]"),
    ],
)
def test_a_damaged_run_tells_nothing(tmp_path, name, text):
    folder = finished(tmp_path, tiny("seed=1"))
    assert estimate(tmp_path) is not None
    (folder.path / name).write_text(text)
    assert estimate(tmp_path) is None


def test_few_runs_are_read(tmp_path, monkeypatch):
    for seed in range(TRIED + 3):
        finished(tmp_path, tiny(f"seed={seed}", "dataset.batch_size=16"), age=seed)
    estimates, read = Estimates(tmp_path), []
    monkeypatch.setattr(Estimates, "_read", lambda self, folder: read.append(folder))
    assert estimates.of(tiny(), 1, 0) is None
    assert len(set(read)) == TRIED


def test_a_measurement_takes_from_its_start_to_its_end(tmp_path):
    times = {"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T00:01:30Z"}
    finished(tmp_path, tiny("job=rounding"), {"rounding": []}, **times)
    assert estimate(tmp_path, "job=rounding", "seed=3") == Estimate(90.0, True)
    assert estimate(tmp_path) is None


def test_an_evaluation_is_told_by_those_of_its_recipe(tmp_path):
    times = {"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T00:00:10Z"}
    evaluation = "job=evaluate", "model.weights=FILE"
    finished(tmp_path, tiny(*evaluation), {"val/top1": 1.0}, **times)
    for number in range(TRIED):  # newer ones of another recipe
        finished(tmp_path, tiny(*evaluation, "quant=fp32", f"seed={number}"), {"val/top1": 1.0}, age=-1, **times)
    assert estimate(tmp_path, *evaluation, "seed=3").alike


def test_what_of_a_run_is_done(tmp_path):
    assert epochs_done(tmp_path) == 0
    rows = [{"kind": "epoch", "epoch": 4}, {"kind": "step", "epoch": 5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert epochs_done(tmp_path) == 4
    path.write_text('{"kind": "epoch", "ep')
    assert epochs_done(tmp_path) == 0
