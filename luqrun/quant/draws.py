"""Which random bits a layer's next forward takes: names of draws that advance by themselves, and copies told apart.

A layer's `streams` are int64 (3, 6), a row an operand (weight, activation, gradient), named as in
luqrun.quant.kernels.philox. A forward whose gradient is wanted takes the names and advances the micro-step of the next.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from luqrun.quant.kernels.philox import LAYER, make_stream
from luqrun.quant.recipe import OPERANDS

LARGEST_MODEL = 2**20  # layers; the names of copies of one layer lie that far apart


def first_streams(seed: int, index: int) -> Tensor:
    """The streams of a new layer, the index-th of its model; always real memory on the CPU."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.stack([make_stream(seed, layer=index, operand=number) for number in range(len(OPERANDS))])


class CopyGroup:
    """What the deep copies of a layer have in common.

    A copy of a whole model repeats the model's draws. Copies of a layer inside one model (nn.TransformerEncoder makes
    such) must not: `rename_copies` renames those that it finds.
    """

    def __init__(self, was_copied: bool = False):
        self.was_copied = was_copied

    def __deepcopy__(self, memo: dict) -> CopyGroup:
        self.was_copied = True
        return self

    def __reduce__(self):
        return CopyGroup, (self.was_copied,)


def rename_copies(layers: Iterable[nn.Module]) -> None:
    """Give each copy of a layer among a model's quantized `layers` draws of its own, by its place; the first keeps what
    it has."""
    taken: dict[CopyGroup, set[int]] = {}
    for layer in layers:
        if not layer.copies.was_copied:
            continue
        used, own = taken.setdefault(layer.copies, set()), int(layer.streams[0, LAYER])
        while own in used:
            own += LARGEST_MODEL
        used.add(own)
        if own != layer.streams[0, LAYER]:
            layer.streams[:, LAYER] = own
