"""Torch operations in place of the CPU's kernels, with the same bits, while these are compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.kernels import blocks, reference, serving

LARGE = 1 << 22  # elements of a tensor that would take longer, and several times its memory, than the compiler may


class Ready(Exception):
    """The kernels are there: what was begun without them is to be begun anew, with them."""


class StandIn:
    """A backend of the reference's functions. Within `giving_way` a call raises Ready once `ready` is set, and one with
    a large tensor waits for that."""

    def __init__(self, ready: threading.Event):
        self.ready, self.gives_way = ready, False

    def __getattr__(self, name: str) -> Callable:
        function = getattr(reference, name, None) or getattr(blocks, name)

        def call(x, *rest):
            tensors = x if isinstance(x, list | tuple) else [x, *(each for each in rest if isinstance(each, Tensor))]
            if self.gives_way and any(each.numel() > LARGE for each in tensors):
                self.ready.wait()
            if self.gives_way and self.ready.is_set():
                raise Ready
            return function(x, *rest)

        return call

    @staticmethod
    def quantizes_blocks(how) -> bool:
        return True

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        self.gives_way = True
        try:
            yield
        finally:
            self.gives_way = False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within, it serves the CPU."""
        # What routes it takes must not decide which ones the kernels take.
        with serving("cpu", self), routes.rehearsal():
            yield
