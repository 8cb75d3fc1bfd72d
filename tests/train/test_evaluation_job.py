"""job=evaluate: the numbers are those of the training, to the digit; other recipes and data; predictions and errors."""

import csv
import io
import json
import re

import pytest
import torch
from PIL import Image
from running import composed, quiet_machine, tiny

from luqrun.cli.results import closing_table, jobs_table
from luqrun.cli.sweeps import Job
from luqrun.cli.validation import to_config
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.runs.reading import read_run
from luqrun.tasks import fingerprint_data
from luqrun.train import evaluation_job

SHOWN = ("val/top1", "val/top5", "val/loss")


def evaluated(path, *overrides) -> tuple[dict, RunFolder]:
    path.mkdir(parents=True, exist_ok=True)
    config, folder = tiny("job=evaluate", *overrides), RunFolder(path)
    (path / "config.yaml").write_text(f"job: evaluate\nquant: {{name: {config.quant.name}}}\n")
    with quiet_machine():
        return evaluation_job.run(config, folder), folder


@pytest.mark.parametrize(
    "overrides",
    [
        ("quant=luq", "finetune=fnt1"),
        ("quant=luq_hindsight", "quant.activation.range=hindsight"),
        ("quant=forward_sr", "model=mobilenet_tiny"),
        ("quant=nvfp4", "precision=bf16"),
    ],
    ids=" ".join,
)
def test_last_pt_has_the_numbers_of_its_summary_to_the_digit(trained, tmp_path, overrides):
    run = trained(*overrides)
    overrides = [each for each in overrides if not each.startswith("finetune")]
    summary, folder = evaluated(tmp_path / "e", *overrides, f"model.weights={run.checkpoints / 'last.pt'}")
    assert [summary[name] for name in SHOWN] == [run.summary()[name] for name in SHOWN]
    assert folder.summary() == summary
    assert (folder.path / "predictions/val.csv").read_text() == (run.path / "predictions/val.csv").read_text()


def test_a_recipe_changes_the_numbers_and_the_weights_stay(trained, tmp_path):
    path = trained("quant=luq").checkpoints / "last.pt"
    stored = path.read_bytes()
    found = {}
    for quant in ("luq", "fp32", "fp2_smp1"):
        found[quant], folder = evaluated(tmp_path / quant, f"quant={quant}", f"model.weights={path}")
        assert found[quant]["evaluated"] == {"weights": str(path), "trained_with": "luq"}
        run = folder.run()
        assert (run["status"], run["metric"]["name"]) == ("finished", "val/top1")
        assert run["data"] == fingerprint_data(tiny(f"model.weights={path}"))
    assert len({each["val/loss"] for each in found.values()}) == 2  # fp2 is of gradients
    assert found["luq"]["val/loss"] == found["fp2_smp1"]["val/loss"]
    assert path.read_bytes() == stored


def test_the_predictions_give_the_score(trained, tmp_path):
    summary, folder = evaluated(tmp_path / "e", f"model.weights={trained().checkpoints / 'last.pt'}")
    head, *rows = csv.reader(io.StringIO((folder.path / "predictions/val.csv").read_text()))
    assert head == ["class", "predicted"]
    assert len(rows) == 94
    assert 100 * sum(own == found for own, found in rows) / len(rows) == pytest.approx(summary["val/top1"])
    assert len({own for own, _ in rows}) == 47


def test_other_data_of_the_same_kind_are_evaluated(trained, tmp_path):
    path, more = trained().checkpoints / "last.pt", "dataset.glyphs.val_images=188"
    summary, folder = evaluated(tmp_path / "e", f"model.weights={path}", more, "dataset.glyphs.noise=0.5")
    assert summary["val/loss"] != trained().summary()["val/loss"]
    assert len((folder.path / "predictions/val.csv").read_text().splitlines()) == 189


def test_data_of_another_kind_are_refused_in_a_line_that_names_the_run(trained, tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / "images" / split / label / "0.png")
    path = trained().checkpoints / "last.pt"
    data = "dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.image_size=20", "dataset.batch_size=2"
    config = to_config(composed("device=cpu", *data, "job=evaluate", f"model.weights={path}"))
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError) as error, quiet_machine():
        evaluation_job.run(config, RunFolder(tmp_path / "e"))
    text = f"{path} (of a run with model.name=resnet8, dataset.name=glyphs, quant.name=luq): conv1.weight has the shape"
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_no_result(trained, tmp_path):
    state = torch.load(trained().checkpoints / "last.pt", weights_only=True)["model"]
    state["fc.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"the loss of model\.weights=.*nan\.pt under quant=luq is nan"):
        evaluated(tmp_path / "e", f"model.weights={tmp_path / 'nan.pt'}")
    assert not (tmp_path / "e" / "summary.json").exists()


def test_what_decides_its_name(trained):
    path = trained().checkpoints / "last.pt"
    found = tiny("job=evaluate", f"model.weights={path}")

    def name(*overrides) -> str:
        config = tiny("job=evaluate", f"model.weights={path}", *overrides)
        return run_id(config, fingerprint_data(config))

    first = run_id(found, fingerprint_data(found))
    assert first.startswith("evaluate-resnet8-glyphs-luq-seed0-")
    assert {name(each) for each in ("schedule.epochs=9", "finetune=fnt3", "tracking.log_every=7", "study=b")} == {first}
    others = ("quant=fp32", "seed=1", "precision=bf16", "dataset.batch_size=16", "dataset.glyphs.noise=0.2")
    assert len({first, *map(name, others), name("job=train")}) == 7
    assert run_id(found, {"weights": "0"}) != run_id(found, {"weights": "1"})


def test_the_report_reads_it_and_the_tables_show_it(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = trained("quant=luq").checkpoints / "last.pt"
    summary, folder = evaluated(tmp_path / "outputs" / "e", "quant=fp32", f"model.weights={path}")
    stored = read_run(folder.path)
    assert (stored.curve, stored.summary["val/top1"]) == ((summary["val/top1"],), summary["val/top1"])
    lines = closing_table(tiny("job=evaluate", "quant=fp32"), summary, folder.path).splitlines()
    assert lines[1] == "resnet8 on glyphs, evaluated with full precision"
    assert re.split("  +", lines[2].strip()) == ["top-1 %", "top-5 %", "loss"]
    assert lines[3].split() == ["quant=fp32", *(f"{summary[name]:.{3 if 'loss' in name else 2}f}" for name in SHOWN)]
    assert lines[4].endswith(f"{path}, trained with quant=luq")
    assert "tensorboard" not in lines[-1]
    table = jobs_table([Job(["quant=fp32"], folder.path), Job(["quant=luq"], tmp_path / "none")], 1.0)
    assert re.search(rf"finished +{summary['val/top1']:.2f} +quant=fp32", table)
    assert json.loads((folder.path / "metrics.jsonl").read_text())["phase"] == "evaluate"
