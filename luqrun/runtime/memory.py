"""What glibc's malloc does with memory that is freed: without imports that load torch, to be said before it does."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress

# Of malloc.h, with the largest values that make sense: blocks of up to 1 GiB come from the heap, its top is never given
# back, and it grows by 64 MiB.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for the next step; whether it will.

    glibc asks the system for each large tensor anew, which then clears every page of it: of a training step on
    pictures of 224 pixels half the time. Kept memory has holes: there a process takes up to 1.8 times as much. Nothing
    changes with another C library, or where the environment says what malloc is to do (MALLOC_..._, or glibc.malloc in
    GLIBC_TUNABLES).
    """
    chosen = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows
        return False
    taken = [mallopt(name, value) == 1 for name, value in KEPT.items()]  # all of them, whatever the first says
    return all(taken)


def give_back_memory() -> None:
    """Return memory that is free, but still the process', to the system: glibc keeps hundreds of megabytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
