"""What 4 bits cost the activations of a network, tensor by tensor, under one clip and under other ways to scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luqrun.quant.convert import quantized_layers
from luqrun.quant.quantizer import Quantizer

CLIPS = 64  # between zero and the maximum, of which the best is taken


class Errors(NamedTuple):
    """Of one tensor that layers read. layers: their names. peak: its maximum in standard deviations. The others are
    |quantized - x| / |x| (norms): with the recipe's quantizer; with nearest rounding of as many codes under the clip
    that has the least error, with a scale for each feature (the last dimension, or a channel of images), and with int8
    codes and the maximum for a scale."""

    layers: tuple[str, ...]
    peak: float
    recipe: float
    best_clip: float
    a_scale_a_feature: float
    int8: float


def activation_errors(model: nn.Module, forward: Callable[[], object]) -> list[Errors]:
    """The errors of each tensor that quantized layers of `model` read in forward(), in the order of the calls.

    Layers whose activation is not quantized in the forward pass are left out.
    """
    seen: list[tuple[Tensor, list[str], Quantizer]] = []

    def catch(name: str, quantizer: Quantizer) -> Callable:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if seen and seen[-1][0] is inputs[0]:
                seen[-1][1].append(name)
            else:
                seen.append((inputs[0], [name], quantizer))

        return hook

    handles = [
        layer.register_forward_pre_hook(catch(name, layer.recipe.fprop.activation))
        for name, layer in quantized_layers(model)
        if layer.recipe.fprop.activation is not None
    ]
    try:
        with torch.no_grad():
            forward()
            return [Errors(tuple(names), *_errors(x.detach().float(), quantizer)) for x, names, quantizer in seen]
    finally:
        for handle in handles:
            handle.remove()


def _errors(x: Tensor, quantizer: Quantizer) -> Iterator[float]:
    largest = x.abs().max()
    levels = quantizer.form.limit if (x < 0).any() else quantizer.form.unsigned_limit
    feature = 1 if x.dim() == 4 else -1
    others = [dimension for dimension in range(x.dim()) if dimension != feature % x.dim()]
    clips = largest * torch.arange(1, CLIPS + 1) / CLIPS
    yield (largest / x.std()).item()
    yield _relative(x, quantizer.quantize(x, seed=0).dequantize())
    yield min(_relative(x, _nearest(x, clip, levels)) for clip in clips)
    yield _relative(x, _nearest(x, x.abs().amax(others, keepdim=True), levels))
    yield _relative(x, _nearest(x, largest, 127))


def _nearest(x: Tensor, clip: Tensor, levels: int) -> Tensor:
    """x with `levels` steps between 0 and the clip."""
    scale = (clip / levels).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round().clamp(-levels, levels) * scale


def _relative(x: Tensor, quantized: Tensor) -> float:
    return ((quantized - x).norm() / x.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


def markdown(found: list[Errors]) -> str:
    """A row a tensor."""
    head = ("read by", "max / std", "the recipe", "best clip", "a scale a feature", "int8")
    rows = [head, ["---"] * len(head)]
    for each in found:
        more = f" and {len(each.layers) - 1} more" if each.layers[1:] else ""
        rows.append([each.layers[0] + more, f"{each.peak:.1f}", *(f"{value:.3f}" for value in each[2:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
