"""How compiled loops (numba) run on torch's threads: on addresses (see `memory`) and plain numbers."""

from __future__ import annotations

import functools
import logging
import os
import threading
import types
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numba
import torch
from llvmlite import ir
from numba import prange, typeof
from numba import types as nb
from numba.extending import intrinsic

from luqrun.internals.of_numba import address_of, event, threading_layer
from luqrun.quant import routes
from luqrun.quant.kernels.cpu.process import keep_threads, share_openmp
from luqrun.quant.kernels.cpu.rows import row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK

log = logging.getLogger(__name__)

# numba's own workqueue aborts when two Python threads enter it and sleeps between tasks: without a better layer, one
# thread. (Asked for before a kernel runs, as numba launches one layer a process.)
share_openmp()
THREADED = threading_layer() in ("omp", "tbb")

# Only the loops written as prange: any other array expression would be a round of waking threads of its own.
_ELSE_SERIAL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
_PARALLEL = {"prange": True, **dict.fromkeys(_ELSE_SERIAL, False)}
_forked = False  # OpenMP's threads do not survive it: a DataLoader's worker works alone


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


class driver:
    """A compiled function that Python calls; the first argument says how many elements it has.

    threads: its loop over tasks runs on torch's threads. A process that was forked, as a DataLoader's worker, or has
    one thread, runs a version without OpenMP, compiled when first needed.
    """

    def __init__(self, function, threads=True):
        functools.update_wrapper(self, function)
        # A name of its own: numba's cache does not tell parallel code from serial code.
        twin = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_parallel")
        twin.__module__ = function.__module__
        self.serial = row_loop()(function)
        self.parallel = row_loop(parallel=_PARALLEL)(twin) if threads and THREADED else self.serial
        self.has_threads = self.parallel is not self.serial
        self.integers = (nb.int64,) * function.__code__.co_argcount
        self.addresses = {}
        self.alone = None  # the address of a loop without threads

    def __call__(self, elements, *rest):
        loop = self._loop()
        if _thread.rehearsed is not None:
            self._rehearse(loop, tuple(typeof(each) for each in (elements, *rest)))
            return
        if loop is not self.serial:
            _use_threads(elements)
        if loop.overloads:
            loop(elements, *rest)
        else:
            with event.install_listener("numba:compile", _Announcing(loop)):
                loop(elements, *rest)

    def address(self, elements=0) -> int:
        """Where compiled code finds it, whose arguments are integers and which returns nothing: see `call2`. elements:
        how many it will have. In a rehearsal 0."""
        if self.alone is not None and _thread.rehearsed is None:
            return self.alone
        loop = self._loop()
        if _thread.rehearsed is not None:
            self._rehearse(loop, self.integers)
            return 0
        if loop is not self.serial:
            _use_threads(elements)
        address = self.addresses.get(loop)
        if address is None:
            with event.install_listener("numba:compile", _Announcing(loop)):
                address = self.addresses[loop] = address_of(loop, self.integers)
            self.alone = None if self.has_threads else address
        return address

    def _loop(self):
        alone = not self.has_threads or _forked or torch.get_num_threads() == 1
        return self.serial if alone else self.parallel

    def _rehearse(self, loop, signature) -> None:
        _thread.rehearsed[loop] = Version(self, loop is not self.serial, signature)


class tasks(driver):
    """A loop over tasks on torch's threads: compiled is what one of them does, a function of (request, number).

    The request is the address of the integers that the loop is called with: see `integers`. `follow` calls the function
    by its address. numba compiles all that a function calls once more with each caller, and in a parallel loop three
    times; so it is compiled once.
    """

    def __init__(self, function):
        super().__init__(function, threads=False)

    def __call__(self, count, elements, *numbers):
        """count: of tasks; elements: how many they have, which decides on threads; numbers: integers."""
        in_turn((self, count, elements, numbers))


Loop = tuple[tasks, int, int, Sequence[int]]  # over tasks: what it would be called with


def in_turn(*loops: Loop) -> None:
    """Run loops over tasks, each when the one before is done, in one call of compiled code: what a call costs is more
    than the work where layers are small."""
    told = array("q")
    for loop in loops:
        told.extend(told_of(*loop))
    follow(len(loops), told.buffer_info()[0])


def told_of(loop: tasks, count: int, elements: int, numbers: Sequence[int]) -> tuple[int, ...]:
    """What `follow` is told of a loop."""
    threads = team(elements) if count > 1 else 0
    return threads, elements, count, loop.address(), len(numbers), *numbers


