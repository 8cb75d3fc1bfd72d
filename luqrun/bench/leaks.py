"""What the jobs of a sweep leave behind in their process: memory, tensors, threads, file handles."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Measure(Callback):
    """A Hydra callback that adds a line of JSON to the file `path` after each job; see `measure`."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"model": config.model.name, **measure()}) + "\n")


def measure() -> dict[str, int]:
    """Of this process: threads, open handles, live tensors, and resident MiB as it is and without what is only kept.

    kept_mib: what the C library has freed and not given back, or garbage that Python had not collected.
    """
    import torch

    from luqrun.runtime.memory import give_back_memory

    before, threads, handles = _resident(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    give_back_memory()
    after = _resident()
    tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
    return {
        "resident_mib": after, "kept_mib": before - after, "tensors": tensors, "threads": threads, "handles": handles
    }  # fmt: skip


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
