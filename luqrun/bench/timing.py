"""Interleaved timing: contenders take turns, round after round, so that what disturbs one disturbs all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Contender:
    """run: what is timed. every: it takes part in each so-many-th round only, with one call, for slow ones."""

    name: str
    run: Callable[[], object]
    every: int = 1


@dataclass
class Timings:
    """rounds: by contender, seconds a call in each round, None where it sat out; left_out: by contender, why."""

    rounds: dict[str, list[float | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measured(self, name: str) -> list[float]:
        """The seconds of the rounds that `name` took part in."""
        return [seconds for seconds in self.rounds[name] if seconds is not None]

    def median(self, name: str) -> float:
        return statistics.median(self.measured(name))

    def minimum(self, name: str) -> float:
        return min(self.measured(name))

    def ratio(self, name: str, against: str) -> dict[str, float]:
        """median: of the ratios within each round that both took part in; min: of the shortest times."""
        pairs = zip(self.rounds[name], self.rounds[against], strict=True)
        ratios = [mine / other for mine, other in pairs if mine is not None and other is not None]
        return {"median": statistics.median(ratios), "min": self.minimum(name) / self.minimum(against)}

    def as_record(self) -> dict:
        """Medians and minima in seconds, and every round."""
        names = list(self.rounds)
        return {
            "median": {name: self.median(name) for name in names},
            "min": {name: self.minimum(name) for name in names},
            "rounds": self.rounds,
            "left_out": self.left_out,
        }


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    device: torch.device,
    *,
    calls: int = 1,
    settle: int = 0,
    warm_up: int = 2,
) -> Timings:
    """Time every contender once a round, each round starting with the next one.

    calls: how many calls in a row one time is of, their median, or on a GPU, where they overlap, their mean; settle:
    untimed calls before them, after which caches and allocator are as the contender itself leaves them; warm_up:
    untimed calls before the first round. A contender that does not fit into the GPU's memory is left out.
    """
    timings, taking_part = Timings(), []
    for contender in contenders:
        try:
            for _ in range(warm_up):
                contender.run()
            _wait(device)
        except torch.OutOfMemoryError:
            timings.left_out[contender.name] = "out of memory"
            torch.cuda.empty_cache()
            continue
        taking_part.append(contender)
        timings.rounds[contender.name] = [None] * rounds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % max(len(taking_part), 1)
            for contender in [*taking_part[first:], *taking_part[:first]]:
                if number % contender.every == 0:
                    counts = (calls, settle) if contender.every == 1 else (1, 0)
                    seconds = _time(contender.run, *counts, device)
                    timings.rounds[contender.name][number] = seconds
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return timings


def _time(run: Callable[[], object], calls: int, settle: int, device: torch.device) -> float:
    for _ in range(settle):
        run()
    if device.type != "cuda":
        return statistics.median(_stretch(run, 1, device) for _ in range(calls))
    return _stretch(run, calls, device) / calls


def _stretch(run: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
