"""The kernels of this CPU, compiled before a run's first step would wait for them, or beside its first steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from luqrun.config import Config
from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.kernels import MODULES, backend_for, stand_in
from luqrun.quant.norm import FusedBatchNorm2d
from luqrun.quant.recipe import Recipe
from luqrun.quant.relu import MaskedReLU, MaskedReLU6
from luqrun.quant.sharing import forget
from luqrun.runtime import process_group
from luqrun.train.progress import Progress

if TYPE_CHECKING:  # numba is loaded where it is needed
    from luqrun.quant.kernels.cpu.driver import Version

log = logging.getLogger(__name__)

EVERY = 5.0  # seconds between two lines about the progress, where there is no terminal
T = TypeVar("T")


class KernelCompilation:
    """A run's kernels, of which some may still be compiled, in other processes, while torch operations stand in for
    them: with the same bits, several times as slowly.

    In its `with` the stand-in serves until all are there; `run` is for what may begin without them.
    """

    def __init__(self, missing: Sequence[Version] = ()):
        self.goes_on = bool(missing)
        self.ready, self.unwanted, self.failure = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._compile, args=(missing,), daemon=True)
        self.stand_in, self.serving, self.started = stand_in.StandIn(self.ready), None, time.monotonic()
        self.begun, self.has_cores = False, False

    def __enter__(self):
        if self.goes_on:
            from luqrun.quant.kernels.cpu import ahead

            self.has_cores = ahead.cores() > ahead.PROCESSES
            shown = "meanwhile" if self.has_cores else "in the first step"
            log.info("compiling the kernels for this CPU, once; %s torch operations do the same, slowly", shown)
            self.thread.start()
            self.serving = self.stand_in.serving()
            self.serving.__enter__()
        return self

    def __exit__(self, *failure) -> None:
        self.unwanted.set()
        self._end()

    def run(self, model: nn.Module, function: Callable[..., T], *arguments) -> T:
        """function(*arguments), which trains or evaluates the model. Where the kernels come to be there in the middle
        of it, it is called once more, with the model's buffers as they were."""
        if not self.goes_on:
            return function(*arguments)
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # The first one shows that all goes well. More of them would cost those that compile more than they gain, unless
        # there are cores for both.
        if self.begun and not self.has_cores:
            self.ready.wait()
        self.begun = True
        try:
            with self.stand_in.giving_way():
                return function(*arguments)
        except stand_in.Ready:
            self._end()
        if self.failure is not None:
            raise self.failure
        log.info("compiled in %.0f s: from here on kernels quantize", time.monotonic() - self.started)
        forget()
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        return function(*arguments)

    def _end(self) -> None:
        if self.goes_on:
            self.thread.join()
            self.serving.__exit__(None, None, None)
            self.goes_on = False

    def _compile(self, missing: Sequence[Version]) -> None:
        from luqrun.quant.kernels.cpu import ahead

        try:
            ahead.compile_all(missing, lambda done, total: None, unwanted=self.unwanted)
        except ahead.Unwanted:
            pass
        except Exception as error:  # of which the run itself must hear
            self.failure = error
        finally:
            self.ready.set()


def training_kernels(
    config: Config, model: nn.Module, recipe: Recipe, device: torch.device, no_bar: bool | None
) -> KernelCompilation:
    """The CPU's kernels that training this quantized model takes: loaded, and else compiled, here and now where each
    step is compiled, measured or shared by processes. no_bar: as tqdm's `disable`."""
    layers = [layer for _, layer in quantized_layers(model)]
    if device.type != "cpu" or not layers or not _is_numba():
        return KernelCompilation()
    kinds = {type(module) for module in model.modules()}
    convolves = any(isinstance(layer, nn.Conv2d) for layer in layers)
    versions = _rehearsed(lambda: _train_tiny_network(recipe, convolves, kinds))
    if config.compile or config.tracking.profile_steps or process_group.world_size() > 1:
        _compile_now(versions, no_bar)
        return KernelCompilation()
    from luqrun.quant.kernels.cpu import ahead

    return KernelCompilation(ahead.missing(versions))


def _train_tiny_network(recipe: Recipe, convolves: bool, kinds: set[type]) -> None:
    """A step of a network so small that only the kinds of its layers count. kinds: of modules of the real one."""
    middle = [nn.ReLU()] if kinds & {MaskedReLU, MaskedReLU6} else []
    if convolves:
        middle = [nn.BatchNorm2d(8), *middle] if FusedBatchNorm2d in kinds else middle
        parts = [nn.Conv2d(2, 8, 3, padding=1), *middle, nn.Conv2d(8, 2, 3, stride=2), nn.Flatten(), nn.Linear(2, 2)]
        x = torch.ones(2, 2, 4, 4).to(memory_format=torch.channels_last)
    else:
        parts, x = [nn.Linear(2, 2), *middle, nn.Linear(2, 2)], torch.ones(2, 2)
    network = quantize_model(nn.Sequential(*parts), recipe, skip=()).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        network(x.requires_grad_()).sum().backward()


def compile_kernels(rehearse: Callable[[], object], no_bar: bool | None) -> None:
    """Compile, or load, the CPU's kernels that `rehearse` calls, none of which computes anything meanwhile."""
    if _is_numba():
        _compile_now(_rehearsed(rehearse), no_bar)


def _is_numba() -> bool:
    return backend_for("cpu").__name__ == MODULES["cpu"]


def _rehearsed(rehearse: Callable[[], object]) -> list[Version]:
    from luqrun.quant.kernels.cpu import driver

    with torch.random.fork_rng(devices=[]), driver.rehearsal() as versions:
        rehearse()
    return versions


def _compile_now(versions: Sequence[Version], no_bar: bool | None) -> None:
    from luqrun.quant.kernels.cpu import ahead

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
