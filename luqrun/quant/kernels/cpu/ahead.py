"""Compiling loops before they are needed, in processes that fill numba's cache.

The compiler works for up to two seconds at a time without a look at signals, and on one core. So this process only
waits: it shows how far the others are, and ends them where it is asked to stop. Or it goes on without (`begin`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import logging
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from luqrun.internals.of_numba import Dispatcher, compiled_for, event
from luqrun.quant.kernels.cpu.driver import Version

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what goes on elsewhere
LOCK = "luqrun.compiling.lock"
PROCESSES = 4  # that compile at once, at most: each loads torch, and what two need both compile
PR_SET_PDEATHSIG = 1  # of Linux' prctl
DONE = "compiled "  # how a compiling process begins the line that names a function
Progress = Callable[[int, int], None]  # how many functions are compiled, of how many


class _NotKept(Exception):
    """The cache does not have it."""


class _Refusing(event.Listener):
    def on_start(self, started):
        raise _NotKept

    def on_end(self, ended):
        pass


def missing(versions: Sequence[Version]) -> list[Version]:
    """Those that must be compiled. The others are loaded from numba's cache, unless they are already."""
    left = []
    for version in versions:
        try:
            with event.install_listener("numba:compile", _Refusing()):
                version.loop.compile(version.signature)
        except _NotKept:
            left.append(version)
    return left


def compile_all(versions: Sequence[Version], progress: Progress, first: bool = True) -> None:
    """Compile what is missing of these, or wait for another process that does.

    first: of several processes that begin at once, one is, which should be the one that compiles.
    """
    left = missing(versions)
    if not left:
        return
    folder = left[0].loop.stats.cache_path
    if folder is not None and sys.executable:
        with _locked(Path(folder), first):
            left = missing(left)
            if left and not _compile_elsewhere(left, progress):
                log.warning("compiling in this process instead")
            left = missing(left)
    _compile_here(left, progress)


@contextlib.contextmanager
def _locked(folder: Path, first: bool) -> Iterator[None]:
    """Hold the lock of those that compile for this cache, unless the file system has none."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / LOCK).open("w"))
        except OSError:
            file = None
        if not first:
            time.sleep(POLL)
        told = not first
        while file is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open, too
                break
            except BlockingIOError:
                if not told:
                    log.info("another process compiles the kernels for this CPU: waiting for it")
                told = True
                time.sleep(POLL)
            except OSError:
                break
        yield


def _compile_here(versions: Sequence[Version], progress: Progress) -> None:
    counter = _Counter(versions, progress)
    for version in versions:
        counter.add()
        _compile(version, counter.add)


def _compile_elsewhere(versions: Sequence[Version], progress: Progress) -> bool:
    """Whether other processes have compiled all of these."""
    counter, children = _Counter(versions, progress), []
    counter.add()
    try:
        for share in _shares(versions):
            children.append(_start(share))
        said = dict.fromkeys(children, b"")
        with selectors.DefaultSelector() as selector:
            for child in children:
                selector.register(child.stdout, selectors.EVENT_READ, child)
            while selector.get_map():
                for key, _ in selector.select(POLL):
                    child, text = key.data, os.read(key.fd, 1 << 16)
                    if not text:
                        selector.unregister(child.stdout)
                    *lines, rest = (said[child] + text).split(b"\n")
                    names = [line.decode().removeprefix(DONE) for line in lines if line.startswith(DONE.encode())]
                    counter.add(*names)
                    others = [line for line in lines if line and not line.startswith(DONE.encode())]
                    said[child] = b"\n".join([*others[-1:], rest])
        codes = [child.wait() for child in children]
    except OSError as error:  # no process can be started
        log.warning("the kernels cannot be compiled in another process: %s", error)
        return False
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    for child, code in zip(children, codes, strict=True):
        if code:
            last = said[child].decode(errors="replace").strip() or "no word"
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed: {last}"
            log.warning("a process that compiled the kernels %s", how)
    return not any(codes)


class Begun:
    """Other processes that compile while this one goes on: it need not read what they say, and what they could not
    compile is missing afterwards."""

    def __init__(self, children: list[subprocess.Popen], lock: TextIO | None):
        self.children, self.lock = children, lock

    def is_done(self) -> bool:
        return all(child.poll() is not None for child in self.children)

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        if self.lock is not None:
            with self.lock, contextlib.suppress(OSError):
                fcntl.flock(self.lock, fcntl.LOCK_UN)  # see _locked


def begin(versions: Sequence[Version]) -> Begun | None:
    """Begin to compile these elsewhere; None where that cannot be, or where another process is at it.

    To be called before this process forks others, which would hold what it shares with its children.
    """
    folder, lock, children = versions[0].loop.stats.cache_path, None, []
    if folder is None or not sys.executable:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = (Path(folder) / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        children.extend(_start(share, subprocess.DEVNULL) for share in _shares(versions))
    except OSError:  # locked, no such file system, or no process can be started
        Begun(children, lock).end()
        return None
    return Begun(children, lock)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(versions: Sequence[Version]) -> list[list[Version]]:
    """What each of the processes compiles, one for each core: about as many functions, those that only others call
    included."""
    names = {version: parts(version.loop) for version in versions}
    shares: list[tuple[list[Version], set[str]]] = [([], set()) for _ in range(min(cores(), len(versions), PROCESSES))]
    for version in sorted(versions, key=lambda version: len(names[version]), reverse=True):
        mine, found = min(shares, key=lambda share: len(share[1] | names[version]))
        mine.append(version)
        found |= names[version]
    return [mine for mine, _ in shares]


def _start(versions: Sequence[Version], stdout: int = subprocess.PIPE) -> subprocess.Popen:
    """A process that compiles these, in a group of its own: Ctrl-C is this one's to answer."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
    environment["NUMBA_CPU_NAME"], environment["NUMBA_CPU_FEATURES"] = compiled_for()
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", "from luqrun.quant.kernels.cpu import ahead; ahead.work()"],
        env=environment, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT, process_group=0,
    )  # fmt: skip
    wanted = [(each.driver.__module__, each.driver.__name__, each.parallel, each.signature) for each in versions]
    with contextlib.suppress(BrokenPipeError), child.stdin:  # its exit code tells
        pickle.dump((os.getpid(), wanted), child.stdin)
    return child


