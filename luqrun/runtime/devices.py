"""Which device a run is on, and how much of its memory it took."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from luqrun.errors import UserError
from luqrun.runtime import process_group
from luqrun.runtime.memory import give_back_memory


def choose_device(name: str) -> torch.device:
    """The device for `device=auto|cpu|cuda`; UserError for cuda without a GPU. Of several processes, each takes one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU; allowed here: auto, cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or process_group.world_size() == 1:
        return torch.device(name)
    if process_group.local_rank() >= torch.cuda.device_count():
        raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine")
    torch.cuda.set_device(process_group.local_rank())
    return torch.device("cuda", process_group.local_rank())


def to_device(batch, device: torch.device):
    """A tensor, or a tuple, list or dict of such, copied to the device; pinned memory is not waited for."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(part, device) for name, part in batch.items()}
    assert isinstance(batch, tuple | list)
    parts = [to_device(part, device) for part in batch]
    return tuple(parts) if isinstance(batch, tuple) else parts


def reset_peak_memory(device: torch.device) -> None:
    """Start counting anew: the jobs of a sweep share a process, and what one of them freed is given back first."""
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where it is not Linux, or not allowed, the peak is that of the whole process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
