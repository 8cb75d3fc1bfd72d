"""Fixtures shared by the tests, and the order of the files."""

import fcntl
import gc
import hashlib
import os
import shutil

# Threads that wait must soon sleep, as in cli.py: tests share the cores with others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: a process a core is enough
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from shell import Shell

from luqrun.quant.kernels import own_process
from luqrun.quant.kernels.cpu import process

own_process()  # the kernels are those of the command line
process.claim()  # before a test's module loads one of them

# Before anything imports triton or torchvision: without a GPU, the Triton kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A process of pytest -n takes one file after the other: the longest come first, so that none is left over in the end.
LONGEST = (
    "train/test_distributed.py",
    "cli/test_command.py",
    "runs/test_kills.py",
    "runs/test_start.py",
    "quant/test_threads.py",
    "runs/test_twins.py",
    "cli/test_sweeps.py",
    "bench/test_contenders.py",
    "bench/test_run.py",
    "bench/test_gpu_check.py",
    "train/test_trainer.py",
    "train/test_tracking.py",
    "tasks/test_translation.py",
    "tasks/test_qa_task.py",
    "train/test_text_runs.py",
    "test_conf.py",
    "quant/test_gemms.py",
    "quant/test_kernels_cuda.py",
    "cli/test_overrides.py",
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    files = [item.path.relative_to(here).as_posix() for item in items]
    rank = {name: place for place, name in enumerate(LONGEST)}
    places = sorted(range(len(items)), key=lambda index: rank.get(files[index], len(LONGEST)))
    items[:] = [items[index] for index in places]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    gc.freeze()  # who collects garbage in a test need not look through all that was imported: half a second each time


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
def suite(tmp_path_factory):
    """A folder that all processes of pytest -n share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache(suite):
    """A folder for the generated glyphs of all runs, in place of the user's."""
    folder = suite / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def trained(suite):
    """trained(*overrides, path=None): the RunFolder of that run on tiny glyphs, which the suite trains once.

    Whoever changes it asks for a copy at `path`; whoever patches the trainer does so afterwards.
    """

    from running import RunFolder, train  # not above: they are Triton's, too

    def trained(*overrides, path=None) -> RunFolder:
        folder = suite / "trained" / hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one trains
            if not (folder / "run" / "summary.json").exists():
                train(folder / "run", *overrides)
        return RunFolder(shutil.copytree(folder / "run", path) if path else folder / "run")

    return trained


@pytest.fixture(scope="session")
def shell(cache):
    """Commands of `luqrun` as processes (tests/shell.py)."""
    shell = Shell(cache)
    yield shell
    shell.close()


@pytest.fixture
def by_operators(monkeypatch):
    """Layers call their operators one by one, and pack what they keep, as those of large tensors do."""
    from luqrun.quant.kernels.cpu import pass_kinds, sizes  # which loads numba

    monkeypatch.setattr(sizes, "FEW", 0)
    monkeypatch.setattr(pass_kinds, "MOST", 0)
