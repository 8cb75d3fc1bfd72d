"""Classification as a task: its loss and gradients, and what it makes of its predictions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from running import build_trainer, quiet_machine
from torch import nn

from luqrun import tasks
from luqrun.runs.metric import Metric
from luqrun.tasks.classification.task import Classification


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task whose data is never asked for."""
    schedule, model = SimpleNamespace(label_smoothing=0.1), SimpleNamespace(weights=None)
    settings = SimpleNamespace(model=model, schedule=schedule, dataset=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luqrun.tasks.classification.task.build_dataset", lambda config: None)
        return Classification(settings)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 100, 128])
def test_the_gradient_of_equal_batches_is_bit_for_bit_that_of_mean_losses(tmp_path, batch_size, accumulate):
    images = torch.randn(accumulate, batch_size, 1, 20, 20)
    labels = torch.randint(47, (accumulate, batch_size))
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "model=vit_tiny", "quant=fp32", "schedule.label_smoothing=0.1")
        run.model.train()
        sums, weight = run.accumulate_gradients(list(zip(images, labels, strict=True)), record_health=False)
        gradients = [each.grad.clone() for each in run.model.parameters()]
        run.model.zero_grad()
        losses = [
            F.cross_entropy(run.model(each), classes, label_smoothing=0.1)
            for each, classes in zip(images, labels, strict=True)
        ]
        for loss in losses:
            (loss / accumulate).backward()
        run.tracker.close()
    assert all(torch.equal(one, each.grad) for one, each in zip(gradients, run.model.parameters(), strict=True))
    assert weight == accumulate * batch_size
    assert sums["loss"] / weight == sum(loss.item() for loss in losses) / accumulate


def test_sums_and_scores_are_shares_of_the_images(task):
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]]).repeat(4, 1)
    labels = torch.tensor([0, 1, 4, 5])  # first, second, fifth, sixth
    network, batch = nn.Identity(), (logits[:, :, None, None], labels)
    network.forward = lambda images: images[:, :, 0, 0]
    loss, sums = task.loss(network, batch)
    assert loss == F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert (sums, task.weight(batch)) == ({"top1": 100.0}, 4)
    parts = [task.predict(network, (batch[0][part], labels[part])) for part in (slice(0, 3), slice(3, 4))]
    expected = {"val/loss": F.cross_entropy(logits, labels).item(), "val/top1": 25.0, "val/top5": 75.0}
    assert task.score(parts) == pytest.approx(expected)
    assert task.score(parts).keys() == {metric.name for metric in task.metrics}


def test_a_metric_is_shown_without_its_unit_and_named_without_its_part():
    metric = Metric("val/top1", "top-1 %", higher_is_better=True)
    assert (metric.short, metric.title) == ("top1", "top-1")
    assert Classification.metrics[0] == metric


def test_every_image_set_has_this_task():
    images = {"glyphs", "cifar10", "cifar100", "imagenet", "folder"}
    assert {name for name, module in tasks.MODULES.items() if module == "luqrun.tasks.classification.task"} == images
