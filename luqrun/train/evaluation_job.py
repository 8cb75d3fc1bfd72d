"""job=evaluate: how good the weights of a file are under a recipe, on a data set. Nothing is trained."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict

import torch

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.quant import gemms
from luqrun.quant.recipe import Recipe
from luqrun.runs.folder import RunFolder, now
from luqrun.runs.identity import refuse_changed_data
from luqrun.runs.reading import SUMMARY
from luqrun.runtime import process_group
from luqrun.runtime.devices import choose_device, peak_memory, reset_peak_memory
from luqrun.runtime.signals import Requests
from luqrun.tasks import build_task
from luqrun.tasks.loader import explain_dead_worker, is_batched
from luqrun.train import setup
from luqrun.train.evaluation import TEST, VAL, evaluate

log = logging.getLogger(__name__)

PHASE = "evaluate"  # of the only line of metrics.jsonl


def run(config: Config, folder: RunFolder, requests: Requests | None = None) -> dict:
    """Evaluate model.weights as a training evaluates its own, and return the summary.

    Raises UserError for weights that do not fit, or give no finite loss; and Stopped at once, where `requests` says so:
    there is nothing to keep.
    """
    device = choose_device(config.device)
    reset_peak_memory(device)
    evaluation = Evaluation(config, folder, device, requests or Requests())
    try:
        metrics = evaluation.run()
    except RuntimeError as error:
        if explanation := explain_dead_worker(error, config.dataset):
            raise UserError(explanation) from None
        raise
    loss = metrics["val/loss"]
    if not math.isfinite(loss):
        what = f"the loss of model.weights={config.model.weights} under quant={config.quant.name} is {loss}"
        raise UserError(f"{what}: a weight, or an output, is not finite; another quant= or precision=fp32 may do")
    folder.append_metrics({"kind": "epoch", "epoch": 0, "step": 0, "phase": PHASE, **metrics})
    summary = {
        **metrics,
        **evaluation.task.notes,
        "evaluated": {"weights": config.model.weights, "trained_with": evaluation.trained_with},
        "evaluation_seconds": evaluation.progress["evaluation_seconds"],
        "peak_memory_bytes": peak_memory(device),
    }
    folder.update_run(status="finished", end=now())
    folder.write_json(SUMMARY, summary)
    return summary


class Evaluation:
    """What luqrun.train.evaluation asks of a run, without a training. trained_with: the name of the recipe that made
    the weights; None where their file does not say."""

    def __init__(self, config: Config, folder: RunFolder, device: torch.device, requests: Requests):
        torch.backends.cudnn.allow_tf32 = False  # as in training
        self.config, self.folder, self.device, self.requests = config, folder, device, requests
        self.task = build_task(config)
        data, recipe = self.task.data, Recipe.from_config(config.quant)
        refuse_changed_data(folder, data.fingerprint)
        folder.rewind({})
        weights = self.task.weights()
        self.trained_with = None if weights is None else weights.recipe
        self.model = setup.build(config, recipe, self.task, device)
        self.network = setup.wrap(self.model, config, device, any_size=is_batched(data))
        self.no_bar, self.progress = None, {"evaluation_seconds": 0.0}
        kernels = gemms.describe(device.type, recipe.encodings)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        of_run = {"device": name, "threads": torch.get_num_threads(), "world_size": process_group.world_size()}
        folder.update_run(**of_run, kernel_backend=kernels, data=data.fingerprint, metric=asdict(self.task.metrics[0]))
        log.info("%s", data.describe())
        setup.log_model(self.model, config, recipe)
        log.info("device %s, precision %s, kernels: %s", device, config.precision, kernels)

    def run(self) -> dict[str, float]:
        """The metrics on validation data, in the task's order, and on test data where there are some."""
        metrics = evaluate(self, VAL)
        found = {metric.name: metrics[metric.name] for metric in self.task.metrics}
        return {**found, **evaluate(self, TEST)} if self.task.data.test is not None else found

    def autocast(self):
        return setup.autocast(self.config, self.device)

    def save_checkpoint(self) -> None:
        """There is nothing to keep."""

    def stop_if_asked(self) -> None:
        """Requests raises Stopped by itself, outside of Requests.deferred."""
