"""Optimizers, and learning rates as pure functions of the step: nothing to checkpoint, resuming needs the step only."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import nn

from luqrun.config import FinetuneConfig, ScheduleConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.quant.finetune import check_operands

SCHEDULES = ("step", "cosine", "onecycle", "linear", "inverse_sqrt")
OPTIMIZERS = ("sgd", "adamw")
MAX_DECAY = 1e6
MAX_BETA = 0.999999  # the first step is divided by 1 - beta1

# torch.optim.lr_scheduler.OneCycleLR's defaults.
_ONECYCLE_RISE = 0.3
_ONECYCLE_START_DIVISOR = 25.0
_ONECYCLE_END_DIVISOR = 1e4

_EMBEDDINGS = ("class_token", "pos_embedding")


def build_optimizer(model: nn.Module, config: ScheduleConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters of `model` that require a gradient; for AdamW `momentum` is beta1.

    With `decay_norm_and_bias` false, parameters of at most one dimension (norms, biases) and the class token and
    position embedding of a vision transformer form a second group with no weight decay.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in _EMBEDDINGS
        (no_decay if exempt and not config.decay_norm_and_bias else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        beta2 = 0.999 if config.beta2 is None else config.beta2
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, beta2))
    assert config.optimizer == "sgd"
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(config: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the `config.epochs` epochs of the run.

    step: times `gamma` at each milestone (in epochs). cosine: down to 0 at the end of the last epoch. Both rise
    linearly over `warmup_epochs` or `warmup_steps`: with W warm-up steps, step t < W has (t + 1) / (W + 1) of the rate;
    milestones count from the start of the run, the cosine from the end of the warm-up. linear: down to 0 likewise, in a
    line. inverse_sqrt: after the warm-up lr * sqrt((W + 1) / (t + 1)), as of Transformers for translation. onecycle: a
    cosine from lr / 25 up to lr over the first 30 % of the steps, then one down to lr / 250000; momentum stays.
    """
    num_steps = config.epochs * steps_per_epoch
    assert 0 <= step < num_steps
    if config.name == "onecycle":
        return _onecycle(config.lr, step, num_steps)
    warmup_steps = int(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    if config.name == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.lr * warmup * config.gamma**passed
    if step < warmup_steps:
        return config.lr * warmup
    if config.name == "inverse_sqrt":
        return config.lr * math.sqrt((warmup_steps + 1) / (step + 1))
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    if config.name == "linear":
        return config.lr * (1 - done)
    assert config.name == "cosine"
    return _cosine(config.lr, 0.0, done)


def rate_of_step(schedule: ScheduleConfig, finetune: FinetuneConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the schedule's epochs and the fine-tune's.

    A fine-tune of what others trained (schedule.epochs=0) begins at 0, as after a schedule that comes down to it.
    """
    main = schedule.epochs * steps_per_epoch
    if step < main:
        return learning_rate(schedule, step, steps_per_epoch)
    last = learning_rate(schedule, main - 1, steps_per_epoch) if main else 0.0
    return finetune_learning_rate(step - main, finetune.epochs * steps_per_epoch, last, finetune.lr_base)


def finetune_learning_rate(step: int, steps: int, start_lr: float, base_lr: float) -> float:
    """The learning rate of step `step` of `steps` fine-tune steps (FNT, Eq. 17).

    Linear from `start_lr`, the last rate of the 4-bit training, to `base_lr` after half the steps, then down with the
    same slope, never below 0.
    """
    assert steps > 0
    assert 0 <= step <= steps
    half = steps / 2
    if step <= half:
        return start_lr + (base_lr - start_lr) * (step / half)
    return max(0.0, base_lr - abs(base_lr - start_lr) * (step / half - 1.0))


def _onecycle(lr: float, step: int, num_steps: int) -> float:
    lowest = lr / _ONECYCLE_START_DIVISOR
    peak = _ONECYCLE_RISE * num_steps - 1
    if step <= peak:
        return _cosine(lowest, lr, step / peak)
    # A run of up to three steps has its peak before step 0 and only comes down.
    return _cosine(lr, lowest / _ONECYCLE_END_DIVISOR, (step - peak) / (num_steps - 1 - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine wave."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def validate_schedule(config: ScheduleConfig) -> None:
    """Raise UserError naming the first key under `schedule` that is out of range."""
    check_choice("schedule.name", config.name, SCHEDULES)
    check_choice("schedule.optimizer", config.optimizer, OPTIMIZERS)
    _check_finite("schedule", config)
    check_at_least("schedule.epochs", config.epochs, 0)
    _check_positive("schedule.lr", config.lr)
    _check_positive("schedule.finetune_lr", config.finetune_lr)
    check_at_least("schedule.weight_decay", config.weight_decay, 0)
    check_at_most("schedule.weight_decay", config.weight_decay, MAX_DECAY)
    check_at_least("schedule.accumulate", config.accumulate, 1)
    for key in ("momentum", "label_smoothing"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError(f"schedule.{key}={getattr(config, key)} must be at least 0 and less than 1")
    if config.optimizer == "adamw":
        check_at_most("schedule.momentum", config.momentum, MAX_BETA)
    if config.beta2 is not None:
        if config.optimizer != "adamw":
            raise UserError(f"schedule.beta2={config.beta2} is read by schedule.optimizer=adamw alone")
        if not 0 <= config.beta2 <= MAX_BETA:
            raise UserError(f"schedule.beta2={config.beta2} must be at least 0 and at most {MAX_BETA}")
    if config.average is not None:
        check_at_least("schedule.average", config.average, 1)
        if config.average > config.epochs:
            most = f"schedule.epochs={config.epochs}, or null: the last weights are taken"
            raise UserError(f"schedule.average={config.average} must be at most {most}")
    if config.nesterov and (config.optimizer != "sgd" or config.momentum == 0):
        raise UserError("schedule.nesterov=true needs schedule.optimizer=sgd and schedule.momentum above 0")
    if config.clip_grad_norm is not None:
        _check_positive("schedule.clip_grad_norm", config.clip_grad_norm)
    milestones = config.milestones
    if any(b <= a for a, b in zip([0, *milestones], milestones, strict=False)):
        raise UserError(f"schedule.milestones={list(milestones)} must be increasing and at least 1 epoch")
    if not 0 < config.gamma <= 1:
        raise UserError(f"schedule.gamma={config.gamma} must be above 0 and at most 1")
    if not 0 <= config.warmup_epochs < max(config.epochs, 1):
        raise UserError(
            f"schedule.warmup_epochs={config.warmup_epochs} must be at least 0 and less than "
            f"schedule.epochs={config.epochs}"
        )
    if config.warmup_steps is not None:
        check_at_least("schedule.warmup_steps", config.warmup_steps, 0)
        if config.warmup_epochs or config.name == "onecycle":
            key = "warmup_epochs" if config.warmup_epochs else "name"
            other = f"schedule.{key}={getattr(config, key)}"
            raise UserError(f"schedule.warmup_steps={config.warmup_steps} does not go with {other}")
    if config.name == "onecycle" and config.warmup_epochs:
        raise UserError(
            f"schedule.warmup_epochs={config.warmup_epochs} must be 0: schedule.name=onecycle warms up itself"
        )


def validate_finetune(config: FinetuneConfig) -> None:
    """Raise UserError naming the first key under `finetune` that is out of range."""
    _check_finite("finetune", config)
    check_at_least("finetune.epochs", config.epochs, 0)
    _check_positive("finetune.lr_base", config.lr_base)
    check_operands("finetune.high_precision", vars(config.high_precision))


def _check_finite(group: str, config: ScheduleConfig | FinetuneConfig) -> None:
    """NaN passes most comparisons, so it is refused before any."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{group}.{field.name}={value} must be a finite number")


def _check_positive(key: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{key}={value} must be above 0")
