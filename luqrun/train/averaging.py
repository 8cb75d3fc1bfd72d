"""The average of the weights at the ends of a schedule's last epochs (schedule.average), as is usual in translation.

It replaces the weights when the schedule ends, and is what a fine-tune starts from.
"""

from __future__ import annotations

import torch
from torch import nn

from luqrun.config import ScheduleConfig


@torch.no_grad()
def average_weights(model: nn.Module, sums: dict | None, config: ScheduleConfig, epoch: int) -> dict | None:
    """After `epoch` of the schedule, counted from 0: add the weights to `sums`, float32 by name, and return them; after
    the last epoch the model has their mean, and None is returned. sums: None before the first epoch that counts.

    What is no parameter, such as running statistics, stays as it is. A checkpoint keeps the sums.
    """
    wanted = config.average or 1
    if wanted == 1 or epoch < config.epochs - wanted:
        return None
    parameters = dict(model.named_parameters())
    if sums is None:
        sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in parameters.items()}
    for name, each in parameters.items():
        sums[name] = sums[name].to(each.device)  # as a checkpoint holds it
        sums[name] += each
    if epoch < config.epochs - 1:
        return sums
    for name, each in parameters.items():
        each.copy_(sums[name] / wanted)
    return None
