"""The kernels from several Python threads, beside torch's threads, in DataLoader workers and forked processes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import thread_code

TWO_THREADS = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
LIMIT = 900  # seconds, of which compiling takes some


def run(folder, *arguments):
    """Run Python with two threads; what it printed, and all that is to be known where that is wrong.

    Output goes to files, and what is left over in the end is killed: children of a hanging process hold its pipes.
    """
    out, err = folder / "out", folder / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        environment = {**os.environ, **TWO_THREADS}
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        code = f"none after {LIMIT} seconds"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return out.read_text().split(), f"exit code {code}\n{err.read_text()}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The scenarios that went well, and what the process said."""
    return run(tmp_path_factory.mktemp("threads"), thread_code.__file__)


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in thread_code.SCENARIOS])
def test_scenario(name, finished):
    names, text = finished
    assert name in names, text


FIRST_IN_A_WORKER = """
import sys, torch
from torch.utils.data import DataLoader, Dataset

class Quantized(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        from luqrun.quant.kernels.cpu import backend
        return backend.statistics(torch.ones(300_000) * index, True)

(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).exp()  # the threads of torch are there, the kernels are not
for found in DataLoader(Quantized(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60):
    print(int(found[2]))
assert "numba" not in sys.modules
"""


def test_kernels_that_are_first_used_in_a_worker(tmp_path):
    numbers, text = run(tmp_path, "-c", FIRST_IN_A_WORKER)
    assert numbers == ["0", "300000", "600000", "900000"], text
