"""How long OpenMP's waiting threads spin: to be said before torch is loaded, and so free of imports that load it."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let threads that wait spin for 20 us or so, unless the user chose otherwise.

    Without a limit they stall each other, by ten times and more, wherever cores are shared; asleep at once, they cost
    half the speed where they are not.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
