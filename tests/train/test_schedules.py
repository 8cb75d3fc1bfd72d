"""Optimizers and learning rates: torch's own schedulers are the reference."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from luqrun.config import FinetuneConfig, ModelConfig, ScheduleConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.networks import build_model
from luqrun.train.schedules import (
    build_optimizer,
    finetune_learning_rate,
    learning_rate,
    validate_finetune,
    validate_schedule,
)


def torch_rates(make_scheduler, lr, num_steps):
    """The rates that a torch scheduler gives steps 0 .. num_steps - 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(config, steps_per_epoch):
    return [learning_rate(config, step, steps_per_epoch) for step in range(config.epochs * steps_per_epoch)]


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(6, 78), (5, 7), (1, 10), (1, 2), (1, 1)])
def test_onecycle_is_torchs(epochs, steps_per_epoch):
    config = ScheduleConfig(name="onecycle", epochs=epochs, lr=0.1)
    num_steps = epochs * steps_per_epoch
    theirs = torch_rates(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=num_steps), 0.1, num_steps)
    assert our_rates(config, steps_per_epoch) == pytest.approx(theirs, rel=1e-9)


def test_step_is_torchs_multisteplr():
    config = ScheduleConfig(name="step", epochs=9, lr=0.1, milestones=[3, 6, 8], gamma=0.1)
    theirs = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [15, 30, 40], 0.1), 0.1, 45)
    assert our_rates(config, 5) == pytest.approx(theirs, rel=1e-9)


def test_step_with_warmup_is_the_product_of_torchs():
    config = ScheduleConfig(name="step", epochs=9, lr=0.1, milestones=[3, 6, 8], gamma=0.1, warmup_epochs=2)

    def chained(optimizer):
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
        return lr_scheduler.ChainedScheduler([warmup, lr_scheduler.MultiStepLR(optimizer, [15, 30, 40], 0.1)])

    assert our_rates(config, 5) == pytest.approx(torch_rates(chained, 0.1, 45), rel=1e-9)


def test_cosine_is_torchs():
    config = ScheduleConfig(name="cosine", epochs=4, lr=0.05)
    theirs = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20), 0.05, 20)
    assert our_rates(config, 5) == pytest.approx(theirs, rel=1e-9)


def test_cosine_with_a_warmup_of_one_and_a_half_epochs_is_torchs():
    config = ScheduleConfig(name="cosine", epochs=6, lr=0.05, warmup_epochs=1.5)

    def sequential(optimizer):
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 16, total_iters=15)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=45)
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[15])

    assert our_rates(config, 10) == pytest.approx(torch_rates(sequential, 0.05, 60), rel=1e-9)


def test_finetune_rises_to_lr_base_and_falls_with_the_same_slope():
    rates = [finetune_learning_rate(step, 10, 1e-4, 1e-3) for step in range(11)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[5] == pytest.approx(1e-3)
    assert rates[10] == pytest.approx(1e-4)
    slopes = [b - a for a, b in itertools.pairwise(rates)]
    assert slopes == pytest.approx([1.8e-4] * 5 + [-1.8e-4] * 5)


def test_finetune_with_an_odd_number_of_steps_peaks_between_two():
    rates = [finetune_learning_rate(step, 5, 0.0, 1.0) for step in range(6)]
    assert rates == pytest.approx([0.0, 0.4, 0.8, 0.8, 0.4, 0.0])


def test_finetune_from_above_lr_base_falls_to_zero_and_stays():
    rates = [finetune_learning_rate(step, 8, 0.1, 0.02) for step in range(9)]
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0, 0.0, 0.0])