def work() -> None:
    """What a compiling process does: compile what stdin names, and say so line by line."""
    parent, wanted = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def tell(*names: str) -> None:
        print(*(f"{DONE}{name}" for name in names), sep="\n", flush=True)

    for module, name, parallel, signature in wanted:
        if os.getppid() != parent:  # nobody waits for it any more
            return
        version = Version(getattr(importlib.import_module(module), name), parallel, signature)
        _compile(version, tell)


def _compile(version: Version, tell: Callable[..., None]) -> None:
    """tell: is called with the names of functions as they are compiled."""
    with event.install_listener("numba:compile", _Telling(tell)):
        version.loop.compile(version.signature)
    tell(*parts(version.loop))  # some may have been in the cache


class _Telling(event.Listener):
    def __init__(self, tell: Callable[..., None]):
        self.tell = tell

    def on_start(self, started):
        pass

    def on_end(self, ended):
        self.tell(ended.data["dispatcher"].py_func.__qualname__)


class _Counter:
    """How many of the functions that these loops consist of are compiled."""

    def __init__(self, versions: Sequence[Version], progress: Progress):
        self.left = set().union(*(parts(version.loop) for version in versions))
        self.total, self.progress = len(self.left), progress

    def add(self, *names: str) -> None:
        self.left -= set(names)
        self.progress(self.total - len(self.left), self.total)


def parts(loop: Dispatcher) -> set[str]:
    """The names of the compiled functions that a loop calls, and its own."""
    found, ahead = {}, [loop]
    while ahead:
        function = ahead.pop()
        if function.py_func.__qualname__ in found:
            continue
        found[function.py_func.__qualname__] = function
        names, scope = function.py_func.__code__.co_names, function.py_func.__globals__
        values = [scope.get(name) for name in names]
        modules = [value for value in values if isinstance(value, types.ModuleType)]
        values += [getattr(module, name, None) for module in modules for name in names]
        ahead += [value for value in values if isinstance(value, Dispatcher) and value.targetoptions.get("nogil")]
    return set(found)
