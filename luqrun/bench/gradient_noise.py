"""How noisy, and how biased, the gradient of a training step is for its 4-bit gradients alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luqrun.quant.convert import quantize_model, quantized_layers, set_step
from luqrun.quant.recipe import Recipe


class Noise(NamedTuple):
    """Of the mean of some draws of the weights' gradients, all quantized layers together. distance: |mean - exact| /
    |exact| (norms); projection: <mean, exact> / |exact|^2, which is 1 where nothing is biased."""

    draws: int
    distance: float
    projection: float


def with_exact_gradients(recipe: Recipe) -> Recipe:
    """The recipe with gradients in high precision: the same forward pass."""
    dgrad, wgrad = (gemm._replace(gradient=None) for gemm in (recipe.dgrad, recipe.wgrad))
    return dataclasses.replace(recipe, dgrad=dgrad, wgrad=wgrad)


def gradient_noise(
    network: nn.Module, recipe: Recipe, loss: Callable[[nn.Module], Tensor], counts: Sequence[int], example=None
) -> list[Noise]:
    """The noise of the mean of `counts` (ascending) draws, each a forward and a backward pass of loss(model).

    network: not quantized; copies of it are. Dropout is the same in each pass.
    """
    exact_model = quantize_model(copy.deepcopy(network), with_exact_gradients(recipe), example=example).train()
    exact = _gradient(exact_model, loss, 0)
    model = quantize_model(copy.deepcopy(network), recipe, example=example).train()
    total, found = torch.zeros_like(exact), []
    for draw in range(max(counts)):
        total += _gradient(model, loss, draw)
        if draw + 1 in counts:
            mean = total / (draw + 1)
            distance = ((mean - exact).norm() / exact.norm()).item()
            found.append(Noise(draw + 1, distance, (mean @ exact / (exact @ exact)).item()))
    return found


def _gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor], step: int) -> Tensor:
    """float64 (n,): of the weights of all quantized layers, as drawn in this step."""
    torch.manual_seed(0)  # dropout
    set_step(model, step)
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    weights = [weight for _, layer in quantized_layers(model) for name, weight in layer.named_parameters(recurse=False)
               if name.endswith("weight")]  # fmt: skip
    return torch.cat([weight.grad.double().flatten() for weight in weights])


def markdown(found: Sequence[Noise]) -> str:
    """A row for each number of draws."""
    rows = ["| draws | distance | projection |", "|---|---|---|"]
    rows += [f"| {each.draws} | {each.distance:.3f} | {each.projection:.3f} |" for each in found]
    return "\n".join(rows) + "\n"
