"""Keys of what is random outside the quantizers: order of the data, augmentation, dropout."""

from __future__ import annotations

import numpy as np
import torch

ORDER, AUGMENT, DROPOUT = 1, 2, 3  # what a key is for, its second word: they share no bits


def mix(*words) -> np.ndarray:
    """Mix integers, the last may be many, into uint64 keys: a chain of splitmix64 steps (Steele et al. 2014).

    Each step is a bijection, so that keys that differ in the last word alone are different.
    """
    key = np.zeros(1, np.uint64)
    for word in words:
        word = np.atleast_1d(np.asarray(word)).astype(np.uint64)
        key = (key ^ word) + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        key = key ^ key >> np.uint64(31)
    return key


def seed_torch(device: torch.device, key: int) -> None:
    """Seed the generators of torch that a network on this device draws from, as torch.manual_seed does, with a key of
    `mix`; on a CPU its own alone, which takes a fiftieth of the time."""
    seed = int(key) & 0xFFFFFFFF  # the CPU's generator takes 32 bits
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
