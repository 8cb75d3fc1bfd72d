"""How far a part of a run is: a bar on a terminal, and elsewhere, as in Slurm's log or a pipe, a line now and then."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from luqrun.runs.metric import Metric

log = logging.getLogger(__name__)

EVERY = 60.0  # seconds between two lines


def describe(part: str, metrics: dict[str, float], metric: Metric) -> str:
    """Such as "val loss 0.123, top-1 45.67", of train or val; training need not have the task's metric."""
    shown = f"{part} loss {metrics[f'{part}/loss']:.3f}"
    value = metrics.get(f"{part}/{metric.short}")
    return shown if value is None or metric.short == "loss" else f"{shown}, {metric.title} {value:.2f}"


class Progress:
    """Counts up to `total`, from `done`. units: of what, in the plural. no_bar: as tqdm's `disable`: None is a bar on a
    terminal and lines elsewhere, True neither."""

    def __init__(
        self, title: str, total: int, units: str, no_bar: bool | None, done: int = 0, every: float = EVERY
    ) -> None:
        self.title, self.total, self.units, self.done, self.every = title, total, units, done, every
        self.bar = tqdm(total=total, initial=done, desc=title, unit=f" {units}", disable=no_bar, leave=False)
        self.says = no_bar is None and self.bar.disable
        self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure) -> None:
        self.bar.close()

    def update(self, number: int, shown: str = "", step: str = "") -> None:
        """`number` more are done. shown: what to say of them; step: what a line says beside."""
        self.done += number
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(number)
        if self.says and time.monotonic() - self.said >= self.every:
            counted = f"{self.done} of {self.total} {self.units}"
            log.info("%s: %s", self.title, ", ".join(part for part in (counted, step, shown) if part))
            self.said = time.monotonic()
