"""The seam: a task of another kind, tests/labelling.py, goes through the same loop as images do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import last, metrics, quiet_machine, tiny

from luqrun import tasks
from luqrun.config import DatasetConfig, ModelConfig
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate

BATCH = 8


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setitem(tasks.MODULES, "words", "labelling")


def config(*overrides):
    dataset = DatasetConfig(name="words", batch_size=BATCH)
    return replace(tiny("schedule.lr=0.5", *overrides), dataset=dataset, model=ModelConfig(name="tagger"))


def build(path, *overrides) -> trainer.Trainer:
    path.mkdir()
    return trainer.Trainer(config(*overrides), RunFolder(path), torch.device("cpu"))


def gradients(run, micro_batches) -> tuple[torch.Tensor, float, int]:
    sums, weight = run.accumulate_gradients(micro_batches, record_health=False)
    return torch.cat([each.grad.flatten() for each in run.model.parameters()]), sums["loss"] / weight, weight


def test_micro_batches_of_different_weights_have_the_gradient_and_loss_of_the_whole(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build(tmp_path / "run", "quant=fp32")
        lengths = (run.data.train.labels >= 0).sum(1)
        order = lengths.argsort().numpy()  # the short words, then the long ones
        parts = [run.data.train.batch(each, None) for each in (order[:BATCH], order[-BATCH:])]
        weights = [run.task.weight(part) for part in parts]
        assert weights[1] > 3 * weights[0]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        gradient, loss, weight = gradients(run, parts)
        expected, expected_loss, expected_weight = gradients(run, [whole])
        alone = [gradients(run, [part])[0] for part in parts]
        run.tracker.close()
    assert weight == expected_weight == sum(weights)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(sum(alone) / 2, expected, rtol=1e-2)  # the mean of means is another


def test_it_trains_to_its_own_metric_and_records_it(tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    with quiet_machine(tmp_path / "cache"):
        options = "quant=luq", "schedule.epochs=6", "finetune=fnt1", "schedule.accumulate=2", "tracking.log_every=1"
        summary = trainer.run(config(*options), folder)
    errors = [row["val/error"] for row in metrics(folder, "epoch")]
    assert min(errors) < errors[0] / 2
    assert summary["best_metric"] == min(errors)
    best = torch.load(folder.checkpoints / "best.pt", weights_only=True)
    assert best["progress"]["epoch"] == errors.index(min(errors)) + 1
    assert summary["val/error"] == errors[-1]
    assert summary["finetune"][0].keys() == {"epoch", "val/error", "val/loss"}
    assert summary["letters_per_second"] > 0
    letters = int((tasks.build_task(config()).data.train.labels >= 0).sum())
    assert last(folder)["progress"]["trained"] == 7 * letters
    assert folder.run()["metric"] == {"name": "val/error", "label": "error %", "higher_is_better": False}
    assert last(folder)["progress"]["metric"] == folder.run()["metric"]
    assert folder.run()["data"] == {"classes": 3, "train": 64, "val": 45}
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["letters_per_second"] > 0 for row in rows if row["kind"] == "step")
    assert not [key for row in rows for key in row if "top1" in key or "images" in key]


def test_its_evaluation_is_that_of_all_predictions_in_order(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build(tmp_path / "run", "quant=fp32")
        found = evaluate(run)  # 45 words: the last batch is smaller
        run.tracker.close()
        words = run.data.val
        with torch.no_grad():
            wrong = run.model(words.letters).argmax(2) != words.labels
    assert found["val/error"] == pytest.approx(100 * wrong[words.labels >= 0].double().mean().item())


def test_what_it_shows_of_training_is_its_loss_alone(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    with quiet_machine(tmp_path / "cache"), caplog.at_level("INFO"):
        trainer.run(config("quant=fp32"), RunFolder(tmp_path / "run"))
    (line,) = [text for text in caplog.messages if text.startswith("epoch 1/1")]
    assert line.partition("; ")[0].startswith("epoch 1/1 (train): train loss ")
    assert "top-1" not in line
    assert ", error " in line.partition("; ")[2]


def test_a_data_set_that_no_task_has_is_refused_with_those_that_are_known():
    unknown = replace(config(), dataset=DatasetConfig(name="mnist"))
    for call in (tasks.build_task, tasks.validate_task):
        with pytest.raises(UserError, match=r"dataset\.name=mnist is not known; allowed: glyphs, .*words"):
            call(unknown)


def test_an_epoch_is_the_best_whichever_way_the_metric_is_better():
    error, _ = tasks.build_task(config()).metrics
    assert error.improves(3.0, None)
    assert error.improves(2.0, 3.0)
    assert not error.improves(3.0, 3.0)
    accuracy = replace(error, higher_is_better=True)
    assert accuracy.improves(4.0, 3.0)
    assert not accuracy.improves(np.nan, 3.0)
