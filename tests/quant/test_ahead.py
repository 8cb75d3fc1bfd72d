"""Loops that are compiled before they are needed: which, where, and what happens to who waits."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
import torch

from luqrun.quant.kernels.cpu import ahead, driver

LOOPS = """
import numpy as np
from luqrun.quant.kernels.cpu.driver import driver
from luqrun.quant.kernels.cpu.memory import floats
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.cpu.rows import row_loop

@row_loop()
def twice(values):
    for j in range(values.size):
        values[j] *= 2

@driver
def double(elements, x):
    twice(floats(x, elements))

@driver
def nothing(elements):
    pass
"""


@pytest.fixture
def loops(tmp_path, monkeypatch, request):
    """A module of loops that no cache has, in a folder of its own."""
    name = f"loops_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(LOOPS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    # numba reads its settings anew now, and may not change this one in a process where it has had threads.
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(numba.config.NUMBA_NUM_THREADS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the versions without OpenMP, on any machine
    yield importlib.import_module(name)
    torch.set_num_threads(threads)
    sys.modules.pop(name)


def rehearsed(loops):
    with driver.rehearsal() as versions:
        loops.double(4, 0)  # the address of nothing: it must not run
        loops.double(8, 0)
        loops.nothing(4)
    return versions


def is_compiled(version) -> bool:
    return bool(version.loop.overloads)


@pytest.fixture
def children(monkeypatch):
    """The processes that were started to compile."""
    started, start = [], ahead._start

    def watched(versions):
        started.append(start(versions))
        return started[-1]

    monkeypatch.setattr(ahead, "_start", watched)
    return started


def test_a_rehearsal_names_each_loop_once_and_computes_nothing(loops):
    versions = rehearsed(loops)
    assert [version.driver.__name__ for version in versions] == ["double", "nothing"]
    assert not any(map(is_compiled, versions))
    assert {name.rpartition("_")[0] for name in ahead.parts(versions[0].loop)} == {"double", "twice", "floats"}


def test_other_processes_compile_once_and_this_one_loads(loops, children, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(ahead, "_compile_here", lambda versions, *rest: pytest.fail("here") if versions else None)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2")  # set too late for this process: the others are as it is
    versions, seen = rehearsed(loops), []
    ahead.compile_all(versions, lambda done, total: seen.append((done, total)))
    assert all(map(is_compiled, versions))
    assert [child.returncode for child in children] == [0, 0]
    assert (seen[0], seen[-1]) == ((0, 4), (4, 4))
    assert seen == sorted(seen)
    for version in versions:
        version.loop.overloads.clear()  # as in the next process, which finds them kept
    ahead.compile_all(versions, pytest.fail)
    assert all(map(is_compiled, versions))
    assert len(children) == 2


def test_who_is_asked_to_stop_ends_the_others_and_leaves(loops, children, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # one other

    class Asked(BaseException):
        pass

    def handle(number, frame):
        raise Asked

    def ask():
        while not children:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        threading.Thread(target=ask, daemon=True).start()
        with pytest.raises(Asked):
            ahead.compile_all(rehearsed(loops), lambda done, total: None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert children
    assert all(child.returncode == -signal.SIGKILL for child in children)


def test_others_compile_while_this_process_goes_on(loops, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    versions = rehearsed(loops)
    begun = ahead.begin(versions)
    try:
        assert ahead.begin(versions) is None  # another one is at it
        while not begun.is_done():
            time.sleep(0.05)
    finally:
        begun.end()
    assert not ahead.missing(versions)


def test_what_was_begun_can_be_ended(loops):
    versions = rehearsed(loops)
    begun = ahead.begin(versions)
    begun.end()
    assert begun.is_done()
    again = ahead.begin(versions)  # the lock is free
    again.end()
    assert again is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_meanwhile_holds_nothing_up(loops):
    """Such as a DataLoader's: it has all files open that this one has."""
    versions = rehearsed(loops)
    begun = ahead.begin(versions)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        while not begun.is_done():
            time.sleep(0.05)
        begun.end()
        again = ahead.begin(versions)
        assert again is not None
        again.end()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("how", ["killed", "failing", "not started"])
def test_where_others_cannot_compile_this_process_does(loops, children, monkeypatch, caplog, how):
    watched = ahead._start

    def start(versions):
        if how == "not started":
            raise OSError("no processes left")
        child = watched(versions)
        if how == "killed":
            child.kill()
        return child

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    if how == "failing":
        monkeypatch.setattr(loops.double, "__module__", "no_such_module")
    monkeypatch.setattr(ahead, "_start", start)
    versions = rehearsed(loops)
    ahead.compile_all(versions, lambda done, total: None)
    assert all(map(is_compiled, versions))
    why = {"killed": "SIGKILL", "failing": "no_such_module", "not started": "no processes left"}[how]
    assert why in caplog.text
    assert "in this process" in caplog.text


def test_without_a_cache_this_process_compiles(loops, children, monkeypatch):
    versions = rehearsed(loops)
    for version in versions:
        monkeypatch.setattr(version.loop, "_cache", numba.core.caching.NullCache())
    ahead.compile_all(versions, lambda done, total: None)
    assert all(map(is_compiled, versions))
    assert not children


def test_of_two_processes_one_compiles_and_the_other_waits(loops, children, caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    versions = rehearsed(loops)
    folder = versions[0].loop.stats.cache_path
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ahead.LOCK)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as other:
        other.stdout.readline()
        started = []

        def let_go():
            while "another process compiles" not in caplog.text:
                time.sleep(0.01)
            started.extend(children)
            other.stdin.close()

        threading.Thread(target=let_go, daemon=True).start()
        with caplog.at_level("INFO"):
            ahead.compile_all(versions, lambda done, total: None)
    assert not started  # nobody compiled before
    assert all(map(is_compiled, versions))
    assert caplog.text.count("another process compiles") == 1


def test_a_loop_that_is_compiled_when_first_called_says_so_once(loops, caplog):
    driver.announce.cache_clear()
    loops.nothing(4)
    loops.nothing(4)
    values = np.ones(4, "float32")
    loops.double(4, values.ctypes.data)
    assert values.tolist() == [2.0] * 4
    assert caplog.text.count("compiling the kernels for this CPU") == 1
