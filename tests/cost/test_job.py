"""job=cost: a run, its files and numbers, and what it refuses."""

import dataclasses
import json
import sys

import pytest
import torch
from running import composed
from torch import nn

from luqrun.cli.results import closing_table
from luqrun.cli.validation import to_config, validate
from luqrun.config import CostConfig, FinetuneConfig
from luqrun.cost import job
from luqrun.cost.text import markdown
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.tasks import fingerprint_data
from luqrun.tasks.outline import Outline

IMAGENET = "model=resnet18", "dataset=imagenet", "dataset.batch_size=4"


def config(*overrides):
    found = to_config(composed("job=cost", *overrides))
    validate(found)
    return found


def run(path, *overrides):
    path.mkdir()
    folder = RunFolder(path)
    return job.run(config(*overrides), folder), folder


def test_resnet18_under_luq(tmp_path):
    summary, folder = run(tmp_path / "run", *IMAGENET, "quant=luq")
    assert folder.summary() == summary
    assert summary["cost/fprop_macs_per_example"] == summary["cost/forward_macs_per_example"] == 1_814_073_344
    # By hand: the first layer (no dgrad), the last one and three shortcuts are left.
    first, last = 49 * 3 * 64 * 112**2, 512 * 1000
    shortcuts = sum(width * 2 * width * side**2 for width, side in ((64, 28), (128, 14), (256, 7)))
    total = 3 * 1_814_073_344 - first
    assert summary["cost/macs_per_step"] == 4 * total
    assert summary["cost/share_of_macs_4bit"] == (total - 2 * first - 3 * last - 3 * shortcuts) / total
    assert summary["cost/share_of_macs_4bit"] == summary["cost/share_of_matrix_work_4bit"]
    assert summary["cost/layers_of_unknown_work"] == 0
    assert 1 < summary["cost/bound_over_8bit"] < 2  # 4-bit units are twice as fast
    assert (
        summary["cost/bound_with_free_4bit"]
        == json.loads((folder.path / "cost.json").read_text())["bounds"]["with_free_4bit"]
        > 2
    )
    assert summary["cost/bytes_kept_fp32"] == 2 * summary["cost/bytes_kept_bf16"]
    assert summary["cost/bytes_kept"] < summary["cost/bytes_kept_fp32"]
    assert all(key.startswith("cost/") for key in summary)
    assert folder.run()["status"] == "finished"
    assert not folder.checkpoints.exists()
    content = json.loads((folder.path / "cost.json").read_text())
    assert len(content["gemms"]) == 3 * 21 - 1
    assert {(row["why"], row["gemms"]) for row in content["high_precision"]} == {
        ("first", 2),
        ("last", 3),
        ("shortcut", 9),
    }
    text = (folder.path / "cost.md").read_text()
    assert "| conv1 | fprop |" in text
    assert "1,814,073,344" in text
    assert "<svg" in (folder.path / "cost.svg").read_text()
    shown = closing_table(config(*IMAGENET, "quant=luq"), summary, folder.path)
    assert "1,814,073,344" in shown
    assert "94.45 %" in shown


def test_a_recipe_without_quantizers_has_no_share_and_says_why(tmp_path):
    summary, folder = run(tmp_path / "run", *IMAGENET, "quant=fp32")
    assert summary["cost/share_of_macs_4bit"] == 0
    assert (summary["cost/bound_over_fp32"], summary["cost/bound_over_bf16"]) == (1.0, 0.5)
    assert summary["cost/bytes_kept"] == summary["cost/bytes_kept_fp32"]
    assert "| the recipe has no quantizers | 62 |" in (folder.path / "cost.md").read_text()


def test_samples_cost_time_and_no_share(tmp_path):
    one, _ = run(tmp_path / "one", *IMAGENET, "quant=luq")
    two, _ = run(tmp_path / "two", *IMAGENET, "quant=luq_smp2")
    assert one["cost/share_of_macs_4bit"] == two["cost/share_of_macs_4bit"]
    assert one["cost/bound_over_fp32"] > two["cost/bound_over_fp32"]


def test_text_has_products_of_activations_in_high_precision():
    overrides = "dataset=sentences", "model=transformer_tiny", "schedule=sentences"
    record, _ = job.count(config(*overrides, "quant=luq", "cost.length=16"))
    assert record["examples"] == 1024 // 16
    assert record["shares"]["matrix"] < record["shares"]["layers"] < 1
    assert "sentences of 16 subwords" in record["about"]
    longer, _ = job.count(config(*overrides, "quant=luq", "cost.length=48"))
    assert longer["shares"]["matrix"] < record["shares"]["matrix"]
    assert longer["shares"]["layers"] == record["shares"]["layers"]


def test_bf16_is_high_precision_where_a_run_has_it():
    record, gemms = job.count(config(*IMAGENET, "quant=luq", "precision=bf16"))
    assert {side.format for gemm in gemms if gemm.why for side in gemm.sides} == {"bf16"}
    assert record["bounds"]["with_free_4bit"] == pytest.approx(18.0258, abs=1e-4)


def test_speeds_are_keys():
    record, _ = job.count(config(*IMAGENET, "quant=luq", "cost.speed_4bit=624"))
    assert record["bounds"]["8bit"] == 1.0


