"""What a library's unit has to show before it is used: that it is exact, for each kind of work, in this process.

Libraries choose among many kernels by shape, strides, threads and CPU. That one kind of work comes out right says
nothing about the next: oneDNN's and torch's integer units were both wrong for some shapes only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Proofs:
    """Whether a unit is exact for a kind of work, found out when that kind first comes up; afterwards one look-up.

    kind: a NamedTuple; it is made of what a call gives when that is new. trial(kind) -> whether the unit computed work
    of this kind exactly. A unit that fails (AttributeError, RuntimeError, TypeError) does not serve the kind either.
    `instead` completes the warning: what is done there.
    """

    def __init__(self, unit: str, kind: type[tuple], trial: Callable[[tuple], bool], instead: str):
        self.unit, self.kind, self.trial, self.instead = unit, kind, trial, instead
        self.verdicts: dict[tuple, bool] = {}
        self._lock = threading.Lock()

    def __call__(self, *parts: Hashable) -> bool:
        verdict = self.verdicts.get(parts)
        return self._try(self.kind(*parts)) if verdict is None else verdict

    def _try(self, kind: tuple) -> bool:
        with self._lock:  # threads that come to one kind at once try it, and warn of it, once
            if kind not in self.verdicts:
                why = "computes other numbers than exact arithmetic"
                try:
                    right = self.trial(kind)
                except (AttributeError, RuntimeError, TypeError) as error:
                    right, why = False, f"fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                if not right:
                    log.warning("%s %s for %s on this machine: %s", self.unit, why, kind, self.instead)
                self.verdicts[kind] = right
            return self.verdicts[kind]


def random_codes(*counts: int) -> tuple[Tensor, ...]:
    """Flat int8 of these lengths, -128..127 alike, the same in each process. Draws eight codes at once."""
    words = torch.empty(-(-sum(counts) // 8), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=torch.Generator("cpu").manual_seed(0))
    return words.view(torch.int8)[: sum(counts)].split(counts)
