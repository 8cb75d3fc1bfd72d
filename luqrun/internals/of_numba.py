"""What luqrun asks of numba through interfaces that it does not promise; test_of_numba.py probes each."""

from __future__ import annotations

import importlib

import numba
from numba.core import cgutils, event
from numba.core.dispatcher import Dispatcher

__all__ = ["Dispatcher", "cgutils", "event", "is_there", "threading_layer"]
_POOLS = {"tbb": "numba.np.ufunc.tbbpool", "omp": "numba.np.ufunc.omppool", "workqueue": "numba.np.ufunc.workqueue"}


def is_there(layer: str) -> bool:
    """Whether numba can launch this threading layer: tbb, omp or workqueue."""
    try:
        importlib.import_module(_POOLS[layer])
    except ImportError:
        return False
    return True


def threading_layer() -> str | None:
    """The threading layer that numba has launched in this process, or would; None where the user asked for one by a
    property (safe, threadsafe, forksafe)."""
    try:
        return numba.threading_layer()
    except ValueError:  # none was launched yet
        pass
    if numba.config.THREADING_LAYER != "default":
        return numba.config.THREADING_LAYER if numba.config.THREADING_LAYER in _POOLS else None
    return next((layer for layer in numba.config.THREADING_LAYER_PRIORITY if is_there(layer)), None)
