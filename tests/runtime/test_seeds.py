"""Keys of what is random outside the quantizers."""

import numpy as np
import torch

from luqrun.runtime.seeds import DROPOUT, mix, seed_torch


def test_keys_differ():
    many = np.arange(100_000)
    keys = np.concatenate([mix(seed, use, epoch, many) for seed in (0, 1) for use in (1, 2) for epoch in (0, 1)])
    assert len(np.unique(keys)) == 800_000
    bits = np.unpackbits(keys.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / 800_000**0.5  # 5 sigma, 64 bits: false alarm once in 27,000


def test_seeds_steps_and_ranks_have_dropout_of_their_own():
    """In the 32 bits that torch's CPU generator takes of a seed."""
    seeds = [
        int(mix(seed, DROPOUT, step, rank)[0]) & 0xFFFFFFFF
        for seed in range(4)
        for step in range(50)
        for rank in range(4)
    ]
    assert len(set(seeds)) == len(seeds)


def test_seeding_torch_is_that_of_manual_seed():
    for key in (3, 2**63 + 5):
        seed_torch(torch.device("cpu"), key)
        found = torch.rand(5)
        torch.manual_seed(key & 0xFFFFFFFF)
        assert torch.equal(torch.rand(5), found)
