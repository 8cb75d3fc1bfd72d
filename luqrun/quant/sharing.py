"""Layers that read one tensor, as the projections of queries, keys and values do, quantize it once.

The last tensor is remembered while it lives, with what was made of it: another layer that reads the same object next,
unchanged and in the same way, takes that. Which layers these are is seen by what they are given, not by their names.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

from luqrun.internals.of_torch import has_modes

T = TypeVar("T")


class _Made:
    """What was made of a tensor, and the layers that took it."""

    def __init__(self, x: Tensor, key: Hashable, value: object, reader: nn.Module):
        self.key, self.value, self.readers = key, value, weakref.WeakSet([reader])
        self.of = weakref.ref(x, self.forget)  # whichever thread the tensor dies in

    def forget(self, reference: weakref.ref | None = None) -> None:
        self.value, self.of = None, lambda: None

    def take(self, x: Tensor, key: Hashable, reader: nn.Module) -> bool:
        """Whether it is what this reader asks for. One that has taken it already is called anew, and x may have changed
        where torch does not see it (through NumPy, or x.data)."""
        fits = self.of() is x and self.key == key and reader not in self.readers
        if fits:
            self.readers.add(reader)
            _alone.update(dict.fromkeys(self.readers, False))
        return fits


class _Last(threading.local):  # replicas run in threads
    made: _Made | None = None


_last = _Last()
# By reader: false once another one took what it made, or it took another one's.
_alone: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def made_once(x: Tensor, key: Hashable, reader: nn.Module, make: Callable[[], T]) -> T:
    """make(), which depends on the values of x and on `key` alone; or what it returned the last time, where that was
    for the same x and key and another reader, a layer, and x has not changed since."""
    # An inference tensor does not count its changes; what watches operators (selective activation checkpointing) must
    # see the same ones when a forward is repeated.
    if torch.compiler.is_compiling() or x.is_inference() or has_modes():
        return make()
    key, made = (x._version, key), _last.made
    if made is not None and made.take(x, key, reader):
        return made.value
    _alone.setdefault(reader, True)
    forget()  # first: it may be large
    value = make()
    _last.made = _Made(x, key, value, reader)
    return value


def reads_alone(reader: nn.Module) -> bool:
    """Whether nobody was seen to read what this layer reads; false before its first `made_once`."""
    return _alone.get(reader, False)


def forget_others(x: Tensor) -> None:
    """Hold nothing of a tensor but x, which is quantized now by who makes nothing to be shared."""
    if _last.made is not None and _last.made.of() is not x:
        forget()


def forget() -> None:
    """Hold nothing any more: a backward pass begins, or another tensor is quantized."""
    if _last.made is not None:
        _last.made.forget()  # its weak reference refers to it
        _last.made = None
