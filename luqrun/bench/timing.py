"""Interleaved timing: contenders take turns, round after round, so that what disturbs one disturbs all of them."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from luqrun.internals.of_torch import compiler_errors

log = logging.getLogger(__name__)

COMPILING = compiler_errors()


@dataclass(frozen=True)
class Contender:
    """run: what is timed. every: it takes part in each so-many-th round only, for slow ones."""

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

    def ratio(self, name: str, against: str) -> dict:
        """median and quartiles (a pair): of the ratios in the rounds that both took part in; min: of shortest times.

        One round alone is its own quartiles.
        """
        pairs = zip(self.rounds[name], self.rounds[against], strict=True)
        ratios = [mine / other for mine, other in pairs if mine is not None and other is not None]
        low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
        shortest = self.minimum(name) / self.minimum(against)
        return {"median": statistics.median(ratios), "quartiles": [low, high], "min": shortest}

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
    untimed calls before the first round. A contender that does not compile, or does not fit into the GPU's memory, is
    left out.
    """
    timings, taking_part, timed = Timings(), [], []
    for contender in contenders:
        why = left_out(lambda: _repeat(contender.run, warm_up, device))  # noqa: B023
        if why:
            timings.left_out[contender.name] = why
            continue
        taking_part.append(contender)
        timings.rounds[contender.name] = [None] * rounds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number, order in turns(taking_part, rounds):
            for contender in order:
                if number % contender.every or contender.name in timings.left_out:
                    continue
                why = left_out(lambda: timed.append(seconds(contender.run, calls, settle, device)))  # noqa: B023
                if why:
                    timings.left_out[contender.name] = why
                    del timings.rounds[contender.name]
                else:
                    timings.rounds[contender.name][number] = timed.pop()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return timings


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[tuple[int, list[Contender]]]:
    """The number of each round and whose turns it has, in their order: each round starts with the next one."""
    for number in range(rounds):
        first = number % max(len(contenders), 1)
        yield number, [*contenders[first:], *contenders[:first]]


def left_out(work: Callable[[], object]) -> str | None:
    """Do `work`; why it cannot be done here, where it does not compile or does not fit into the GPU's memory."""
    try:
        work()
        return None
    except torch.OutOfMemoryError:
        why = "out of memory"
    except COMPILING as error:  # its text names files of this machine: not for the record
        log.warning("%s", error)
        why = f"does not compile: {type(getattr(error, 'inner_exception', error)).__name__}"
    gc.collect()  # only now does no traceback hold what the work had allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return why


def _repeat(run: Callable[[], object], calls: int, device: torch.device) -> None:
    for _ in range(calls):
        run()
    wait(device)


def seconds(run: Callable[[], object], calls: int, settle: int, device: torch.device) -> float:
    """What a call takes after `settle` untimed ones: the median of `calls`, on a GPU their mean."""
    for _ in range(settle):
        run()
    if device.type != "cuda":
        return statistics.median(_stretch(run, 1, device) for _ in range(calls))
    return _stretch(run, calls, device) / calls


def _stretch(run: Callable[[], object], calls: int, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    _repeat(run, calls, device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
