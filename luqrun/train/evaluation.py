"""An evaluation: the task's metrics on its validation or test data, with the recipe's weights and activations."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, closing
from typing import Protocol

import torch
from torch import nn

from luqrun.config import Config
from luqrun.runs.folder import PREDICTIONS, RunFolder
from luqrun.runtime import process_group
from luqrun.runtime.devices import to_device
from luqrun.runtime.signals import Requests
from luqrun.tasks.loader import eval_loader, in_order
from luqrun.tasks.task import Task
from luqrun.train import setup
from luqrun.train.progress import Progress

VAL, TEST = "val", "test"


class Run(Protocol):
    """What an evaluation needs of a run (luqrun.train.trainer.Trainer)."""

    config: Config
    folder: RunFolder
    device: torch.device
    task: Task
    model: nn.Module
    network: nn.Module
    requests: Requests
    no_bar: bool | None
    progress: dict

    def autocast(self) -> AbstractContextManager: ...

    def save_checkpoint(self) -> None: ...

    def stop_if_asked(self) -> None: ...


@torch.no_grad()
def evaluate(run: Run, split: str = VAL) -> dict[str, float]:
    """The metrics of a run's network as it is, whatever the phase; the run folder keeps the predictions as files."""
    started = time.perf_counter()
    run.model.eval()
    setup.share_buffers(run.model)
    config, examples = run.config, getattr(run.task.data, split)
    loader = eval_loader(examples, config.dataset, process_group.rank(), process_group.world_size())
    everywhere = math.ceil(len(examples) / config.dataset.batch_size) // process_group.world_size()
    predictions = []
    progress = Progress("evaluation", len(loader), "batches", run.no_bar)
    with closing(iter(loader)) as batches, setup.unchanging(run.model, config.compile), progress:
        for number in range(len(loader)):
            with run.requests.reading(run.save_checkpoint):
                batch = next(batches)
            if number < everywhere:  # in what every process has
                run.stop_if_asked()  # it is done again from the start
            with run.autocast():
                predictions.append(run.task.predict(run.network, to_device(batch, run.device)))
            progress.update(1)
    predictions = in_order(process_group.gather(predictions))
    for name, text in run.task.files(predictions, split).items():
        run.folder.write_text(f"{PREDICTIONS}/{name}", text)
    metrics = run.task.score(predictions, split)
    run.progress["evaluation_seconds"] += time.perf_counter() - started
    return metrics
