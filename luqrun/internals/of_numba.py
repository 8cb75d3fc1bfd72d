"""What luqrun asks of numba through interfaces that it does not promise; test_of_numba.py probes each."""

from __future__ import annotations

import importlib

import numba
from numba.core import cgutils, event
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target

__all__ = ["DOT", "Dispatcher", "address_of", "cgutils", "compiled_for", "event", "is_there", "threading_layer"]
# LLVM's name of the instruction of AVX-512 VNNI: int32 (16,) + products of uint8 (16, 4) and int8 (16, 4), as int32.
DOT = "llvm.x86.avx512.vpdpbusd.512"
_POOLS = {"tbb": "numba.np.ufunc.tbbpool", "omp": "numba.np.ufunc.omppool", "workqueue": "numba.np.ufunc.workqueue"}


def compiled_for() -> tuple[str, str]:
    """The CPU's name and features under which numba's cache keeps what this process compiles. The first function that
    is decorated fixes the features, whatever numba.config says later."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name, features


def address_of(function: Dispatcher, signature: tuple) -> int:
    """Where C, or compiled code, finds a function of numbers, compiled now where it is not yet."""
    function.compile(signature)
    compiled = function.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)


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
