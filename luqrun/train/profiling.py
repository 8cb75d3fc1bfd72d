"""Where a step's time goes: torch.profiler's operators and GPU kernels by kind; and the runner's option for it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

log = logging.getLogger(__name__)

WARM_UP = 3  # steps that are not looked at: they compile, and fill caches
LEVEL = "KINETO_LOG_LEVEL"  # of torch.profiler's messages
DATA = "luqrun: data"  # the record_function around what makes the batches
OTHER = "other"

# kind: the names (of operators, autograd nodes, regions, GPU kernels) that are of it; the first that matches counts.
# What the compiler fused (triton_poi_..., triton_red_...) is never the GEMM, though it may be named after one.
KINDS = {
    "GEMM": r"^(?!triton_(poi|red|per)_|quantized).*(gemm|conv(?!ert)|(?<!co)mm(backward\d*)?(_out)?$|matmul"
    r"|linear(backward\d*)?$|int8_|attention|flash|nvjet|cutlass|xmma|triton_(tem|mm)_)",
    "quantize": r"luqrun::(quantize|encode)|^quantized",
    "statistics": r"luqrun::statistics",
    "unpack": r"luqrun::unpack",
    "normalisation": r"(batch|layer|group)_?norm",
    "ReLU": r"relu|threshold_backward",
    "optimizer": r"^optimizer\.|_foreach_|_fused_(sgd|adamw?)|multi_tensor_apply",
    "data": rf"^{DATA}$|dataloader",
}
_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in KINDS.items()}
_WHOLE = ("optimizer", "data")  # all that happens inside of one is part of it, whatever its name
_ENGINE = "autograd::engine::"  # named after a node, but what it does beside running the node is summing gradients


def kind_of(name: str) -> str | None:
    """The kind of an operator, region or kernel of this name; None where the name does not say."""
    if name.startswith(_ENGINE):
        return None
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), None)


def by_kind(profile: torch.profiler.profile) -> dict[str, float]:
    """Seconds by kind, of all kinds and "other", in a finished profile.

    Self times: on the CPU, or where the profile recorded kernels of a GPU, theirs. An operator whose name says nothing
    counts as part of the nearest one around it that does. What happens in Python between operators is in the
    self time of the region around it: put `record_function` around a step, and it is "other".
    """
    return _sum(profile.events())


def _sum(events: Iterable) -> dict[str, float]:
    seconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    on_gpu = any(_kernels(event) for event in events)
    kinds: dict[int, str] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # the kernels once more, as events of their own
        around = _kind_around(event, kinds)
        if not on_gpu:
            seconds[around] += event.self_cpu_time_total / 1e6
        for kernel in _kernels(event):
            own = None if around in _WHOLE else kind_of(kernel.name)
            seconds[own or around] += kernel.duration / 1e6
    return seconds


def _kernels(event) -> list:
    """The GPU kernels that this operator launched; a region is mirrored on the GPU under its own name."""
    return [kernel for kernel in event.kernels if kernel.name != event.name]


def _kind_around(event, known: dict[int, str]) -> str:
    """The kind of a CPU event: that of a data or optimizer region around it, its own name's, or its parent's."""
    if id(event) not in known:
        outer = OTHER if event.cpu_parent is None else _kind_around(event.cpu_parent, known)
        known[id(event)] = outer if outer in _WHOLE else kind_of(event.name) or outer
    return known[id(event)]


def kinds_table(contenders: Mapping[str, Mapping[str, float]], steps: int = 1) -> str:
    """Markdown: a row a kind, and for each contender (name: what `by_kind` returned) milliseconds a step and share.

    Kinds that took no time anywhere are left out.
    """
    lines = ["| kind | " + " | ".join(f"{name}, ms" for name in contenders) + " |"]
    lines.append("|---|" + "---:|" * len(contenders))
    totals = {name: sum(seconds.values()) for name, seconds in contenders.items()}
    for kind in (*KINDS, OTHER):
        if any(seconds[kind] for seconds in contenders.values()):
            cells = [
                f"{1e3 * seconds[kind] / steps:.2f} ({seconds[kind] / totals[name]:.0%})" if totals[name] else "-"
                for name, seconds in contenders.items()
            ]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| all | " + " | ".join(f"{1e3 * total / steps:.2f}" for total in totals.values()) + " |")
    return "\n".join(lines) + "\n"


class StepProfiler:
    """Profiles `steps` training steps of a run, after WARM_UP ones: profile/trace.json (for chrome://tracing or
    Perfetto) and profile/kinds.md in the run folder. Call `step` after each training step; steps 0 does nothing.

    left: the steps that the run has to go; where they are few, there is less of a warm-up, and one at least.
    """

    def __init__(self, folder: Path, steps: int, left: int, device: torch.device):
        self.folder, self.steps, self.done, self.profile = folder / "profile", steps, 0, None
        self.warm_up, self.wanted = max(1, min(WARM_UP, left - steps)), steps
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(torch.profiler.ProfilerActivity.CUDA)

    def step(self) -> None:
        """Count a step; start after the warm-up, and write when there were enough."""
        if self.done >= self.warm_up + self.steps or not self.steps:
            return
        self.done += 1
        if self.done == self.warm_up:
            self.profile = torch.profiler.profile(activities=self.activities)
            with _without_warnings_of_gpus(self.activities):
                self.profile.start()
        elif self.done == self.warm_up + self.steps:
            self._write()

    def close(self) -> None:
        """Write what there is of a profile that the run's end cut short; say so where there is none."""
        if self.profile is not None:
            self.steps = self.done - self.warm_up
            self._write()
        elif self.wanted and self.done <= self.warm_up:
            why = f"the run ended after {self.done} steps, and {self.warm_up} are a warm-up"
            log.warning("tracking.profile_steps=%d: nothing was profiled, as %s", self.wanted, why)

    def _write(self) -> None:
        self.profile.stop()
        profile, self.profile = self.profile, None
        if self.steps == 0:
            return self.close()
        self.folder.mkdir(exist_ok=True)
        table = kinds_table({f"{self.steps} steps": by_kind(profile)}, self.steps)
        (self.folder / "kinds.md").write_text(table)
        profile.export_chrome_trace(str(self.folder / "trace.json"))
        asked = f" (of {self.wanted} asked for: the run had no more)" if self.steps < self.wanted else ""
        log.info("profile of %d steps%s: %s", self.steps, asked, self.folder)


@contextmanager
def _without_warnings_of_gpus(activities: Sequence[torch.profiler.ProfilerActivity]) -> Iterator[None]:
    """Kineto, below torch.profiler, tells on the console that it finds no GPU, also where none is asked for. It reads
    the level of its messages when the first profile of a process starts."""
    if torch.profiler.ProfilerActivity.CUDA in activities or LEVEL in os.environ:
        yield
        return
    os.environ[LEVEL] = "6"  # beyond its errors (4) and its traces of start and stop (5)
    try:
        yield
    finally:
        del os.environ[LEVEL]
