"""The kernels of this CPU, compiled before a run's first step would wait for them, and with a word about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import nn

from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.kernels import MODULES, backend_for
from luqrun.quant.recipe import Recipe
from luqrun.quant.relu import MaskedReLU, MaskedReLU6
from luqrun.runtime import process_group
from luqrun.train.progress import Progress

log = logging.getLogger(__name__)

EVERY = 5.0  # seconds between two lines about the progress, where there is no terminal


def compile_training_kernels(model: nn.Module, recipe: Recipe, device: torch.device, no_bar: bool | None) -> None:
    """Compile, or load, the CPU's kernels that training this quantized model takes. no_bar: as tqdm's `disable`."""
    layers = [layer for _, layer in quantized_layers(model)]
    if device.type == "cpu" and layers:
        convolves = any(isinstance(layer, nn.Conv2d) for layer in layers)
        rectifies = any(isinstance(module, MaskedReLU | MaskedReLU6) for module in model.modules())
        compile_kernels(lambda: _train_tiny_network(recipe, convolves, rectifies), no_bar)


def _train_tiny_network(recipe: Recipe, convolves: bool, rectifies: bool) -> None:
    """A step of a network so small that only the kinds of its layers count."""
    middle = [nn.ReLU()] if rectifies else []
    if convolves:
        parts = [nn.Conv2d(2, 2, 3, padding=1), *middle, nn.Conv2d(2, 2, 3, stride=2), nn.Flatten(), nn.Linear(2, 2)]
        x = torch.ones(2, 2, 4, 4).to(memory_format=torch.channels_last)
    else:
        parts, x = [nn.Linear(2, 2), *middle, nn.Linear(2, 2)], torch.ones(2, 2)
    network = quantize_model(nn.Sequential(*parts), recipe, skip=()).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        network(x.requires_grad_()).sum().backward()


def compile_kernels(rehearse: Callable[[], object], no_bar: bool | None) -> None:
    """Compile, or load, the CPU's kernels that `rehearse` calls, none of which computes anything meanwhile."""
    if backend_for("cpu").__name__ != MODULES["cpu"]:
        return
    from luqrun.quant.kernels.cpu import (
        ahead,
        driver,  # numba is loaded where it is needed
    )

    with torch.random.fork_rng(devices=[]), driver.rehearsal() as versions:
        rehearse()
    with _Report(no_bar) as report:
        ahead.compile_all(versions, report, first=process_group.local_rank() == 0)


class _Report:
    """The progress, as a bar on a terminal and as a line now and then elsewhere."""

    def __init__(self, no_bar: bool | None):
        self.no_bar, self.bar, self.started = no_bar, None, time.monotonic()

    def __enter__(self):
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            log.info("compiling the kernels for this CPU: once, and half a minute or so (%d functions) ...", total)
            self.started = time.monotonic()
            self.bar = Progress("compiling", total, "functions", self.no_bar, every=EVERY)
        self.bar.update(done - self.bar.done)

    def __exit__(self, *failure) -> None:
        if self.bar is not None:
            self.bar.__exit__(*failure)
            if failure[0] is None:
                seconds = time.monotonic() - self.started
                log.info("compiled in %.0f s, which are no part of the time of training", seconds)
