"""How many floating-point operations torch.utils.flop_counter is to count for the integer GEMMs.

Two a multiplication and addition, as for torch's own. The counter's module takes half a second to load: it is told only
where somebody uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from luqrun.internals.of_torch import flop_counters


def _rows(shape: Sequence[int]) -> int:
    """Pixels of all images of a (N, C, H, W)."""
    return math.prod(shape) // max(shape[1], 1)


def _conv(a_shape, w_shape, *_, out_shape, **__) -> int:
    return 2 * _rows(out_shape) * math.prod(w_shape)


def _dgrad(g_shape, w_shape, *_, **__) -> int:
    return 2 * _rows(g_shape) * math.prod(w_shape)


def _wgrad(grads_shapes, a_shape, *_, out_shape, **__) -> int:
    return 2 * sum(map(_rows, grads_shapes)) * math.prod(out_shape)


def _linear(a_shape, w_shape, *_, **__) -> int:
    return 2 * math.prod(a_shape[:-1]) * math.prod(w_shape)


def _linear_wgrad(grads_shapes, a_shape, *_, **__) -> int:
    return 2 * sum(map(math.prod, grads_shapes)) * a_shape[-1]


FORMULAS = {
    **{"int8_conv": _conv, "int8_conv_dgrad": _dgrad, "int8_conv_wgrad": _wgrad},
    **{"int8_linear": _linear, "int8_linear_wgrad": _linear_wgrad},
}


def register_formulas() -> None:
    """Let counters that are there, and those to come, know the formulas."""
    for registry, register in flop_counters():
        for name, formula in FORMULAS.items():
            operator = getattr(torch.ops.luqrun, name)
            if operator not in registry:
                register(operator, formula)
