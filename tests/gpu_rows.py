"""Lines of a check that end in other ways than by themselves; a process of its own imports them from here."""

import os
import signal
import subprocess
import sys
import time

from luqrun.bench.gpu_check import Row


def crash(device, sizes, seconds):
    yield Row("before", "found")
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(device, sizes, seconds):
    yield Row("before", "found")
    raise ValueError(f"on {device.type}\nand more")


def hang(device, sizes, seconds):
    """Its row has the number of a process that it started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Row("started", str(child.pid))
    time.sleep(600)
