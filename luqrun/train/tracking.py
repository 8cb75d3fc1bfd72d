"""Tracking: what a run shows of itself, in metrics.jsonl and as TensorBoard curves."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections.abc import Sequence

import numpy as np
from torch import nn
from torch.utils.tensorboard.summary import histogram_raw, hparams, scalar

from luqrun.config import Config
from luqrun.quant.convert import quantized_layers
from luqrun.quant.recipe import GEMMS, OPERANDS
from luqrun.runs.folder import EVENTS, RunFolder
from luqrun.runs.identity import NOT_IN_RESULT, flatten
from luqrun.tasks import METRICS
from luqrun.train.events import EventFile

log = logging.getLogger(__name__)

HEALTH = ("clipped_share", "underflow_share", "relative_error")
ABSENT = "none"


class Tracker:
    """Writes to one run folder. final_metrics: what the hyper-parameter tab compares runs by, such as val/top1.

    done: steps of the checkpoint that the run goes on from; after: its `latest`. Later points are no longer in the
    files; a TensorBoard that has read them already is told to forget them.
    """

    def __init__(self, config: Config, folder: RunFolder, final_metrics: Sequence[str], done: int, after: float = 0.0):
        self.folder = folder
        first_start = not any(folder.path.glob(EVENTS))
        self.events = EventFile(folder.path, after, purge=done + 1 if done else 0)
        if first_start:
            self._write_hyper_parameters(config, final_metrics)

    def _write_hyper_parameters(self, config: Config, final_metrics: Sequence[str]) -> None:
        # SummaryWriter.add_hparams would start a second run; these are its three summaries, in ours. The tab shows what
        # the run that it finds first declares, which may be of another task.
        for summary in hparams(hyper_parameters(config), dict.fromkeys([*final_metrics, *METRICS], 0.0)):
            self.events.add(summary)

    def row(self, kind: str, epoch: int, step: int, phase: str, metrics: dict[str, float]) -> None:
        """A line in metrics.jsonl and a point in each curve. kind: step or epoch."""
        self.folder.append_metrics({"kind": kind, "phase": phase, "epoch": epoch, "step": step, **metrics})
        for name, value in metrics.items():
            self.events.add(scalar(name, value), step)
        self.events.flush()  # so that a TensorBoard beside it shows them

    def health(self, step: int, model: nn.Module, histograms: bool) -> None:
        """The layers' health of the last pass as curves, with `histograms` the gradients' exponents too."""
        for name, values in read_health(model).items():
            for metric, value in values.items():
                tag = f"quantization/{metric}/{name}"  # one group, or it hides the rest
                self.events.add(scalar(tag, value), step)
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
        summary = histogram_raw(
            f"log2_gradient/{name}",
            min=exponents[0],
            max=exponents[-1] + 1,
            num=counts.sum(),
            sum=(counts * exponents).sum(),
            sum_squares=(counts * exponents**2).sum(),
            bucket_limits=(exponents + 1).tolist(),
            bucket_counts=counts.tolist(),
        )
        self.events.add(summary, step)

    def flush(self) -> None:
        """Bring the curves to disk: before a checkpoint, which must not be ahead of them."""
        self.events.flush()

    @property
    def latest(self) -> float:
        """The time of the last point, in seconds since 1970: a checkpoint remembers it."""
        return self.events.latest

    def close(self) -> None:
        self.events.close()


class NoTracker:
    """What has a tracker's place in the processes that write nothing."""

    latest = 0.0

    def row(self, *what) -> None:
        pass

    def health(self, *what) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def hyper_parameters(config: Config) -> dict[str, str | float | bool]:
    """What decides the result, with dotted keys, for TensorBoard's tab: in every run the same keys, of the same kinds.

    Its columns are those of the run it finds first. It takes no list and no None: what can be absent is text.
    """
    settings = dataclasses.asdict(config)
    for gemm in GEMMS:
        settings["quant"][gemm] = _changes(settings["quant"][gemm])
    values, shown = flatten(settings), {}
    for key, kind in _keys(Config).items():
        value = values.get(key)
        shown[key] = ABSENT if value is None else value if kind in (bool, int, float) else str(value)
    return shown


def _changes(gemm: dict | None) -> str | None:
    """What differs in one GEMM, mostly nothing, as one text: a column for each key would drown the others."""
    if gemm is None:
        return "high precision"
    changes = {key: value for key, value in flatten(gemm).items() if value is not None or key in OPERANDS}
    return ", ".join(f"{key}={'high precision' if value is None else value}" for key, value in changes.items()) or None


def _keys(schema: type, prefix: str = "", optional: bool = False) -> dict[str, type]:
    """The dotted keys that decide the result and their types: str where one, or a part above it, can be absent."""
    kinds = {}
    for name, hint in typing.get_type_hints(schema).items():
        if name in NOT_IN_RESULT.get(prefix.rstrip("."), ()):
            continue
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        absent = optional or type(None) in parts
        is_gemm = prefix == "quant." and name in GEMMS
        nested = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if nested is not None and not is_gemm:
            kinds |= _keys(nested, f"{prefix}{name}.", absent)
        else:
            kinds[prefix + name] = str if absent or is_gemm else parts[0]
    return kinds


def read_health(model: nn.Module) -> dict[str, dict[str, float]]:
    """By layer and operand ("layer1.0.conv1/weight"): the shares and errors that the last pass left in the layers."""
    health = {}
    for name, layer in quantized_layers(model):
        for operand in OPERANDS:
            if layer.health and operand in layer.health:
                health[f"{name}/{operand}"] = dict(zip(HEALTH, layer.health[operand].tolist(), strict=True))
    return health


def log_last_pass(model: nn.Module) -> None:
    """Warn with what is known of each layer's last pass: its health, and the largest weight and gradient."""
    for name, values in read_health(model).items():
        log.warning("%s: %s", name, ", ".join(f"{metric} {number:.4g}" for metric, number in values.items()))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.grad is not None:
            largest = [tensor.abs().max().item() for tensor in (parameter.detach(), parameter.grad)]
            log.warning("%s: max|w| %.4g, max|gradient| %.4g", name, *largest)
