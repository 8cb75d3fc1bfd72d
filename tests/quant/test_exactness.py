"""Each GEMM of random layers is that of int64 arithmetic, whatever the unit, and none writes outside its memory."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exactness import ROUTES, Tally, compare, draw
from fuzzing import TIMES

from luqrun.quant.gemms import ConvOp
from luqrun.quant.kernels.cpu import int8, int8_tiles

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "exactness.py"
# Since glibc 2.34 malloc's checks are in a library of their own.
DEBUG = "libc_malloc_debug.so.0"
OVERRUN = """
import ctypes
api = ctypes.pythonapi
api.PyMem_RawMalloc.restype, api.PyMem_RawFree.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = api.PyMem_RawMalloc(100)
ctypes.memset(memory, 1, 101)
api.PyMem_RawFree(memory)
"""


@pytest.mark.parametrize("seed", range(2))
def test_every_gemm_is_exact(seed):
    tally = Tally()
    for number in range(25 * TIMES):
        compare(draw(number, seed), tally)
    assert not tally.failures
    ours = {int8.BLOCKS, int8.WINOGRAD} if int8_tiles.is_there() else set()
    assert {unit for unit, _ in tally.shapes} >= {"patches", ROUTES[-1], *ours}


def test_what_is_drawn():
    cases = [draw(number) for number in range(400)]
    kinds = {case.kind for case in cases}
    assert kinds == {"linear", "1 x 1", "tall", "wide or square", "dilated", "grouped"}
    assert {case.signed for case in cases} == {True, False}
    convolutions = [case for case in cases if case.kind not in ("linear", "grouped")]
    kernels = {case.w[2:] for case in convolutions}
    assert {(2, 1), (3, 1), (7, 1), (3, 2), (3, 3), (1, 3)} <= kernels
    assert any(case.op.padding[0] != case.op.padding[1] for case in convolutions)
    assert any(case.op.stride > case.w[2:] for case in convolutions)
    assert any(1 in case.a for case in convolutions)
    assert draw(7) == draw(7)
    assert draw(7) != draw(7, seed=1)


def test_a_wrong_number_is_counted(monkeypatch):
    real = ConvOp.int8_dgrad
    monkeypatch.setattr(ConvOp, "int8_dgrad", lambda *how: real(*how).add_(1))
    tally = Tally()
    case = next(draw(number) for number in range(100) if draw(number).kind == "tall")
    compare(case, tally)
    assert len(tally.failures) == 3
    assert all(failure.startswith("dgrad by") for failure in tally.failures)
    assert sum(tally.wrong.values()) == 3
    assert all(f"| {tally.gemms[key]} | {count} |\n" in tally.table() for key, count in tally.wrong.items())


def checking(command: list[str]) -> subprocess.CompletedProcess:
    """The command with malloc's checks; memory is filled when it is taken and when it is freed."""
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "MALLOC_CHECK_": "3"}
    try:
        ctypes.CDLL(DEBUG)
        environment["LD_PRELOAD"] = DEBUG
    except OSError:
        pass  # glibc before 2.34 checks by itself
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_no_memory_is_written_outside_its_bounds():
    done = checking([sys.executable, str(SCRIPT), "--cases", str(15 * TIMES), "--seed", "11"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random layers, seed 11" in done.stdout
    assert checking([sys.executable, "-c", OVERRUN]).returncode < 0  # or nothing was checked
