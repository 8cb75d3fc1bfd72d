"""Philox4x32-10 (Salmon et al. 2011) in torch operations, and the layout of its counters.

Randomness has no state. A draw is named by a *stream*, an int64 tensor of shape (6,):
(seed, layer, operand, step, micro_step, rank), and by its sample number. The last field also says which GEMM a draw is
for, where it is that GEMM's own (`of_gemm`). One Philox call with the seed as key and the other fields as counter turns
the name into four words, and since Philox is a bijection of its counter, no two names of one seed share them. Two of
the words are the key, two the upper counter of the element's own call. Elements 4 g .. 4 g + 3 (in row-major order,
whatever the memory format) take the four words of counter g.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF

STREAM_FIELDS = ("seed", "layer", "operand", "step", "micro_step", "rank")
LAYER, OPERAND, STEP, MICRO_STEP, RANK = map(STREAM_FIELDS.index, STREAM_FIELDS[1:])
EVALUATION_STEP = 2**32 - 1
RANKS = 2**14  # processes, at most
GEMM_NUMBERS = {"fprop": 1, "dgrad": 2, "wgrad": 3}
SAMPLE_SLOTS = 2**16
SCALE_SAMPLES = 2**15  # from here on, samples name the draws of blocks' scales


def make_stream(seed: int = 0, layer: int = 0, operand: int = 0, step: int = 0, micro_step: int = 0, rank: int = 0):
    """The int64 tensor (6,) that names a draw. The seed is taken modulo 2^63."""
    return torch.tensor([seed % 2**63, layer, operand, step, micro_step, rank], dtype=torch.int64)


def of_gemm(stream: Tensor, gemm: str) -> Tensor:
    """The name of a GEMM's own draw, where it quantizes an operand in another way than the GEMM before it."""
    own = stream.clone()
    own[RANK] += RANKS * GEMM_NUMBERS[gemm]
    return own


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of random bits, int64 tensors with values below 2^32, for 4 counter words and 2 key words alike."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which keeps every bit; the mask undoes the sign extension.
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return c0, c1, c2, c3


def stream_words(stream: Tensor, sample: int) -> tuple[Tensor, ...]:
    """The four 0-dim words that stand for (stream, sample)."""
    assert 0 <= sample < SAMPLE_SLOTS
    seed, layer, operand, step, micro_step, rank = stream.unbind()
    counter = (layer * 4 + operand, step & MASK32, micro_step & MASK32, rank * SAMPLE_SLOTS + sample)
    return philox(counter, (seed & MASK32, seed >> 32))


def random_words(stream: Tensor, sample: int, numel: int) -> Tensor:
    """Random words of elements 0 .. numel - 1, int64 tensor (numel,) with values below 2^32."""
    k0, k1, c2, c3 = stream_words(stream, sample)
    group = torch.arange((numel + 3) // 4, dtype=torch.int64, device=stream.device)
    words = philox((group & MASK32, group >> 32, c2.expand_as(group), c3.expand_as(group)), (k0, k1))
    return torch.stack(words, dim=1).view(-1)[:numel]
