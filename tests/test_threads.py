"""The kernels from several Python threads, beside torch's threads, in DataLoader workers and forked processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import thread_code


@pytest.fixture(scope="module")
def finished():
    """The scenarios that went well, and what the process said."""
    two = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, str(Path(thread_code.__file__))]
    process = subprocess.run(command, env={**os.environ, **two}, capture_output=True, text=True, timeout=400)
    return process.stdout.split(), f"exit code {process.returncode}\n{process.stderr}"


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in thread_code.SCENARIOS])
def test_scenario(name, finished):
    names, text = finished
    assert name in names, text
