"""A task's network and one of its training batches by their shapes alone: on the meta device, without data.

job=cost runs it. What follows from the data alone, such as the number of classes of a folder, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Outline:
    """network: in training mode, its weights without memory. inputs: the keywords of a training forward. example: what
    shows which layers are first and last (luqrun.quantize_model), or None. examples: of the batch; unit: what one is
    called. about: the shapes in words."""

    network: nn.Module
    inputs: dict[str, object]
    example: object | None
    examples: int
    unit: str
    about: str
