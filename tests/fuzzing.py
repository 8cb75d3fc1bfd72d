"""For the property-based tests: how many examples, and how long one may take."""

import os
import signal
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

# LUQRUN_FUZZ=50 pytest tests/*/test_fuzz_*.py --hypothesis-show-statistics: fifty times as many, and others each time.
TIMES = int(os.environ.get("LUQRUN_FUZZ", "1"))


def examples(count: int):
    """Decorator: `count` examples of a test, the same in each run of the suite."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,  # machines are shared; `at_most` finds what hangs
        suppress_health_check=list(HealthCheck),
    )


class Hangs(BaseException):
    """Not an Exception: no handler in the code under test may take it for one of its own."""


@contextmanager
def at_most(seconds: float):
    """Raise Hangs where the block takes longer."""

    def ring(number, frame):
        raise Hangs(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
