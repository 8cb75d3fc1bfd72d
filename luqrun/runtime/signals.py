"""Being asked to stop by Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 (before a cluster preempts): a run ends after its step."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luqrun.runtime import process_group

# Where processes of one run got different ones, the last of these counts: SIGTERM alone queues no job again.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
BURST = 2.0  # seconds in which signals under torchrun count as one: it passes on what the terminal sent already
READING = 3.0  # seconds that a read may still take after a signal
READING_WITH_OTHERS = 15.0  # the same with several processes: the others' step ends with this one
PATIENCE = 5.0  # seconds that a process under torchrun may be deaf where another died
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Stopped(BaseException):
    """The process was asked to stop. Not an Exception: nothing between the loop and the command line may swallow it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number


class _Blocked(BaseException):
    """A read that did not end after a signal."""


class Requests:
    """The signals that came: raised at once, except inside `deferred`, where they wait for `check`."""

    def __init__(self, burst: float = 0.0):
        self.deferring, self.received, self.waiting = False, None, False
        self.burst, self.since = burst, 0.0

    def handle(self, number: int, frame: object) -> None:
        """Signal handler. Ctrl-C after another signal, or any one outside `deferred`, raises Stopped at once.

        What follows the first within `burst` seconds is its echo.
        """
        now = time.monotonic()
        if self.received is None:
            self.since = now
        elif now - self.since < self.burst:
            return
        insisting = self.received is not None and number == signal.SIGINT
        # Before it preempts, a cluster may send SIGTERM beside the signal that submitit waits for: that one counts.
        if self.received in (None, signal.SIGTERM) or insisting:
            self.received = number
        if insisting or not self.deferring:
            raise Stopped(number)
        if self.waiting:
            self._wake_later()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal only leaves a note."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    @contextmanager
    def reading(self, before_stopping: Callable[[], None]) -> Iterator[None]:
        """Around a wait for data, inside `deferred`. Where a signal came and the data do not in READING seconds, from a
        disk that is gone or a pipe without a writer, `before_stopping` is called and Stopped raised."""
        self.waiting = True
        try:
            yield
        except _Blocked:
            self.waiting = False
            before_stopping()
            raise Stopped(self.received) from None
        finally:
            self.waiting = False

    def _wake_later(self) -> None:
        """Interrupt the main thread if it then still waits. A system call goes on by itself after a signal."""
        main = threading.main_thread().ident
        seconds = READING if process_group.world_size() == 1 else READING_WITH_OTHERS
        timer = threading.Timer(seconds, lambda: self.waiting and signal.pthread_kill(main, signal.SIGALRM))
        timer.daemon = True
        timer.start()

    def wake(self, number: int, frame: object) -> None:
        """Handler of SIGALRM."""
        if self.waiting and self.received is not None:
            self.waiting = False
            raise _Blocked

    def raise_if_asked(self) -> None:
        """Raise Stopped if a signal was deferred and nobody acted on it."""
        if self.received is not None:
            raise Stopped(self.received)

    def check(self) -> int | None:
        """The number of the signal that came inside `deferred`, or None."""
        return self.received if self.deferring else None


@contextmanager
def handled() -> Iterator[Requests]:
    """Handle the signals in this block, then give them back; other threads than the main one get none."""
    requests = Requests(BURST if process_group.under_torchrun() else 0.0)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests.handle) for number in ASKING}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, requests.wake)
    try:
        if process_group.under_torchrun():
            with _exiting_when_stuck(requests):
                yield requests
        else:
            yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exiting_when_stuck(requests: Requests) -> Iterator[None]:
    """End the process where a signal came, Python could not handle it for PATIENCE seconds, and another process died.

    So it is inside a collective that never ends: torchrun would wait half a minute before it kills. With all the others
    alive it may be inside a long backward pass, and its step and checkpoint are waited for.
    """
    torchrun = os.getppid()
    with suppress(OSError, AttributeError):  # not Linux
        # Killed, or by a signal that it does not handle, torchrun would leave its processes training.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        with ours:
            while came := ours.recv(1):
                if came[0] in ASKING:
                    time.sleep(PATIENCE)
                    while requests.received is None:
                        if _children(torchrun) < process_group.local_world_size():
                            os._exit(128 + came[0])
                        time.sleep(0.5)

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # ends the thread


def _children(parent: int) -> int:
    """How many living processes it has started; 0 where there is no /proc to tell."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, started_by = path.read_bytes().rpartition(b")")[2].split()[:2]
            count += int(started_by) == parent and state not in (b"Z", b"X")
    return count


def call_earlier_handler(number: int) -> bool:
    """Let whoever handled the signal before have it too; False where nobody did.

    submitit asks Slurm to run the job again and leaves the process, on every rank but the first it only returns.
    """
    handler = signal.getsignal(number)
    if not callable(handler) or handler is signal.default_int_handler:
        return False
    handler(number, None)
    return True
