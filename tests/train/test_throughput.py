"""Examples a second: recently and in the mean, without the first step of a process."""

import functools

import torch
from running import build_trainer, quiet_machine

from luqrun.train import throughput


def test_the_first_step_is_part_of_the_time_and_not_of_the_mean_speed():
    progress = dict(throughput.START)
    first = throughput.Throughput(progress)
    assert first.mean() == 0.0
    first.count(10.0, 50)
    assert (first.mean(), first.take_recent()) == (0.0, 5.0)
    first.count(1.0, 50)
    first.count(1.0, 150)
    assert (first.mean(), first.take_recent()) == (100.0, 100.0)
    again = throughput.Throughput(progress)  # the next process
    again.count(20.0, 100)
    again.count(2.0, 40)
    assert (again.mean(), again.take_recent()) == (60.0, 140 / 22)
    assert progress == {"seconds": 34.0, "trained": 390, "timed_seconds": 4.0, "timed": 240}


def test_steps_that_compile_are_no_part_of_the_time():
    progress = dict(throughput.START)
    run = throughput.Throughput(progress)
    run.count(2.0, 50)  # not compiled, as it records the layers' health
    run.count(60.0, 50, compiled=True)
    run.count(1.0, 50)
    run.count(70.0, 50, compiled=True)
    assert (progress["seconds"], progress["trained"], run.mean()) == (3.0, 200, 50.0)


def test_the_time_left_is_that_of_steps_and_evaluations_so_far():
    progress = {**throughput.START, "step": 0, "evaluations": [], "evaluation_seconds": 0.0}
    run = throughput.Throughput(progress)
    assert run.seconds_left(10, 2) is None
    assert run.describe("images", 10, 2) == "0 images/s"
    for seconds in (10.0, 1.0, 1.0):  # the first warms up
        run.count(seconds, 50)
        progress["step"] += 1
    assert run.seconds_left(120, 2) == 120.0
    progress.update(evaluations=[{}, {}], evaluation_seconds=60.0)
    assert run.seconds_left(120, 2) == 180.0
    assert run.describe("images", 120, 2) == "50 images/s, 3 min left"
    assert run.describe("images", 0, 0) == "50 images/s"


def test_a_run_knows_the_steps_that_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flags, count = [], throughput.Throughput.count
    monkeypatch.setattr(
        throughput.Throughput,
        "count",
        lambda self, seconds, trained, compiled: flags.append(compiled) or count(self, seconds, trained, compiled),
    )
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "quant=fp32", "compile=true", "dataset.glyphs.train_images=160")
        run.train_epoch(0)
        run.tracker.close()
    assert flags == [False, True, False, False, False]  # the first records the layers, uncompiled
