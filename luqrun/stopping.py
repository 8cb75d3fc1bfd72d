"""Being asked to stop by Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 (before a cluster preempts): a run ends after its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """The process was asked to stop. Not an Exception: nothing between the loop and the command line may swallow it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number


class Requests:
    """The signals that came: raised at once, except inside `deferred`, where they wait for `check`."""

    def __init__(self):
        self.deferring, self.received = False, None

    def handle(self, number: int, frame: object) -> None:
        """Signal handler. Ctrl-C after another signal, or any one outside `deferred`, raises Stopped at once."""
        insisting = self.received is not None and number == signal.SIGINT
        # Before it preempts, a cluster may send SIGTERM beside the signal that submitit waits for: that one counts.
        if self.received in (None, signal.SIGTERM) or insisting:
            self.received = number
        if insisting or not self.deferring:
            raise Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal only leaves a note."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def insist(self) -> None:
        """Raise Stopped if a signal was deferred and nobody acted on it."""
        if self.received is not None:
            raise Stopped(self.received)

    def check(self) -> int | None:
        """The number of the signal that came inside `deferred`, or None."""
        return self.received if self.deferring else None


@contextmanager
def handled() -> Iterator[Requests]:
    """Handle the signals in this block, then give them back; other threads than the main one get none."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests.handle) for number in ASKING}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hand_on(number: int) -> bool:
    """Let whoever handled the signal before have it too; False where nobody did.

    submitit asks Slurm to run the job again and leaves the process, on every rank but the first it only returns.
    """
    handler = signal.getsignal(number)
    if not callable(handler) or handler is signal.default_int_handler:
        return False
    handler(number, None)
    return True
