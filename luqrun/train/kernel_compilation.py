"""The kernels of this CPU, compiled before a run's first step would wait for them, or beside its first steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
    from luqrun.quant.kernels.cpu.ahead import Begun
    from luqrun.quant.kernels.cpu.driver import Version

log = logging.getLogger(__name__)

POLL = 0.05  # seconds between two looks at what is compiled elsewhere
EVERY = 5.0  # seconds between two lines about the progress, where there is no terminal
T = TypeVar("T")


class KernelCompilation:
    """A run's kernels, of which some may still be compiled, in other processes, while torch operations stand in for
    them: with the same bits, slowly.

    In its `with` the stand-in serves until all are there; `run` is for what may begin without them. check: is called
    now and then while it waits, and may raise. no_bar: as tqdm's `disable`.
    """

    def __init__(
        self,
        missing: Sequence[Version] = (),
        check: Callable[[], None] = lambda: None,
        no_bar: bool | None = True,
    ):
        self.missing, self.check, self.no_bar = missing, check, no_bar
        self.work: Begun | None = None
        self.tried, self.has_cores, self.started = False, False, time.monotonic()
        self.serving = ExitStack()

    @property
    def goes_on(self) -> bool:
        return self.work is not None

    def __enter__(self):
        if self.missing:
            from luqrun.quant.kernels.cpu import ahead

            self.work = ahead.begin(self.missing)
            if self.work is None:
                _compile_now(self.missing, self.no_bar)
                return self
            self.has_cores = ahead.cores() > ahead.PROCESSES
            shown = "meanwhile" if self.has_cores else "in the first step"
            log.info("compiling the kernels for this CPU, once; %s torch operations do the same, slowly", shown)
            self.stand_in = stand_in.StandIn(self.work.is_done)
            self.serving.enter_context(self.stand_in.serving())
        return self

    def __exit__(self, *failure) -> None:
        self._end()

    def run(self, model: nn.Module, function: Callable[..., T], *arguments) -> T:
        """function(*arguments), which trains or evaluates the model. Where it must not go on without the kernels, it is
        called once more, with the model's buffers as they were."""
        if not self.goes_on:
            return function(*arguments)
        # The first one shows that all goes well. More of them would cost those that compile more than they gain, unless
        # there are cores for both.
        if not self.tried or self.has_cores:
            self.tried = True
            before = [(buffer, buffer.clone()) for buffer in model.buffers()]
            try:
                with self.stand_in.giving_way():
                    return function(*arguments)
            except stand_in.GiveWay:
                forget()
                with torch.no_grad():
                    for buffer, value in before:
                        buffer.copy_(value)
        self._wait()
        return function(*arguments)

    def _wait(self) -> None:
        while not self.work.is_done():
            self.check()
            time.sleep(POLL)
        self._end()
        _compile_now(self.missing, self.no_bar)  # what was compiled elsewhere is loaded, what was not is compiled
        log.info("compiled in %.0f s: from here on kernels quantize", time.monotonic() - self.started)

    def _end(self) -> None:
        if self.work is not None:
            self.work.end()
            self.serving.close()
            self.work = None


def training_kernels(
    config: Config,
    model: nn.Module,
    recipe: Recipe,
    device: torch.device,
    no_bar: bool | None,
    check: Callable[[], None],
) -> KernelCompilation:
    """The CPU's kernels that training this quantized model takes: loaded, and else compiled, here and now where each
    step is compiled, measured or shared by processes. no_bar, check: see KernelCompilation."""
    layers = [layer for _, layer in quantized_layers(model)]
    if device.type != "cpu" or not layers or not _is_numba():
        return KernelCompilation()
    kinds = {type(module) for module in model.modules()}
    convolves = any(isinstance(layer, nn.Conv2d) for layer in layers)
    tiles = any(isinstance(layer, nn.Conv2d) and _suits_tiles(layer, config) for layer in layers)
    versions = _rehearsed(lambda: _train_tiny_network(recipe, convolves, kinds, tiles))
    if config.compile or config.tracking.profile_steps or process_group.world_size() > 1:
        _compile_now(versions, no_bar)
        return KernelCompilation()
    from luqrun.quant.kernels.cpu import ahead

    return KernelCompilation(ahead.missing(versions), check, no_bar)


def _suits_tiles(layer: nn.Conv2d, config: Config) -> bool:
    """Whether Winograd's tiles may serve a layer, if its images are a quarter as large as the data's: a guess."""
    from luqrun.quant.kernels.cpu import int8_winograd

    pixels = config.dataset.batch_size * (config.dataset.image_size // 4) ** 2
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return layer.groups == 1 and int8_winograd.suits(geometry, layer.in_channels, layer.out_channels, pixels)


def _train_tiny_network(recipe: Recipe, convolves: bool, kinds: set[type], tiles: bool) -> None:
    """A step of a network so small that only the kinds of its layers count. kinds: of modules of the real one; tiles:
    whether Winograd's may serve it."""
    middle = [nn.ReLU()] if kinds & {MaskedReLU, MaskedReLU6} else []
    if convolves:
        middle = [nn.BatchNorm2d(8), *middle] if FusedBatchNorm2d in kinds else middle
        if tiles:
            middle += [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)]
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
