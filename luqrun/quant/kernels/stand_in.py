"""Torch operations in place of the CPU's kernels, with the same bits, while these are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.kernels import MODULES, blocks, reference, serving

LARGE = 1 << 22  # elements of a tensor that would take longer, and several times its memory, than the compiler may


class GiveWay(BaseException):
    """What was begun without the kernels is to be begun anew, with them. No error: nothing may catch it on its way."""


class StandIn:
    """A backend of the reference's functions. Within `giving_way` a call raises GiveWay once `is_ready()`, and one with
    a large tensor does at once."""

    def __init__(self, is_ready: Callable[[], bool]):
        self.is_ready, self.gives_way = is_ready, False
        self.__name__ = MODULES["cpu"]  # whoever asks chooses as with the kernels

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(reference, name, None) or getattr(blocks, name)

        def call(*arguments, **keywords):
            if self.gives_way:
                tensors = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)]
                tensors += arguments[0] if isinstance(arguments[0], list | tuple) else []
                if self.is_ready() or any(each.numel() > LARGE for each in tensors):
                    raise GiveWay
            return function(*arguments, **keywords)

        return call

    @staticmethod
    def describe() -> str:
        return reference.describe()

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