def no_decay_names(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_norms_biases_and_embeddings_are_not_decayed(name, optimizer):
    model = build_model(ModelConfig(name=name), 5, 1, 20)
    config = ScheduleConfig(name="cosine", optimizer=optimizer, lr=0.02, weight_decay=0.3, decay_norm_and_bias=False)
    built = build_optimizer(model, config)
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    weights |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    names = {name for name, _ in model.named_parameters()}
    assert no_decay_names(model, built) == names - weights
    assert sum(len(group["params"]) for group in built.param_groups) == len(names)
    assert {group["weight_decay"] for group in built.param_groups} == {0.0, 0.3}
    assert {group["lr"] for group in built.param_groups} == {0.02}


def test_everything_is_decayed_by_default():
    model = build_model(ModelConfig(name="vit_tiny"), 5, 1, 20)
    built = build_optimizer(model, ScheduleConfig(name="cosine", weight_decay=0.3))
    assert [group["weight_decay"] for group in built.param_groups] == [0.3]
    assert len(built.param_groups[0]["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    built = build_optimizer(model, ScheduleConfig(name="cosine"))
    assert [group["params"] for group in built.param_groups] == [[model.bias]]


def test_optimizer_settings_arrive():
    model = nn.Linear(3, 2)
    sgd = build_optimizer(model, ScheduleConfig(name="step", momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.8, True)
    adamw = build_optimizer(model, ScheduleConfig(name="step", momentum=0.8, optimizer="adamw"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "exponential"}, "schedule.name=exponential"),
        ({"optimizer": "adam"}, "schedule.optimizer=adam"),
        ({"epochs": -1}, "schedule.epochs"),
        ({"lr": 0.0}, "schedule.lr"),
        ({"lr": math.nan}, "schedule.lr"),
        ({"finetune_lr": 0.0}, "schedule.finetune_lr"),
        ({"weight_decay": -1e-4}, "schedule.weight_decay"),
        ({"weight_decay": math.inf}, "schedule.weight_decay"),
        ({"momentum": 1.0}, "schedule.momentum"),
        ({"momentum": -0.1}, "schedule.momentum"),
        ({"momentum": 0.0, "nesterov": True}, "schedule.nesterov"),
        ({"optimizer": "adamw", "nesterov": True}, "schedule.nesterov"),
        ({"label_smoothing": 1.0}, "schedule.label_smoothing"),
        ({"label_smoothing": -0.1}, "schedule.label_smoothing"),
        ({"clip_grad_norm": 0.0}, "schedule.clip_grad_norm"),
        ({"clip_grad_norm": math.inf}, "schedule.clip_grad_norm"),
        ({"accumulate": 0}, "schedule.accumulate"),
        ({"milestones": [30, 30]}, "schedule.milestones"),
        ({"milestones": [0, 30]}, "schedule.milestones"),
        ({"gamma": 0.0}, "schedule.gamma"),
        ({"gamma": 1.1}, "schedule.gamma"),
        ({"warmup_epochs": -1.0}, "schedule.warmup_epochs"),
        ({"warmup_epochs": 6.0}, "schedule.warmup_epochs"),
        ({"name": "onecycle", "warmup_epochs": 1.0}, "schedule.warmup_epochs"),
    ],
)
def test_refused_schedules(changes, word):
    with pytest.raises(UserError, match=word):
        validate_schedule(ScheduleConfig(**{"name": "cosine", "epochs": 6, **changes}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epochs": -1}, "finetune.epochs"),
        ({"lr_base": 0.0}, "finetune.lr_base"),
        ({"lr_base": math.nan}, "finetune.lr_base"),
    ],
)
def test_refused_finetunes(changes, word):
    with pytest.raises(UserError, match=word):
        validate_finetune(FinetuneConfig(**{"name": "fnt1", "epochs": 1, **changes}))


def test_accepted_at_the_limits():
    validate_schedule(
        ScheduleConfig(
            name="step",
            epochs=1,
            momentum=0.0,
            weight_decay=0.0,
            milestones=[],
            gamma=1.0,
            warmup_epochs=0.5,
            clip_grad_norm=1.0,
        )
    )
    validate_finetune(FinetuneConfig(name="none", epochs=0))
