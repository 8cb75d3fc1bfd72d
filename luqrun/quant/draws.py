"""Which random bits a layer's next forward takes: names of draws that advance by themselves, and copies told apart.

A layer's `streams` are int64 (3, 6), a row an operand (weight, activation, gradient), named as in
luqrun.quant.kernels.philox. A forward whose gradient is wanted takes the names and advances the micro-step of the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luqrun.quant.kernels.philox import LAYER, make_stream
from luqrun.quant.recipe import OPERANDS

if TYPE_CHECKING:
    from luqrun.quant.layers import QuantLayer

LARGEST_MODEL = 2**20  # layers; the names of copies of one layer lie that far apart


def first_streams(seed: int, index: int) -> Tensor:
    """The streams of a new layer, the index-th of its model; always real memory on the CPU."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.stack([make_stream(seed, layer=index, operand=number) for number in range(len(OPERANDS))])


class Kin:
    """What the deep copies of a layer have in common.

    A copy of a whole model repeats the model's draws. Copies of a layer inside one model (nn.TransformerEncoder makes
    such) must not: `tell_apart` renames those that it finds.
    """

    def __init__(self, has_copies: bool = False):
        self.has_copies = has_copies

    def __deepcopy__(self, memo: dict) -> Kin:
        self.has_copies = True
        return self

    def __reduce__(self):
        return Kin, (self.has_copies,)


def tell_apart(layers: Iterable[QuantLayer]) -> None:
    """Give each copy of a layer among a model's quantized `layers` draws of its own, by its place; the first keeps what
    it has."""
    taken: dict[Kin, set[int]] = {}
    for layer in layers:
        if not layer.kin.has_copies:
            continue
        used, own = taken.setdefault(layer.kin, set()), int(layer.streams[0, LAYER])
        while own in used:
            own += LARGEST_MODEL
        used.add(own)
        if own != layer.streams[0, LAYER]:
            layer.streams[:, LAYER] = own
