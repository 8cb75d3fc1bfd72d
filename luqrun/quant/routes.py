"""Which of several exact ways a GEMM takes: the fastest on this machine, as its first call finds out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TRIES = 3
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_chosen: dict[Hashable, str] = {}  # of this process: a choice changes the time, never the numbers


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


def fastest(key: Hashable, routes: dict[str, Callable[[], Tensor]]) -> Tensor:
    """What the fastest of `routes` gives for this key, which says all that their time depends on.

    The first call takes each of them, and leaves those out whose result is not the first one's, bit for bit: that one
    must be exact whatever the data.
    """
    if _thread.rehearses:
        first, *_ = [route() for route in routes.values()]
        return first
    key = (key, torch.get_num_threads())
    name = _chosen.get(key)
    if name is not None:
        return routes[name]()
    exact, seconds, wrong = None, dict.fromkeys(routes, float("inf")), set()
    for _ in range(TRIES):
        for name, route in routes.items():
            started = time.perf_counter()
            result = route()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            if exact is None:
                exact = result
            elif not _same_bits(result, exact):
                wrong.add(name)
            del result  # the next one needs its memory
    for name in wrong:
        log.debug("%s is not exact for %s: it is not made so", name, key)
        del seconds[name]
    _chosen[key] = min(seconds, key=seconds.get)
    shown = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    log.debug("%s: %s of %s", key, _chosen[key], shown)
    return exact


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN for NaN too."""
    bits = _BITS.get(one.dtype)
    return torch.equal(one, other) if bits is None else torch.equal(one.view(bits), other.view(bits))