unthreaded = functools.partial(driver, threads=False)  # itself a task, or what starts them


def _use_threads(elements: int) -> None:
    _launch()
    threads = 1 if elements <= CHUNK else threads_for(elements)
    if _thread.mask != threads:
        numba.set_num_threads(threads)
        _thread.mask = threads


class Version(NamedTuple):
    """One of a driver's compiled loops: with or without threads, and numba's types of its arguments."""

    driver: driver
    parallel: bool
    signature: tuple

    @property
    def loop(self):
        """numba's dispatcher."""
        return self.driver.parallel if self.parallel else self.driver.serial


@contextmanager
def rehearsal() -> Iterator[list[Version]]:
    """In here no driver called by this thread computes anything; the list ends up with what would have run."""
    found: list[Version] = []
    before, _thread.rehearsed = _thread.rehearsed, {}
    try:
        with routes.rehearsal():
            yield found
    finally:
        found.extend(_thread.rehearsed.values())
        _thread.rehearsed = before


class _Announcing(event.Listener):
    """Says that a loop is being compiled, which was not to be had from numba's cache."""

    def __init__(self, loop):
        self.loop = loop

    def on_start(self, started):
        if started.data["dispatcher"] is self.loop:
            announce()

    def on_end(self, ended):
        pass


@functools.cache
def announce() -> None:
    """Say, once a process, that it waits for the compiler."""
    log.warning("compiling the kernels for this CPU, which takes half a minute or so, once on this machine")


@functools.cache
def _launch() -> None:
    """Let numba start its threads now: it sets OpenMP's number of threads, which is torch's too."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    keep_threads(threads)


class _Thread(threading.local):
    """Of each thread: the number of threads that it last told numba, which takes its time to hear it, and what it
    rehearses (by loop; see `rehearsal`)."""

    mask = 0
    rehearsed: dict | None = None


_thread = _Thread()


def threads_for(elements: int) -> int:
    """Threads that a loop over so many elements gets: torch's, where it has work for two."""
    if not THREADED or elements <= CHUNK or _forked:
        return 1
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def team(elements: int) -> int:
    """What `perform` is told: the address of `run`, whose threads share tasks of so many elements, or 0 for none."""
    alone = threads_for(elements) == 1 and _thread.rehearsed is None
    return 0 if alone else run.address(elements)


def _call(context, builder, signature, args):
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * (len(args) - 1)).as_pointer()
    builder.call(builder.inttoptr(args[0], kind), args[1:])
    return context.get_dummy_value()


@intrinsic
def call2(typingctx, function, a, b):
    """Call what is at an address with two integers."""
    return nb.void(*[nb.int64] * 3), _call


@intrinsic
def call4(typingctx, function, a, b, c, d):
    return nb.void(*[nb.int64] * 5), _call


@intrinsic
def call6(typingctx, function, a, b, c, d, e, f):
    return nb.void(*[nb.int64] * 7), _call


@intrinsic(prefer_literal=True)
def integers(typingctx, request, first, count):
    """int64 number `first` and up at the address `request`, so many, as a tuple. count: a literal."""
    if not isinstance(count, nb.IntegerLiteral):
        return None
    kind = nb.UniTuple(nb.int64, count.literal_value)

    def codegen(context, builder, signature, args):
        start = builder.gep(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), [args[1]])
        each = [builder.load(builder.gep(start, [ir.IntType(64)(at)])) for at in range(count.literal_value)]
        return context.make_tuple(builder, signature.return_type, each)

    return kind(nb.int64, nb.int64, count), codegen


@driver
def run(elements, tasks, function, request):
    """Call the function at an address with (request, number) for each number below tasks. elements: see driver."""
    for number in prange(tasks):
        call2(function, request, number)


@row_loop()
def perform(team, elements, tasks, function, request):
    """What `run` does, by a `team` or by this thread alone."""
    if team != 0:
        call4(team, elements, tasks, function, request)
    else:
        for number in range(tasks):
            call2(function, request, number)


@unthreaded
def follow(loops, address):
    """Run so many loops over tasks, told one after the other at an address: the team, elements, how many tasks, the
    function's address, how many numbers it is told, and these. See `told_of`."""
    for _ in range(loops):
        team, elements, tasks, function, numbers = integers(address, 0, 5)
        request = address + 5 * 8
        perform(team, elements, tasks, function, request)
        address = request + 8 * numbers
