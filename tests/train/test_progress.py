"""How far a run is, where there is no terminal: a line at most each minute, with what one wants to know."""

import logging
import re

import pytest
from running import build_trainer, quiet_machine

from luqrun.runs.metric import TOP1, Metric
from luqrun.train import progress
from luqrun.train.progress import Progress, describe


@pytest.fixture
def clock(monkeypatch):
    """clock[0]: the seconds that time.monotonic tells."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == progress.log.name]


def count(clock, no_bar=None, every=10.0, done=0):
    with Progress("epoch 1/4 train", 100, "batches", no_bar, done, every) as bar:
        for number in range(1, 31):
            clock[0] += 1.0
            bar.update(2, f"loss {number}", f"step {number} of 400")


def test_there_is_a_line_now_and_then(clock, caplog):
    with caplog.at_level(logging.INFO):
        count(clock)
        count(clock, every=60.0)
        count(clock, every=29.0, done=40)
    assert lines(caplog) == [
        "epoch 1/4 train: 20 of 100 batches, step 10 of 400, loss 10",
        "epoch 1/4 train: 40 of 100 batches, step 20 of 400, loss 20",
        "epoch 1/4 train: 60 of 100 batches, step 30 of 400, loss 30",
        "epoch 1/4 train: 98 of 100 batches, step 29 of 400, loss 29",
    ]


def test_other_ranks_are_silent_and_a_terminal_has_a_bar(clock, caplog, monkeypatch, capsys):
    with caplog.at_level(logging.INFO):
        count(clock, no_bar=True)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        count(clock)
    assert lines(caplog) == []
    assert "epoch 1/4 train:   0%" in capsys.readouterr().err


def test_what_is_told_of_an_epoch():
    metrics = {"train/loss": 1.23456, "train/top1": 45.678, "val/loss": 2.0}
    assert describe("train", metrics, TOP1) == "train loss 1.235, top-1 45.68"
    assert describe("val", metrics, TOP1) == "val loss 2.000"
    assert describe("val", metrics, Metric("val/loss", "loss", False)) == "val loss 2.000"


def test_a_run_tells_step_loss_speed_and_time_left(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0, 0.0))  # a line for each batch
    with quiet_machine(), caplog.at_level(logging.INFO):
        run = build_trainer(tmp_path / "run", "quant=fp32", "schedule.epochs=2", "finetune=fnt1")
        run.fit()
        run.tracker.close()
    assert "256 training and 94 validation images of 47 classes" in caplog.text
    told = lines(caplog)
    assert re.fullmatch(
        r"epoch 2/3 train: 3 of 8 batches, step 11 of 24, "
        r"train loss \d\.\d{3}, top-1 \d+\.\d\d, \d+ images/s, \d+ s left",
        told[8 + 3 + 2],
    )
    assert [line for line in told if "evaluation: 2 of 3 batches" in line] == ["evaluation: 2 of 3 batches"] * 3
    epochs = [record.getMessage() for record in caplog.records if "; val loss" in record.getMessage()]
    assert [line.endswith(" s left") for line in epochs] == [True, True, False]
