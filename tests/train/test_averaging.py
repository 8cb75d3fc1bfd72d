"""The average of the weights at the ends of a schedule's last epochs."""

import copy
import signal

import pytest
import torch
from running import assert_same_tensors, last, metrics, train
from torch import nn

from luqrun.config import ScheduleConfig
from luqrun.runtime.signals import Stopped
from luqrun.train import trainer
from luqrun.train.averaging import average_weights


def model():
    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    return tied


def change(network, epoch):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(2.0**epoch)
        network[1].running_mean.fill_(epoch)


@pytest.mark.parametrize(("average", "expected"), [(2, (8 + 16) / 2), (3, (4 + 8 + 16) / 3), (5, 31 / 5)])
def test_the_weights_become_the_mean_of_the_last_epochs(average, expected):
    network, sums = model(), None
    config = ScheduleConfig(epochs=5, average=average)
    for epoch in range(5):
        change(network, epoch)
        sums = average_weights(network, sums, config, epoch)
        assert (sums is None) == (epoch < 5 - average or epoch == 4)
        if epoch == 3:
            sums = copy.deepcopy(sums)  # as a checkpoint holds them
    assert all(torch.allclose(each, torch.full_like(each, expected)) for each in network.parameters())
    assert network[2].weight is network[0].weight
    assert network[1].running_mean[0] == 4  # no parameter


@pytest.mark.parametrize("average", [None, 1])
def test_without_an_average_the_weights_are_the_last_ones(average):
    network = model()
    for epoch in range(3):
        change(network, epoch)
        assert average_weights(network, None, ScheduleConfig(epochs=3, average=average), epoch) is None
    assert all((each == 4).all() for each in network.parameters())


def test_half_precision_is_added_up_in_float32():
    network = nn.Linear(1, 1, bias=False).bfloat16()
    config, sums = ScheduleConfig(epochs=300, average=300), None
    for epoch in range(300):
        with torch.no_grad():
            network.weight.fill_(1.0)
        sums = average_weights(network, sums, config, epoch)
    assert network.weight.item() == 1.0  # 300 is no sum of ones in bf16


RUN = ("schedule.epochs=3", "schedule.average=2", "finetune=fnt1")


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_run_that_is_stopped_in_an_evaluation_averages_once(epoch, trained, tmp_path, monkeypatch):
    done, evaluate = [], trainer.evaluate

    def stopping(run, *split):
        done.append(run)
        if len(done) == epoch:
            run.save_checkpoint()
            raise Stopped(signal.SIGTERM)
        return evaluate(run, *split)

    whole = trained(*RUN)
    monkeypatch.setattr(trainer, "evaluate", stopping)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *RUN)
    _, folder = train(tmp_path / "run", *RUN)
    assert_same_tensors(last(folder)["model"], last(whole)["model"])
    assert metrics(folder, "epoch") == metrics(whole, "epoch")