def test_without_matplotlib_there_is_no_picture_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    summary, folder = run(tmp_path / "run", *IMAGENET, "quant=luq")
    assert summary["cost/share_of_macs_4bit"] > 0
    assert "there is no picture" in caplog.text
    assert not (folder.path / "cost.svg").exists()


def test_no_data_are_looked_for():
    assert fingerprint_data(config(*IMAGENET, "dataset.root=/nowhere")) == {}


def test_what_does_not_matter_to_it_is_not_in_its_name():
    plain = config(*IMAGENET, "quant=luq")
    name = run_id(plain, {})
    assert name.startswith("cost-resnet18-imagenet-luq-")
    same = {"seed": 7, "study": "other", "finetune": FinetuneConfig("none"), "compile": True}
    for key, value in same.items():
        assert run_id(dataclasses.replace(plain, **{key: value}), {}) == name
    assert run_id(config(*IMAGENET, "quant=luq", "dataset.root=/elsewhere"), {}) == name
    others = {
        "cost": CostConfig(speed_4bit=1.0),
        "precision": "bf16",
        "job": "train",
        "quant": config("quant=luq_smp2").quant,
    }
    assert len({name, *(run_id(dataclasses.replace(plain, **{key: value}), {}) for key, value in others.items())}) == 5


def test_the_cost_keys_do_not_change_the_name_of_a_training():
    plain = to_config(composed())
    assert run_id(dataclasses.replace(plain, cost=CostConfig(speed_4bit=1.0)), {}) == run_id(plain, {})


@pytest.mark.parametrize("key", ["speed_4bit", "speed_8bit", "speed_bf16", "speed_fp32"])
@pytest.mark.parametrize("value", ["-1", "0"])
def test_speeds_that_are_none_are_refused(key, value):
    with pytest.raises(UserError, match=f"cost.{key}=-?[01].0 must be a speed above 0, such as "):
        config(f"cost.{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("dataset=folder", "dataset.root=/data"), ("dataset=folder", "how many classes", "glyphs, cifar10")),
        (("dataset=facts", "model=bert_tiny", "schedule=facts"), ("dataset=facts", "give dataset.vocabulary")),
        (
            ("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "cost.length=49"),
            ("cost.length=49", "at most 48"),
        ),
        (
            ("dataset=squad", "model=bert", "schedule=squad", "model.weights=/nowhere"),
            ("model.weights=/nowhere", "no such file or folder"),
        ),
    ],
)
def test_shapes_that_only_data_tell_are_refused(overrides, words):
    with pytest.raises(UserError) as refused:
        job.count(config(*overrides))
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_file_of_weights_tells_no_sizes(tmp_path):
    file = tmp_path / "last.pt"
    file.write_bytes(b"")
    for name, model, words in (
        ("facts", "bert_tiny", "beside it is no config.json"),
        ("sentences", "transformer_tiny", "is not read by job=cost, nor the tokenizer beside it"),
    ):
        with pytest.raises(UserError, match=words):
            job.count(config(f"dataset={name}", f"model={model}", f"schedule={name}", f"model.weights={file}"))
    with pytest.raises(UserError, match="there is no such file"):
        job.count(config("dataset=glyphs", "model=resnet8", f"model.weights={tmp_path / 'gone.pt'}"))
    assert job.count(config("dataset=glyphs", "model=resnet8", f"model.weights={file}"))


def test_a_length_below_one_is_refused():
    with pytest.raises(UserError, match=r"cost\.length=0 is too small"):
        config("cost.length=0")


def test_a_forward_that_asks_for_values_is_refused(monkeypatch):
    class Curious(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.layers[int(x.sum() > 0)](x)

    with torch.device("meta"):
        outline = Outline(Curious(), {"x": torch.empty(2, 4)}, None, 2, "row", "rows of 4")
    monkeypatch.setattr(job, "outline_task", lambda config: outline)
    with pytest.raises(UserError, match=r"model\.name=resnet8: its shapes cannot be known without data"):
        job.count(config("quant=luq"))


def test_an_error_of_another_kind_is_raised_as_it_is(monkeypatch):
    with torch.device("meta"):
        outline = Outline(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)), {"input": torch.empty(2, 4)}, None, 2, "row", ""
        )
    monkeypatch.setattr(job, "outline_task", lambda config: outline)
    with pytest.raises(RuntimeError, match="reduction dim"):
        job.count(config("quant=fp32"))


def test_unknown_layers_are_named_in_the_text(monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd, self.last = nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.odd(x, x))

    with torch.device("meta"):
        outline = Outline(Odd(), {"x": torch.empty(2, 4)}, None, 2, "row", "rows of 4")
    monkeypatch.setattr(job, "outline_task", lambda config: outline)
    record, gemms = job.count(config("quant=luq", "quant.skip=[]"))
    assert record["uncounted"] == ["odd"]
    assert record["shares"]["layers"] == 1.0
    text = markdown({**record, "seconds": 0.1}, gemms)
    assert (
        "**1 layer is of a kind whose work is not known: odd. All shares, bytes and bounds are of the rest.**" in text
    )
    assert "unknown: Bilinear" in text
