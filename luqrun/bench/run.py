"""Measure, and write benchmark.json, benchmark.md and the picture: the way through scripts/benchmark.py."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from luqrun.bench import picture, report
from luqrun.bench.sections import FULL, MODELS, QUICK, SECTIONS, Sizes
from luqrun.errors import UserError
from luqrun.internals.of_torch import allow_recompilations
from luqrun.quant import gemms
from luqrun.quant.function import code_dtype
from luqrun.quant.kernels import own_process
from luqrun.quant.kernels.cpu import int8_direct
from luqrun.runs.folder import now, provenance, write_atomically
from luqrun.runtime.devices import choose_device

RECORD, REPORT = "benchmark.json", "benchmark.md"
# What two runs must have in common for one to complete the other's record.
IDENTITY = ("machine", "versions", "git_commit", "git_dirty", "quick")


def run(
    out: Path,
    *,
    quick: bool = False,
    only: Sequence[str] = tuple(SECTIONS),
    device: str = "auto",
    models: Sequence[str] = (),
    sizes: Sizes | None = None,
    log: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict:
    """Run the sections `only` and return the record, which `out` holds as JSON and Markdown after every case.

    models: of the sections step and memory, all by default. sizes: instead of the usual or the quick ones. A record
    that is in `out` already keeps what this run does not measure again, if it is of the same machine, versions and
    commit, and nothing was changed since that commit. UserError for a network that is not measured on this device,
    and where `out` is no folder.
    """
    chosen = choose_device(device)
    elsewhere = [model for model in models if model not in MODELS[chosen.type]]
    if elsewhere:
        allowed = ", ".join(MODELS[chosen.type])
        raise UserError(f"models={','.join(elsewhere)}: not measured on {chosen.type}; allowed there: {allowed}")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # as the trainer does
    own_process()
    allow_recompilations(64)  # networks share their code
    record = _start(out / RECORD, describe(chosen, quick))
    for section in only:
        cases = SECTIONS[section](chosen, sizes or (QUICK if quick else FULL), tuple(models))
        started = time.perf_counter()
        for case, measured, ratios in cases:
            seconds = time.perf_counter() - started
            log(f"{section}, {case}: {seconds:.0f} s")
            add(record, section, case, {"date": now(), "seconds": round(seconds, 1), **measured}, ratios)
            _write(record, out)
            started = time.perf_counter()
    drawn = None
    if record["sections"].get("step"):
        try:
            paths = picture.draw(record, out)
            drawn = paths[0].name if paths else None
        except ModuleNotFoundError as error:
            log(f"no picture: {error} (pip install luqrun[plot])")
    _write(record, out, drawn)
    return record


def describe(device: torch.device, quick: bool) -> dict:
    """A record without measurements: the ratios come first, then on what and of what they are."""
    known = provenance()
    versions = dict(known["versions"])
    with suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()
        versions |= {"cuda": torch.version.cuda, "cudnn": cudnn, "driver": driver_version()}
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    codes = {key: code_dtype(torch.empty(0, device=device), True, dtype) for key, dtype in precisions.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LUQRUN_KERNELS")
    machine = {
        "device": device.type,
        "name": name,
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability() + (", AMX" if int8_direct.has_amx() else ""),
        "threads": torch.get_num_threads(),
        "kernels": gemms.describe(device.type),
        "codes": {key: [str(dtype).removeprefix("torch."), dtype.itemsize] for key, dtype in codes.items()},
        "environment": {key: os.environ[key] for key in settings if key in os.environ},
    }
    if device.type == "cuda":
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        machine["tf32"] = {"matmul": matmul, "cudnn": cudnn}
    commit = {key: known[key] for key in ("git_commit", "git_dirty")}
    return {
        "requirements": [], "ratios": [], "machine": machine, "versions": versions, **commit,
        "date": now(), "quick": quick, "sections": {},
    }  # fmt: skip


def cpu_name() -> str:
    """The model of the CPU, as Linux names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str:
    """The version of NVIDIA's driver, as its tool says; "unknown" without it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split()[0] if said.split() else "unknown"


def add(record: dict, section: str, case: str, measured: dict, ratios: Sequence[dict]) -> None:
    """Put a case into a record, in place of an earlier one."""
    record["sections"].setdefault(section, {})[case] = measured
    others = [r for r in record["ratios"] if (r["section"], r["case"]) != (section, case)]
    record["ratios"] = others + [{"section": section, "case": case, **ratio} for ratio in ratios]
    order = list(SECTIONS)
    record["ratios"].sort(key=lambda r: order.index(r["section"]))  # stable: cases stay as they came
    record["sections"] = {name: record["sections"][name] for name in order if name in record["sections"]}


def _start(path: Path, fresh: dict) -> dict:
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return fresh
    if fresh["git_dirty"] or any(earlier.get(key) != fresh[key] for key in IDENTITY):
        return fresh
    return {**fresh, "ratios": earlier["ratios"], "sections": earlier["sections"]}


def _write(record: dict, out: Path, drawn: str | None = None) -> None:
    record["requirements"] = report.requirements(record)
    write_atomically(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / REPORT, report.markdown(record, drawn).encode())
