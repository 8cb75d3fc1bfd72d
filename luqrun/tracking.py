"""Tracking: what a run shows of itself, in metrics.jsonl and as TensorBoard curves."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from luqrun.config import Config, flatten
from luqrun.convert import quantized_layers
from luqrun.recipes import OPERANDS
from luqrun.run_folder import EVENTS, RunFolder, what_decides_the_result

log = logging.getLogger(__name__)

# The same in every run, so that the hyper-parameter tab can compare them.
FINAL_METRICS = ("val/top1", "val/top5", "val/loss")
HEALTH = ("clipped_share", "underflow_share", "relative_error")

_default_excepthook = threading.excepthook


def _without_writer_threads(args) -> None:
    """TensorBoard raises a writing thread's error again at the next call: its traceback on the console is noise."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        _default_excepthook(args)


class Tracker:
    """Writes to one run folder. done: steps of the checkpoint that the run goes on from.

    Later points are no longer in the files; a TensorBoard that has read them already is told to forget them.
    """

    def __init__(self, config: Config, folder: RunFolder, done: int):
        self.config, self.folder = config, folder
        first_start = not any(folder.path.glob(EVENTS))
        threading.excepthook = _without_writer_threads
        _wait_for_a_later_name(folder)
        self.writer = SummaryWriter(str(folder.path), purge_step=done + 1 if done else 0)
        if first_start:
            self._write_hyper_parameters()

    def _write_hyper_parameters(self) -> None:
        # add_hparams would start a second run; these are its three summaries, in ours.
        # The tab takes no lists and no None.
        settings = flatten(what_decides_the_result(self.config))
        values = {k: v if isinstance(v, (str, int, float, bool)) else str(v) for k, v in settings.items()}
        for summary in hparams(values, dict.fromkeys(FINAL_METRICS, 0.0)):
            self.writer.file_writer.add_summary(summary)

    def row(self, kind: str, epoch: int, step: int, phase: str, metrics: dict[str, float]) -> None:
        """A line in metrics.jsonl and a point in each curve. kind: step or epoch."""
        self.folder.append_metrics({"kind": kind, "phase": phase, "epoch": epoch, "step": step, **metrics})
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def health(self, step: int, model: nn.Module, histograms: bool) -> None:
        """The layers' health of the last pass as curves, with `histograms` the gradients' exponents too."""
        for name, values in read_health(model).items():
            for metric, value in values.items():
                self.writer.add_scalar(f"quantization/{metric}/{name}", value, step)  # one group, or it hides the rest
        if histograms:
            for name, layer in quantized_layers(model):
                if layer.health and "gradient_exponents" in layer.health:
                    self._exponent_histogram(name, layer.health["gradient_exponents"].cpu().numpy(), step)

    def _exponent_histogram(self, name: str, counts: np.ndarray, step: int) -> None:
        """log2 |gradient| of a layer; zeros are left out."""
        counts, exponents = counts[1:-1], np.arange(1, 255) - 127
        used = counts.nonzero()[0]
        if used.size == 0:
            return
        first, last = used[0], used[-1] + 1
        counts, exponents = counts[first:last], exponents[first:last]
        self.writer.add_histogram_raw(
            f"log2_gradient/{name}",
            min=exponents[0],
            max=exponents[-1] + 1,
            num=counts.sum(),
            sum=(counts * exponents).sum(),
            sum_squares=(counts * exponents**2).sum(),
            bucket_limits=(exponents + 1).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def flush(self) -> None:
        """Bring the curves to disk: before a checkpoint, which must not be ahead of them."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class NoTracker:
    """What has a tracker's place in the processes that write nothing."""

    def row(self, *what) -> None:
        pass

    def health(self, *what) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _wait_for_a_later_name(folder: RunFolder) -> None:
    """TensorBoard reads a run's files in the order of their names: the second they were made, then host and process."""
    newest = max((int(path.name.split(".")[3]) for path in folder.path.glob(EVENTS)), default=0)
    if newest == int(time.time()):
        time.sleep(1 - time.time() % 1)


def read_health(model: nn.Module) -> dict[str, dict[str, float]]:
    """By layer and operand ("layer1.0.conv1/weight"): the shares and errors that the last pass left in the layers."""
    found = {}
    for name, layer in quantized_layers(model):
        for operand in OPERANDS:
            if layer.health and operand in layer.health:
                found[f"{name}/{operand}"] = dict(zip(HEALTH, layer.health[operand].tolist(), strict=True))
    return found


def log_last_pass(model: nn.Module) -> None:
    """Warn with what is known of each layer's last pass: its health, and the largest weight and gradient."""
    for name, values in read_health(model).items():
        log.warning("%s: %s", name, ", ".join(f"{metric} {number:.4g}" for metric, number in values.items()))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.grad is not None:
            largest = [tensor.abs().max().item() for tensor in (parameter.detach(), parameter.grad)]
            log.warning("%s: max|w| %.4g, max|gradient| %.4g", name, *largest)
