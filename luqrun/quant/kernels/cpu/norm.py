"""Batch norm's backward pass on the CPU, with the mask of a ReLU after it: torch's numbers, in fewer passes.

torch's own loop divides twice for each element, and a ReLU's backward pass before it reads and writes the gradient once
more. The loops here (`norm_loops`) are used for work on which they were seen to give torch's bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import norm_loops
from luqrun.quant.kernels.cpu.norm_loops import EIGHT
from luqrun.quant.kernels.cpu.proofs import Proofs
from luqrun.quant.kernels.cpu.rows import HAS_FMA
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.layout import is_channels_last

MOST_KINDS = 256  # that are tried: images whose sizes vary would each be one


class Kind(NamedTuple):
    """What decides in which order torch adds up."""

    images: int
    pixels: int
    channels: int
    threads: int


def suits(grad: Tensor, x: Tensor, weight: Tensor | None) -> bool:
    """Whether the loops give torch's gradients of a batch norm of x."""
    kinds = {grad.dtype, x.dtype, torch.float32 if weight is None else weight.dtype}
    laid_out = is_channels_last(x) and is_channels_last(grad) and x.shape[1] % EIGHT == 0
    if not (HAS_FMA and laid_out and kinds == {torch.float32} and x.numel() > 0):
        return False
    if routes.rehearses():
        return True
    kind = _kind(x)
    return (len(_proven.verdicts) < MOST_KINDS or kind in _proven.verdicts) and _proven(*kind)


def _kind(x: Tensor) -> Kind:
    return Kind(x.shape[0], x.shape[2] * x.shape[3], x.shape[1], torch.get_num_threads())


def _trial(kind: Kind) -> bool:
    """Whether the loops give torch's bits for random numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = kind.images, kind.channels, kind.pixels, 1
    x, grad = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        .to(memory_format=torch.channels_last)
        .normal_(generator=generator)
        for _ in range(2)
    )
    weight, mean, inverse = torch.empty(3, kind.channels, dtype=torch.float32, device="cpu").uniform_(
        generator=generator
    )
    found = gradients(grad, None, x, weight, mean, inverse)
    expected = reference.batch_norm_backward(grad, None, x, weight, mean, inverse, 0.0)
    return all(map(torch.equal, found, expected))


_proven = Proofs("the backward pass of batch norm in fewer passes", Kind, _trial, "torch's is used there, slower")


def gradients(
    grad: Tensor, mask: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.batch_norm_backward; of what `suits`."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    parts = min(torch.get_num_threads(), rows)  # each of them torch adds up for itself
    sums = torch.empty(parts, 2, channels, dtype=torch.float32, device="cpu")
    numbers = torch.empty(7, channels, dtype=torch.float32, device="cpu")
    numbers[0], numbers[3] = mean, inverse
    numbers[4] = 1 if weight is None else weight
    mask_pitch = 0 if mask is None else channels // EIGHT
    mask = torch.full((channels // EIGHT,), 255, dtype=torch.uint8, device="cpu") if mask is None else mask
    out = torch.empty_like(x)
    places = x.data_ptr(), grad.data_ptr(), mask.data_ptr()
    size = rows, channels
    norm_loops.norm_sums(parts, x.numel(), *size, parts, mask_pitch, *places, mean.data_ptr(), sums.data_ptr())
    norm_loops.norm_numbers(1, channels, *size, parts, sums.data_ptr(), numbers.data_ptr())
    tasks = -(-rows // max(1, CHUNK // channels))
    norm_loops.norm_gradient(tasks, x.numel(), *size, mask_pitch, *places, numbers.data_ptr(), out.data_ptr())
    return out, numbers[5].clone(), numbers[6].clone()
