"""Memory that a process keeps: counted in page faults, which are what it costs to ask the system for it anew."""

import os
import platform
import subprocess
import sys

import pytest

import luqrun

PAGES = 8192  # of 4 KiB, in a block of 32 MiB
FAULTS = """
import ctypes, resource
from luqrun.runtime.memory import give_back_memory, keep_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        block = libc.malloc(4096 * %d)
        libc.memset(block, 1, 4096 * %d)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = %s and keep_memory()
faults(1)
later = faults(8)
give_back_memory()
print(int(kept), later, faults(1))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")


def measured(keep: bool, **environment) -> tuple[bool, int, int]:
    """Whether memory is kept, the page faults of eight blocks, and of one after the memory was given back."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    code = FAULTS % (PAGES, PAGES, keep)
    ran = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept, later, again = map(int, ran.stdout.split())
    return bool(kept), later, again


@glibc
def test_freed_memory_stays_until_it_is_given_back():
    without, with_it = measured(False), measured(True)
    assert without[0] is False
    assert with_it[0] is True
    assert with_it[1] < PAGES // 10
    assert without[1] > 10 * with_it[1] + PAGES // 100  # huge pages would make fewer than PAGES of each block
    assert with_it[2] > with_it[1]


@glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=262144"}],
    ids=str,
)
def test_what_the_user_has_chosen_stays(environment):
    assert measured(True, **environment)[0] is False


def test_another_c_library_is_left_alone(monkeypatch):
    def without_mallopt(name):
        return object()

    monkeypatch.setattr("ctypes.CDLL", without_mallopt)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    assert luqrun.keep_memory() is False
