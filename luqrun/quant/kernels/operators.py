"""How an operator of torch is registered, torch.ops.luqrun.*, and called past its dispatcher where nobody watches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from luqrun.internals.of_torch import PLAIN, has_modes, is_lazy, is_watched
from luqrun.quant.kernels import flops

LIBRARY = torch.library.Library("luqrun", "DEF")


def operator(schema: str):
    """Register the decorated class's `run` under `schema`, and its `fake` for tensors without data."""

    def register(cls):
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, cls.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"luqrun::{name}", cls.fake, lib=LIBRARY)
        registered = getattr(torch.ops.luqrun, name)

        @functools.wraps(cls.run)
        def call(*arguments):
            if torch.compiler.is_compiling():
                return registered(*arguments)
            # Called past torch's dispatcher, where nobody watches and nothing else is to be dispatched: 10 us less.
            if _thread.direct or (not is_watched() and are_plain(arguments)):
                return cls.run(*arguments)
            if has_modes():
                flops.register_formulas()
            return registered(*arguments)

        return call

    return register


class _Thread(threading.local):
    direct = False


_thread = _Thread()


class directly:
    """Within, what is computed from these tensors calls the operators past torch's dispatcher without another look, if
    they are plain ones and nobody watches. Not for a compiler."""

    def __init__(self, *tensors: Tensor):
        self.direct = not is_watched() and are_plain(tensors)

    def __enter__(self) -> None:
        self.before, _thread.direct = _thread.direct, self.direct

    def __exit__(self, *failure) -> None:
        _thread.direct = self.before


def is_direct() -> bool:
    """Whether this is within `directly`, where nobody looks at what requires a gradient."""
    return _thread.direct


_NO_TENSORS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.Size})


def are_plain(arguments: Sequence) -> bool:
    """Whether each argument, or each of a list, is a tensor whose memory holds its elements, or none at all."""
    for argument in arguments:
        kind = type(argument)
        if kind in PLAIN:
            if argument.is_meta or is_lazy(argument):
                return False
        elif kind not in _NO_TENSORS and (
            isinstance(argument, Tensor) or (isinstance(argument, list | tuple) and not are_plain(argument))
        ):
            return False
    return True
