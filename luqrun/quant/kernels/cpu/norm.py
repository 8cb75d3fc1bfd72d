"""Batch norm in training on the CPU, and backward with the mask of a ReLU after it: torch's numbers, in less time.

torch's own loops read and write the sums of each row of channels in memory and divide twice for each element, and a
ReLU's backward pass before them reads and writes the gradient once more. The loops here (`normalize_loops`,
`norm_loops`) are used for work on which they were seen to give torch's bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import driver, norm_loops
from luqrun.quant.kernels.cpu import normalize_loops as loops
from luqrun.quant.kernels.cpu.columns import EIGHT
from luqrun.quant.kernels.cpu.proofs import Proofs
from luqrun.quant.kernels.cpu.rows import HAS_FMA
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.operators import are_plain

# Channels by which the loops go; of bf16 torch rounds what is left over in another way.
STEPS = {torch.float32: EIGHT, torch.bfloat16: 16}
MOST_KINDS = 256  # that are tried: images whose sizes vary would each be one


class Kind(NamedTuple):
    """What decides in which order torch adds up."""

    images: int
    pixels: int
    channels: int
    dtype: torch.dtype
    threads: int


def suits(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the loops give torch's numbers of a batch norm of x. vectors: what else goes in of each channel."""
    if not (HAS_FMA and x.dtype in STEPS and is_channels_last(x) and are_plain((x, *vectors))):
        return False
    images, channels, height, width = x.shape
    if channels % STEPS[x.dtype]:
        return False
    for each in vectors:  # those with gaps torch takes in another way, too
        if each is not None and (each.dtype != torch.float32 or not each.is_contiguous()):
            return False
    if routes.rehearses():
        return True
    pixels, threads = height * width, torch.get_num_threads()
    if images * pixels <= threads or channels == 0:  # of few pixels torch adds up in another way
        return False
    kind = images, pixels, channels, x.dtype, threads
    verdict = _proven.verdicts.get(kind)
    if verdict is None:
        return len(_proven.verdicts) < MOST_KINDS and _proven(*kind)
    return verdict


def _trial(kind: Kind) -> bool:
    """Whether the loops give torch's bits for random numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = kind.images, kind.channels, kind.pixels, 1
    x, grad = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        .to(memory_format=torch.channels_last)
        .normal_(generator=generator)
        .to(kind.dtype)
        for _ in range(2)
    )
    given = torch.empty(4, kind.channels, dtype=torch.float32, device="cpu").uniform_(generator=generator).unbind()
    theirs = [each.clone() for each in given]
    found = normalized(x, *given, 0.1, 1e-5)
    right = all(map(torch.equal, (*found, *given), (*reference.batch_norm(x, *theirs, 0.1, 1e-5), *theirs)))
    backward = x, given[0], *found[1:]
    del found  # results one after the other: each is as large as the activation
    for each in (grad, x):  # of the second nothing is left but what was rounded
        expected = reference.batch_norm_backward(each, None, *backward, 0.0)
        right = right and all(map(torch.equal, gradients(each, None, *backward), expected))
        del expected
    return right


_proven = Proofs("batch norm in fewer passes", Kind, _trial, "torch's is used there, slower")


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.batch_norm; of what `suits`."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    out = torch.empty_like(x)
    mean = torch.empty(channels, dtype=torch.float32, device="cpu")
    inverse = torch.empty_like(mean)
    given = [0 if each is None else each.data_ptr() for each in (weight, bias, running_mean, running_var)]
    size = int(x.dtype == torch.bfloat16), rows, channels, torch.get_num_threads()
    found = mean.data_ptr(), inverse.data_ptr(), out.data_ptr()
    functions = driver.team(x.numel()), *(each.address() for each in (loops.channel_sums, loops.normalize))
    loops.batch_norm(*size, x.data_ptr(), *given[:2], (given[2], given[3]), *found, momentum, eps, functions)
    return out, mean, inverse


def gradients(
    grad: Tensor,
    mask: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.batch_norm_backward; of what `suits`, and grad in channels_last memory."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    out, of_weight, of_bias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    given = x, grad, mask, weight, mean, inverse, out, of_weight, of_bias, found
    places = [0 if each is None else each.data_ptr() for each in given]
    parts = min(torch.get_num_threads(), rows)  # each of them torch adds up for itself
    functions = driver.team(x.numel()), norm_loops.norm_sums.address(), norm_loops.norm_gradient.address()
    half = int(x.dtype == torch.bfloat16)
    norm_loops.batch_norm_backward(half, rows, channels, parts, *places, functions)
    return out, of_weight, of_bias
