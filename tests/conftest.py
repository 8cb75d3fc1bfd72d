"""Fixtures shared by the tests."""

import os

# Before anything imports triton or torchvision: the Triton kernels then run in its interpreter, without a GPU.
os.environ["TRITON_INTERPRET"] = "1"
# Threads that wait must sleep: torch's and numba's OpenMP pools, spinning for the same cores, cost 8 ms a call.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from statistics import NormalDist

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def z_limit():
    """z_limit(tests, alpha): the |z| that one of `tests` z-tests exceeds by chance with probability <= alpha.

    Bonferroni: alpha is the false-alarm rate of the whole family.
    """

    def limit(tests: int, alpha: float = 1e-4) -> float:
        return NormalDist().inv_cdf(1 - alpha / (2 * tests))

    return limit
