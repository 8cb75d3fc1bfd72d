"""What keeps the command line quick and its log readable, where Hydra and others are not by themselves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from luqrun.internals.of_hydra import read_once

OURS = ("luqrun", "hydra")


def quieten_libraries(verbose: object) -> None:
    """hydra.verbose=true: luqrun's and Hydra's debugging messages, and not numba's 150,000 lines.

    hydra.verbose=[NAME, ...], which names loggers, stays as it is.
    """
    if verbose is True:
        logging.getLogger().setLevel(logging.INFO)
        for name in OURS:
            logging.getLogger(name).setLevel(logging.DEBUG)


@contextmanager
def quick_start() -> Iterator[None]:
    """In here Hydra starts sooner: without garbage collection, and reading each file once."""
    gc.disable()
    try:
        with read_once():
            yield
    finally:
        gc.enable()
