"""Layers that read one tensor, as the projections of queries, keys and values do, quantize it once.

The last tensor is remembered while it lives, with what was made of it: whoever reads the same object next, unchanged
and in the same way, takes that. Which layers these are is seen by what they are given, not by their names.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Last(threading.local):  # replicas run in threads
    of: Callable[[], Tensor | None] = staticmethod(lambda: None)
    key: Hashable = None
    made: object = None

    def forget(self, reference: weakref.ref | None = None) -> None:
        if reference is None or reference is self.of:
            self.of, self.key, self.made = (lambda: None), None, None


_last = _Last()


def made_once(x: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """make(), which depends on the values of x and on `key` alone; or what it returned the last time, where that was
    for the same x and key and x has not changed since."""
    if torch.compiler.is_compiling() or x.is_inference():  # such a tensor does not count its changes
        return make()
    key = (x._version, key)
    if _last.of() is x and _last.key == key:
        return _last.made
    _last.forget()  # first: it may be large
    made = make()
    _last.of, _last.key, _last.made = weakref.ref(x, _last.forget), key, made
    return made
