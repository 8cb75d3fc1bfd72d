"""What quantizing leaves of the process that it runs in, and what the command line chooses for its own."""

import json
import os
import subprocess
import sys

import numba
import pytest
from llvmlite import binding

from luqrun.quant.kernels.cpu import process

USE = """
import json, logging, os, signal, sys, warnings
import numba, torch
def state():
    config = {key: repr(value) for key, value in vars(numba.config).items() if key.isupper()}
    handlers = {str(number): repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [logging.root.level, repr(logging.root.handlers)]
    return [config, handlers, loggers, torch.get_num_threads(), torch.get_rng_state().sum().item(), len(os.environ)]
before = state()
import luqrun
from torch import nn
recipe = luqrun.recipe("luq")
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
torch.manual_seed(0)
told, tell = [], torch.set_num_threads
torch.set_num_threads = lambda threads: (told.append(threads), tell(threads))
before = state()
luqrun.quantize_model(model, recipe, skip=())
model(torch.ones(4, 8)).sum().backward()
print(json.dumps([before, state(), told]))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_training_step_changes_nothing_of_numba_signals_logging_threads_and_seeds(threads):
    """threads: torch's. numba has three."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True, env=environment)
    before, after, told = json.loads(done.stdout)
    assert before == after
    # It would change MKL for good, and with it what attention costs; of another OpenMP there is no other way.
    assert told == [] or not process.share_openmp()


@pytest.fixture
def settings(monkeypatch):
    """numba's as in a fresh process on a CPU with AVX-512."""
    monkeypatch.setattr(numba.config, "THREADING_LAYER", "default")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setattr(numba.config, "ENABLE_AVX", True)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: binding.FeatureMap({"avx2": True, "avx512f": True}))
    return numba.config


def test_a_process_of_its_own_gets_openmp_and_wide_registers(settings, monkeypatch):
    monkeypatch.setattr(process, "is_there", lambda layer: True)
    process.claim()
    assert settings.THREADING_LAYER == "omp"
    assert settings.CPU_FEATURES.split(",") == ["+avx2", "+avx512f", "-prefer-256-bit"]


def test_what_the_user_chose_stays(settings, monkeypatch):
    monkeypatch.setattr(settings, "THREADING_LAYER", "tbb")
    monkeypatch.setattr(settings, "CPU_FEATURES", "+avx2")
    process.claim()
    assert (settings.THREADING_LAYER, settings.CPU_FEATURES) == ("tbb", "+avx2")


def test_without_openmp_and_avx512_nothing_is_chosen(settings, monkeypatch):
    monkeypatch.setattr(process, "is_there", lambda layer: False)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: binding.FeatureMap({"avx2": True}))
    process.claim()
    assert (settings.THREADING_LAYER, settings.CPU_FEATURES) == ("default", None)
