"""The kernels: one set of functions (see luqrun.quant.kernels.reference) in several backends.

reference is plain torch and runs anywhere; cpu is numba; cuda is Triton. `backend_for` chooses by the tensor's
device, once and visibly: `describe` says what a run uses. LUQRUN_KERNELS=reference forces the oracle, and
LUQRUN_KERNELS=mfbprop the oracle with a backward pass without multiplications.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from luqrun.errors import UserError
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format

log = logging.getLogger(__name__)

BACKENDS = {"cpu": "cpu", "cuda": "cuda"}  # by device; others have the reference
MODULES = {
    "reference": "luqrun.quant.kernels.reference",
    "mfbprop": "luqrun.quant.kernels.mfbprop",
    "cpu": "luqrun.quant.kernels.cpu.backend",
    "cuda": "luqrun.quant.kernels.cuda.backend",
}
ANYWHERE = ("reference", "mfbprop")  # torch operations


_own: list[bool] = []  # whether own_process was called


def own_process() -> None:
    """Say that this process is luqrun's own: the CPU's kernels may choose threads and CPU features for all of numba in
    it (cpu/process.py). It counts from the first kernel on."""
    _own.append(True)


_serving: dict[str, ModuleType] = {}  # by device type; a stand-in is no module, but has its functions
_fuses: dict[str, bool] = {}  # not functools.cache: torch.compile reads a dictionary, and cannot trace an import


def backend_for(device_type: str) -> ModuleType:
    """The module that serves tensors of this device type: see `choose_backend`."""
    if device_type not in _serving:
        _serving[device_type] = choose_backend(device_type)
    return _serving[device_type]


def choose_backend(device_type: str) -> ModuleType:
    """The module that is to serve tensors of this device type.

    UserError where LUQRUN_KERNELS names no backend or one for another device, or where triton is not installed.
    """
    forced = os.environ.get("LUQRUN_KERNELS")
    if forced is not None and forced not in MODULES:
        raise UserError(f"LUQRUN_KERNELS={forced} is not known; allowed: {', '.join(MODULES)}")
    name = forced or BACKENDS.get(device_type, "reference")
    interpreted = name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"  # then it runs on CPU tensors
    if name not in ANYWHERE and device_type != name and not interpreted:
        raise UserError(f"LUQRUN_KERNELS={name} cannot serve tensors on {device_type}; unset it or use reference")
    if forced is None and device_type not in BACKENDS and device_type != "meta":
        log.warning("there are no kernels for %s: torch operations quantize there, slowly", device_type)
    try:
        if name == "cpu" and _own:
            importlib.import_module("luqrun.quant.kernels.cpu.process").claim()
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise UserError(
            "the kernels for a GPU need triton, which is not installed: install it (pip install triton), "
            "or set LUQRUN_KERNELS=reference to run without, slowly"
        ) from None


def fuses(device_type: str) -> bool:
    """Whether this device's kernels have `quantize`, all of a quantization in one call."""
    if device_type not in _fuses:
        _fuses[device_type] = hasattr(backend_for(device_type), "quantize")
    return _fuses[device_type]


@contextmanager
def serving(device_type: str, backend: ModuleType) -> Iterator[None]:
    """Within, this backend serves a device type, whose own is kept for later. It has no `quantize`."""
    before = backend_for(device_type), fuses(device_type)
    _serving[device_type], _fuses[device_type] = backend, False
    try:
        yield
    finally:
        _serving[device_type], _fuses[device_type] = before


def has_kernels(form: Format, rounding: str = "nearest") -> bool:
    """Whether cpu and cuda have kernels for this format with one scale a tensor. Radix 4 and rounding in the logarithm
    are there to compare with: torch's operations do."""
    return form.radix == 2 and rounding != "stochastic_log"


def has_block_kernels(device_type: str, how: Encoding) -> bool:
    """Whether this device's kernels quantize in these blocks."""
    known = getattr(backend_for(device_type), "quantizes_blocks", None)
    return known is not None and known(how)


def block_kernels(device_type: str, how: Encoding) -> ModuleType:
    """The module that quantizes in blocks: the device's, or that of torch operations where it has no kernel."""
    return backend_for(device_type) if has_block_kernels(device_type, how) else _torch_blocks()


def rotation_kernels(device_type: str) -> ModuleType:
    """The module that rotates."""
    backend = backend_for(device_type)
    return backend if hasattr(backend, "hadamard") else _torch_blocks()


def _torch_blocks() -> ModuleType:
    return importlib.import_module("luqrun.quant.kernels.blocks")


def describe(device_type: str) -> str:
    """One line for the log and run.json: which kernels serve this device type."""
    return backend_for(device_type).describe()
