"""How compiled loops (numba) run on torch's threads and read torch's memory.

The loops take addresses (Tensor.data_ptr()) of dense memory and plain numbers: views and small tensors made on the
way would cost more than the work itself where layers are small.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import types
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, prange, typeof
from numba import types as nb
from numba.extending import intrinsic
from torch import Tensor

from luqrun.internals.of_numba import address_of, cgutils, event, threading_layer
from luqrun.quant import routes
from luqrun.quant.kernels.cpu import rows
from luqrun.quant.kernels.cpu.process import share_openmp
from luqrun.quant.kernels.cpu.rows import f32, row_loop
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.layout import dense

log = logging.getLogger(__name__)

INT8, INT16, FLOAT32, BF16 = 0, 1, 2, 3  # what the codes are stored as


# numba's own workqueue aborts when two Python threads enter it and sleeps between tasks: without a better layer, one
# thread. (Asked for before a kernel runs, as numba launches one layer a process.)
share_openmp()
THREADED = threading_layer() in ("omp", "tbb")

# Only the loops written as prange: any other array expression would be a round of waking threads of its own.
_ELSE_SERIAL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
_PARALLEL = {"prange": True, **dict.fromkeys(_ELSE_SERIAL, False)}
_home = os.getpid()  # OpenMP's threads do not survive a fork: a DataLoader's worker works alone


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
        self.integers = (nb.int64,) * function.__code__.co_argcount
        self.addresses = {}

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
        loop = self._loop()
        if _thread.rehearsed is not None:
            self._rehearse(loop, self.integers)
            return 0
        if loop is not self.serial:
            _use_threads(elements)
        if loop not in self.addresses:
            with event.install_listener("numba:compile", _Announcing(loop)):
                self.addresses[loop] = address_of(loop, self.integers)
        return self.addresses[loop]

    def _loop(self):
        alone = torch.get_num_threads() == 1 or os.getpid() != _home
        return self.serial if alone else self.parallel

    def _rehearse(self, loop, signature) -> None:
        _thread.rehearsed[loop] = Version(self, loop is not self.serial, signature)


class tasks(driver):
    """A loop over tasks on torch's threads: compiled is what one of them does, a function of (request, number).

    The request is the address of the integers that the loop is called with: see `integers`. `run` calls the function by
    its address. numba compiles all that a function calls once more with each caller, and in a parallel loop three
    times; so it is compiled once.
    """

    def __init__(self, function):
        super().__init__(function, threads=False)

    def __call__(self, count, elements, *numbers):
        """count: of tasks; elements: how many they have, which decides on threads; numbers: integers."""
        request = array("q", numbers)
        run(elements, count, self.address(), request.buffer_info()[0])


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
    torch.set_num_threads(threads)


class _Thread(threading.local):
    """Of each thread: the number of threads that it last told numba, which takes its time to hear it, and what it
    rehearses (by loop; see `rehearsal`)."""

    mask = 0
    rehearsed: dict | None = None


_thread = _Thread()


def threads_for(elements: int) -> int:
    """Threads that a loop over so many elements gets: torch's, where it has work for two."""
    if not THREADED or elements <= CHUNK or os.getpid() != _home:
        return 1
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


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


@intrinsic
def pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return nb.voidptr(address), codegen


def _move(bits, lanes, add=False):
    """An intrinsic that copies (or adds) a vector from address to address, aligned or not."""

    @intrinsic
    def move(typingctx, target, source):
        def codegen(context, builder, signature, args):
            vector = ir.VectorType(ir.IntType(bits), lanes).as_pointer()
            to, value = builder.inttoptr(args[0], vector), builder.load(builder.inttoptr(args[1], vector), align=1)
            builder.store(builder.add(builder.load(to, align=1), value) if add else value, to, align=1)
            return context.get_dummy_value()

        return nb.void(target, source), codegen

    return move


_copy32, _copy16, _copy8, copy_quad, _copy1 = (_move(8, lanes) for lanes in (32, 16, 8, 4, 1))
_add16, _add8, _add1 = (_move(32, lanes, add=True) for lanes in (16, 8, 1))


@row_loop()
def copy(target, source, count):
    """Copy so many bytes, few and no two alike: a vector loop would spend its time on entering. Zeros for source 0."""
    if source == 0:
        rows.clear(uint8s(target, count))
        return
    at = 0
    while at + 32 <= count:
        _copy32(target + at, source + at)
        at += 32
    if at + 16 <= count:
        _copy16(target + at, source + at)
        at += 16
    if at + 8 <= count:
        _copy8(target + at, source + at)
        at += 8
    while at < count:
        _copy1(target + at, source + at)
        at += 1


@row_loop()
def accumulate(target, source, count):
    """Add so many int32, few as in `copy`."""
    at = 0
    while at + 16 <= count:
        _add16(target + 4 * at, source + 4 * at)
        at += 16
    if at + 8 <= count:
        _add8(target + 4 * at, source + 4 * at)
        at += 8
    while at < count:
        _add1(target + 4 * at, source + 4 * at)
        at += 1


def loadable(x: Tensor) -> Tensor:
    """x as dense float32 or bf16, which the loops read."""
    x = dense(x.detach())
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


@row_loop()
def uint8s(address, count):
    return carray(pointer(address), (count,), np.uint8)


@row_loop()
def int8s(address, count):
    return carray(pointer(address), (count,), np.int8)


@row_loop()
def int16s(address, count):
    return carray(pointer(address), (count,), np.int16)


@row_loop()
def halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


@row_loop()
def int32s(address, count):
    return carray(pointer(address), (count,), np.int32)


@row_loop()
def uint32s(address, count):
    return carray(pointer(address), (count,), np.uint32)


@row_loop()
def set_float(address, value):
    carray(pointer(address), (1,), np.float32)[0] = f32(value)


@row_loop()
def floats(address, count):
    return carray(pointer(address), (count,), np.float32)


@row_loop()
def doubles(address, count):
    return carray(pointer(address), (count,), np.float64)


@row_loop()
def load(x, half, start, count, buffer):
    """The float32 bit patterns of `count` elements: of bf16, the upper halves."""
    if half:
        return rows.patterns(halves(x + 2 * start, count), buffer)
    return int32s(x + 4 * start, count)


@row_loop()
def store(codes, target, kind, start):
    """Codes (int32) as int8, int16, float32 or bf16."""
    count = codes.size
    if kind == INT8:
        rows.copy(codes, int8s(target + start, count))
    elif kind == INT16:
        rows.copy(codes, int16s(target + 2 * start, count))
    elif kind == FLOAT32:
        rows.copy(codes, floats(target + 4 * start, count))
    else:
        rows.to_bf16(codes, halves(target + 2 * start, count))


@row_loop()
def _split(codes, fields, first, form, split, scratch):
    count = codes.size
    if form[1]:
        rows.to_fields(codes, split[:count], scratch, form[3], form[0])
        rows.join(split[:count], uint8s(fields + first // 2, (count + 1) // 2))
    else:
        rows.to_fields(codes, uint8s(fields + first, count), scratch, form[3], form[0])


@row_loop()
def fields_row(codes, stored, fields, first, form, split, scratch):
    """The fields of a row of codes, which are at `stored` as what form[2] says: int8, or else in codes (int32)."""
    count = codes.size
    if form[2] != INT8:
        _split(codes, fields, first, form, split, scratch)
    elif form[0] == 4 and not form[3]:  # narrower codes would need masks of their own
        rows.join(uint8s(stored + first, count), uint8s(fields + first // 2, (count + 1) // 2))
    else:
        _split(int8s(stored + first, count), fields, first, form, split, scratch)
