"""Which of several exact ways a GEMM takes: the fastest on this machine, as its first call finds out."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TRIES = 3
MOST_REFUSALS = 3  # of a way that is tried first
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_chosen: dict[Hashable, list[str]] = {}  # of this process, the fastest first: it changes the time, never the numbers
_refusals: Counter[Hashable] = Counter()

Route = Callable[[], Tensor | None]


class _Thread(threading.local):
    rehearses = False


_thread = _Thread()


@contextmanager
def rehearsal() -> Iterator[None]:
    """In here this thread takes every route and chooses none: what comes out means nothing."""
    before, _thread.rehearses = _thread.rehearses, True
    try:
        yield
    finally:
        _thread.rehearses = before


def rehearses() -> bool:
    """Whether this thread is in a rehearsal."""
    return _thread.rehearses


def size_class(shape: Sequence[int]) -> tuple[int, ...]:
    """What of images' (N, C, H, W) decides on the fastest way: by powers of two, but for the channels. Batches of text,
    and images of any size, would all be kinds of their own, each with a trial."""
    return tuple(size if axis == 1 else size.bit_length() for axis, size in enumerate(shape))


def fastest(key: Hashable, routes: dict[str, Route]) -> Tensor:
    """What the fastest of `routes` gives for this key, which says all else that their time depends on.

    The first call takes each of them, and leaves those out whose result is not the first one's, bit for bit: that one
    must be exact whatever the data. A way may give None for data that are not for it: then the next one serves, and
    after some times without asking it. The last takes all data.
    """
    if _thread.rehearses:
        first, *_ = [route() for route in routes.values()]
        return first
    key = (key, *routes, torch.get_num_threads())
    names = _chosen.get(key)
    if names is None:
        return _try(key, routes)
    for name in [*names]:
        result = routes[name]()
        if result is not None:
            return result
        _refusals[key, name] += 1
        if _refusals[key, name] == MOST_REFUSALS:
            log.debug("%s: %s is not asked any more, it refused %d times", key[0], name, MOST_REFUSALS)
            names.remove(name)
    raise AssertionError(f"{key}: all of {names} refused")


def chosen(key: Hashable, names: Sequence[str]) -> str | None:
    """The one of these routes that `fastest` takes first; None where it has not tried them."""
    found = _chosen.get((key, *names, torch.get_num_threads()))
    return found[0] if found else None


def _try(key: Hashable, routes: dict[str, Route]) -> Tensor:
    exact, seconds, left_out = None, dict.fromkeys(routes, float("inf")), set()
    for _ in range(TRIES):
        for name, route in routes.items():
            started = time.perf_counter()
            result = route()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            if exact is None and result is not None:
                exact = result
            elif result is None or not _same_bits(result, exact):
                left_out.add(name)
            del result  # the next one needs its memory
    for name in left_out:
        log.debug("%s refuses or is not exact for %s: it is not made so", name, key[0])
        del seconds[name]
    _chosen[key] = sorted(seconds, key=seconds.get)
    shown = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    log.debug("%s: %s of %s", key[0], _chosen[key][0], shown)
    return exact


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN for NaN too."""
    bits = _BITS.get(one.dtype)
    return torch.equal(one, other) if bits is None else torch.equal(one.view(bits), other.view(bits))
