"""The kernels: one set of functions, `statistics` and `encode`, in several backends.

reference is plain torch and runs anywhere; cpu is numba. `backend_for` chooses by the tensor's device, once and
visibly: `describe` says what a run uses. LUQRUN_KERNELS=reference forces the oracle.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from luqrun.errors import UserError

BACKENDS = {"cpu": "cpu", "cuda": "reference"}


@functools.cache
def backend_for(device_type: str) -> ModuleType:
    """The module that serves tensors of this device type."""
    forced = os.environ.get("LUQRUN_KERNELS")
    if forced not in (None, "reference", "cpu"):
        raise UserError(f"LUQRUN_KERNELS={forced} is not known; allowed: reference, cpu")
    name = forced or BACKENDS.get(device_type, "reference")
    if name == "cpu" and device_type != "cpu":
        raise UserError(f"LUQRUN_KERNELS=cpu cannot serve tensors on {device_type}; unset it or use reference")
    return importlib.import_module(f"luqrun.kernels.{name}")


def describe(device_type: str) -> str:
    """One line for the log and run.json: which kernels serve this device type."""
    return backend_for(device_type).describe()
