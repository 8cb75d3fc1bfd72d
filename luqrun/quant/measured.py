"""Statistics of a tensor that were found where it was made: its quantizer then needs no pass of its own for them.

Who makes a tensor cannot know who will read it. So the reader says what it would have liked to know, and whoever made
the tensor finds that out the next time, on the way. Only the last tensor is remembered, while it lives.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

from luqrun.internals.of_torch import has_modes
from luqrun.quant import routes


class Wish:
    """What the reader of a module's results, or of its gradients, asked for the last time: nothing (None), or their
    statistics, with their moments or without."""

    moments: bool | None = None

    def begin(self, x: Tensor, can_do_moments: bool = True) -> tuple[Tensor, bool] | None:
        """Where the statistics of what is made of x now go, and whether with moments; None where nobody asked, or they
        cannot be found on the way: on a GPU nothing is. The wish is gone with it, unless the reader asks again."""
        moments, self.moments = self.moments, None
        if routes.rehearses():
            moments = can_do_moments
        if moments is None or not x.is_cpu or (moments and not can_do_moments):
            return None
        return torch.zeros(4, dtype=torch.float64, device="cpu"), moments


class _Made:
    """A tensor that was made, the wish of its maker, and what that found."""

    def __init__(self, x: Tensor, wish: Wish, found: tuple[Tensor, bool] | None):
        self.of, self.version, self.wish, self.found = weakref.ref(x), x._version, wish, found


class _Last(threading.local):
    made: _Made | None = None


_last = _Last()
_wishes: weakref.WeakKeyDictionary[nn.Module, Wish] = weakref.WeakKeyDictionary()


def wish_of(module: nn.Module) -> Wish:
    """That for what a module makes: its results or its gradients. It lives as long as the module."""
    wish = _wishes.get(module)
    if wish is None:
        wish = _wishes[module] = Wish()
    return wish


def remember(x: Tensor, wish: Wish, found: tuple[Tensor, bool] | None) -> None:
    """x was just made, as it is now. found: what `wish.begin` gave, filled."""
    if not x.is_inference():  # which does not count its changes
        _last.made = _Made(x, wish, found)


def statistics_of(x: Tensor, moments: bool) -> Tensor | None:
    """The statistics of x (see ops.statistics) that were found as it was made, if it has not changed since; None where
    they were not. Then they will be the next time."""
    if torch.compiler.is_compiling():
        return None
    made = _last.made
    if made is None or made.of() is not x or made.version != x._version or has_modes():
        return None
    _last.made, made.wish.moments = None, moments
    if made.found is None or (moments and not made.found[1]):
        return None
    return made.found[0]
