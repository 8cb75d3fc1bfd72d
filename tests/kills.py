"""Kill runs with SIGKILL at random instants, start them again until they finish, and compare what they end with.

For tests/test_kills.py and scripts/kill_test.py. Needs Linux: the processes are looked up in /proc.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luqrun import checkpoint
from luqrun.errors import UserError
from luqrun.run_folder import RunFolder

# Six batches an epoch, and a checkpoint after every step, so that many kills come while one is written.
TINY = (
    "device=cpu",
    "dataset.glyphs.train_images=96",
    "dataset.glyphs.val_images=47",
    "dataset.batch_size=16",
    "schedule.epochs=1",
    "finetune=fnt1",
    "tracking.log_every=1",
    "tracking.health_every=2",
    "tracking.histogram_every=3",
    "tracking.checkpoint_every=1",
)
VARIANTS = {
    "fp32": ("quant=luq",),
    "bf16, augmented by two workers": ("precision=bf16", "dataset.augment=true", "dataset.workers=2"),
    "fp32, hindsight, two micro-batches a step": ("quant=luq_hindsight", "schedule.accumulate=2", "schedule.epochs=2"),
    "bf16, hindsight, two micro-batches, one worker": (
        "quant=luq_hindsight",
        "precision=bf16",
        "schedule.accumulate=2",
        "schedule.epochs=2",
        "dataset.workers=1",
    ),
}
CLOCK = {"images_per_second", "train_seconds", "seconds", "timed_seconds"}
# Of a process, not of the run: where it started, how long its files are, what memory it took.
OF_A_PROCESS = {"timed_images", "metrics_bytes", "event_bytes", "peak_memory_bytes"}
PATIENCE = 30  # seconds; a worker looks for its process every 5


@dataclass
class Tally:
    """What became of one variant: kills, where they came, and what differs in the end (nothing, one hopes)."""

    kills: int = 0
    runs: int = 0
    survived: int = 0  # kills of runs that ended bit-identical
    came: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    workers: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self) -> str:
        came = ", ".join(f"{count} {where}" for where, count in self.came.most_common())
        return (
            f"{self.kills:5}  {self.survived:8}  {self.runs:4}  {came}; {len(self.workers)} workers orphaned, all ended"
        )


def kill_variant(shell, root: Path, overrides: tuple[str, ...], kills: int, rng: random.Random) -> Tally:
    """Kill runs of TINY with `overrides` until there were `kills`; the instants are drawn by `rng`.

    shell: start(cwd, *arguments) gives a process with pid, wait(timeout) and kill(); see tests/shell.py.
    """
    arguments, tally = (*TINY, *overrides), Tally()
    started = time.monotonic()
    first = shell.start(root, *arguments, "study=whole").wait()
    durations = [time.monotonic() - started]
    if first.code != 0:
        tally.differences.append(f"the uninterrupted run failed: {first.err.strip()}")
        return tally
    while tally.kills < kills:
        before, study = tally.kills, f"killed{tally.runs}"
        found = _one_run(shell, root, (*arguments, f"study={study}"), kills, durations, rng, tally)
        tally.runs += 1
        found = found or differences(only_run(root, "whole"), only_run(root, study))
        tally.differences += [f"{study}: {difference}" for difference in found]
        tally.survived += 0 if found else tally.kills - before
    deadline = time.monotonic() + PATIENCE
    while (left := [worker for worker in tally.workers if alive(worker)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    tally.differences += [f"worker {pid} lives on without its process" for pid, _ in left]
    return tally


def _one_run(shell, root, arguments, kills, durations, rng, tally) -> list[str]:
    """Start a run, and kill it while kills are left, until it has finished; returns what is wrong with its end."""
    started, before = time.monotonic(), tally.kills
    while True:
        process = shell.start(root, *arguments)
        # The shortest: the first one may have compiled its loops.
        result = process.wait(rng.uniform(0, min(durations)) if tally.kills < kills else None)
        if result is None:
            os.kill(process.pid, signal.SIGSTOP)  # it starts no worker while they are listed
            tally.workers += [(child, begin_of(child)) for child in children(process.pid)]
            process.kill()
            result = process.wait()
        if result.code == -signal.SIGKILL:
            tally.kills += 1
            tally.came[instant(root, arguments[-1].partition("=")[2])] += 1
        else:
            if tally.kills == before:
                durations.append(time.monotonic() - started)
            wrong = "Traceback" in result.err or result.code != 0
            return [f"exit code {result.code}: {result.err.strip()}"] if wrong else []


def only_run(root: Path, study: str) -> RunFolder:
    (folder,) = (root / "outputs" / study).iterdir()
    return RunFolder(folder)


def instant(root: Path, study: str) -> str:
    """Where a kill came, as far as the run folder tells."""
    folders = list((root / "outputs" / study).glob("*/checkpoints"))
    if not folders:
        return "before the first checkpoint"
    if list(folders[0].glob(".*.[0-9]*")):
        return "while a checkpoint was written"
    try:
        progress = checkpoint.read(folders[0] / checkpoint.LAST)["progress"]
    except UserError:
        return "before the first checkpoint"
    phases = len({row["phase"] for row in progress["evaluations"]}) + (progress["batch"] > 0)
    return f"{'in' if progress['batch'] else 'between'} epochs" if phases < 2 else "in the fine-tune phase"


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """Where two finished runs differ: weights, optimizer, position, metrics, curves, summary, files left behind."""
    found = []
    for name in (checkpoint.LAST, checkpoint.BEST):
        contents = [checkpoint.read(folder.checkpoints / name) for folder in (one, other)]
        found += _unequal(*contents, name)
    found += _unequal(*([*map(json.loads, (f.path / "metrics.jsonl").open())] for f in (one, other)), "metrics.jsonl")
    found += _unequal(one.summary(), other.summary(), "summary.json")
    found += _unequal(curves(one), curves(other), "curves")
    kept = [{path.name for path in [*f.path.iterdir(), *f.checkpoints.iterdir()]} for f in (one, other)]
    kept = [{name for name in names if not name.startswith("events.")} for names in kept]
    return found + ([f"files {sorted(kept[0] ^ kept[1])}"] if kept[0] != kept[1] else [])


def curves(folder: RunFolder) -> dict[str, list]:
    """All that TensorBoard reads from a run, without times: (step, value) of scalars, (step, buckets) of histograms."""
    read = EventAccumulator(str(folder.path), {"scalars": 0, "histograms": 0}).Reload()
    tags = read.Tags()
    found = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        found[tag] = [(event.step, event.histogram_value) for event in read.Histograms(tag)]
    return found | {"plugins": sorted(read.summary_metadata)}


def _unequal(one, other, where: str) -> list[str]:
    """The places where two nested structures differ by a bit, without what a clock or a process decides."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - CLOCK - OF_A_PROCESS
        return [
            line for key in sorted(keys, key=str) for line in _unequal(one.get(key), other.get(key), f"{where}/{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in _unequal(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def begin_of(pid: int) -> str:
    """When a process began, in ticks: with its number it names one process for good. Empty for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def alive(process: tuple[int, str]) -> bool:
    return begin_of(process[0]) == process[1] != ""
