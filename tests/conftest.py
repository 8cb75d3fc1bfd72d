"""Fixtures shared by the tests."""

import os

# Threads that wait must soon sleep, as in cli.py: tests share the cores with others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: a process a core is enough
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from statistics import NormalDist

import pytest
import torch
from shell import Shell

# Before anything imports triton or torchvision: without a GPU, the Triton kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for the generated glyphs of the runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def shell(cache):
    """Commands of `luqrun` as processes (tests/shell.py)."""
    shell = Shell(cache)
    yield shell
    shell.close()
