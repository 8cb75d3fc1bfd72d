"""Keys of what is random outside the quantizers: order of the data, augmentation, dropout."""

from __future__ import annotations

import numpy as np
import torch

ORDER, AUGMENT, DROPOUT = 1, 2, 3  # what a key is for, its second word: they share no bits


def mix(*words) -> np.ndarray:
    """Mix integers, the last may be many, into uint64 keys: a chain of splitmix64 steps (Steele et al. 2014).

    Each step is a bijection, so that keys that differ in the last word alone are different.
    """
    *first, last = words
    key = 0
    for word in first:  # in Python's integers, which take a tenth of the time of an array of one
        key = _step(key ^ int(word) & _WORD, int)
    return _step(np.uint64(key) ^ np.atleast_1d(np.asarray(last)).astype(np.uint64), np.uint64)


_WORD = (1 << 64) - 1


def _step(key, kind: type):
    """splitmix64 of a key. kind: int, or np.uint64 of an array of keys."""
    key = (key + kind(0x9E3779B97F4A7C15)) & kind(_WORD)
    key = (key ^ key >> kind(30)) * kind(0xBF58476D1CE4E5B9) & kind(_WORD)
    key = (key ^ key >> kind(27)) * kind(0x94D049BB133111EB) & kind(_WORD)
    return key ^ key >> kind(31)


def seed_torch(device: torch.device, key: int) -> None:
    """Seed the generators of torch that a network on this device draws from, as torch.manual_seed does, with a key of
    `mix`; on a CPU its own alone, which takes a fiftieth of the time."""
    seed = int(key) & 0xFFFFFFFF  # the CPU's generator takes 32 bits
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
