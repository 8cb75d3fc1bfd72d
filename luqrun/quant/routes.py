"""Which of several exact ways a GEMM takes: the fastest on this machine, as its first call finds out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TRIES = 3
_chosen: dict[Hashable, str] = {}  # of this process: a choice changes the time, never the numbers


def fastest(key: Hashable, routes: dict[str, Callable[[], Tensor]]) -> Tensor:
    """What the fastest of `routes` gives for this key, which says all that their time depends on.

    The first call takes each of them, and leaves those out whose result is not the first one's, bit for bit: that one
    must be exact whatever the data.
    """
    key = (key, torch.get_num_threads())
    name = _chosen.get(key)
    if name is not None:
        return routes[name]()
    results, seconds = {}, dict.fromkeys(routes, float("inf"))
    for _ in range(TRIES):
        for name, route in routes.items():
            started = time.perf_counter()
            results[name] = route()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    exact = next(iter(routes))
    for name in routes:
        if not torch.equal(results[name], results[exact]):
            log.debug("%s is not exact for %s: it is made by %s", name, key, exact)
            del seconds[name]
    _chosen[key] = min(seconds, key=seconds.get)
    shown = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    log.debug("%s: %s of %s", key, _chosen[key], shown)
    return results[exact]
