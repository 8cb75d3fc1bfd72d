"""Kill runs with SIGKILL at random instants, start them again until they finish, and compare what they end with.

For tests/runs/test_kills.py and scripts/kill_test.py. Needs Linux: the processes are looked up in /proc.
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

from luqrun.runs import checkpoint
from luqrun.runs.folder import EVENTS, RunFolder

# A checkpoint after every step, so that many kills come while one is written.
OFTEN = (
    "device=cpu",
    "schedule.epochs=1",
    "finetune=fnt1",
    "tracking.log_every=1",
    "tracking.health_every=2",
    "tracking.histogram_every=3",
    "tracking.checkpoint_every=1",
)
# Six batches an epoch.
GLYPHS = ("dataset.glyphs.train_images=96", "dataset.glyphs.val_images=47", "dataset.batch_size=16")
TINY = (*GLYPHS, *OFTEN)
SENTENCES = (
    *("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "dataset.examples=96"),
    *("dataset.batch_tokens=256", "dataset.vocabulary=150", "dataset.max_length=24", "schedule.average=null"),
)
VARIANTS = {
    "fp32": (*TINY, "quant=luq"),
    "bf16, augmented by two workers": (*TINY, "precision=bf16", "dataset.augment=true", "dataset.workers=2"),
    "fp32, hindsight, two micro-batches a step": (
        *TINY,
        "quant=luq_hindsight",
        "schedule.accumulate=2",
        "schedule.epochs=2",
    ),
    "bf16, hindsight, two micro-batches, one worker": (
        *TINY,
        "quant=luq_hindsight",
        "precision=bf16",
        "schedule.accumulate=2",
        "schedule.epochs=2",
        "dataset.workers=1",
    ),
    "translation, averaged weights": (*SENTENCES, *OFTEN, "schedule.epochs=2", "schedule.average=2"),
}
CLOCK = {"latest", "train_seconds", "evaluation_seconds", "seconds", "timed_seconds"}
RATE = "_per_second"
# Of a process, not of the run: where it started, how long its files are, what memory it took.
OF_A_PROCESS = {"timed", "metrics_bytes", "event_bytes", "peak_memory_bytes"}
PATIENCE = 30  # seconds; a worker looks for its process every 5
EARLY = 0.15  # of the kills come while a process starts; the others while it trains
AIMED = 0.25  # of those wait for a checkpoint that is being written: few random instants meet one


@dataclass
class Tally:
    """What became of one variant: kills, where they came, and what differs in the end (nothing, one hopes)."""

    kills: int = 0
    runs: int = 0
    survived: int = 0  # kills of runs that ended bit-identical
    came: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    workers: list[tuple[int, str]] = field(default_factory=list)  # of killed processes
    left: list[tuple[int, str]] = field(default_factory=list)  # of these, those that live on

    def add(self, other: "Tally") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self) -> str:
        came = ", ".join(f"{count} {where}" for where, count in self.came.most_common())
        workers = f"workers orphaned {len(self.workers)}, left {len(self.left)}"
        return f"{self.kills:5}  {self.survived:8}  {self.runs:4}  {came}; {workers}"


def kill_variant(shell, root: Path, arguments: tuple[str, ...], kills: int, rng: random.Random) -> Tally:
    """Kill runs with these arguments until there were `kills`; the instants are drawn by `rng`.

    shell: start(cwd, *arguments) gives a process with pid, wait(timeout) and kill(); see tests/shell.py.
    """
    tally = Tally()
    process = shell.start(root, *arguments, "study=whole")
    first = _await_training(process, root, "whole")
    begun = time.monotonic()
    first = first or process.wait()
    duration = time.monotonic() - begun
    if first.code != 0:
        tally.differences.append(f"the uninterrupted run failed: {first.err.strip()}")
        return tally
    # The first run of a kind compiles its kernels, which is no part of the time that it says.
    duration = min(duration, 4 * only_run(root, "whole").summary()["train_seconds"])
    while tally.kills < kills:
        before, study = tally.kills, f"killed{tally.runs}"
        found = _one_run(shell, root, (*arguments, f"study={study}"), kills, duration, rng, tally)
        tally.runs += 1
        found = found or differences(only_run(root, "whole"), only_run(root, study))
        tally.differences += [f"{study}: {difference}" for difference in found]
        tally.survived += 0 if found else tally.kills - before
    deadline = time.monotonic() + PATIENCE
    while (left := [worker for worker in tally.workers if alive(worker)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    tally.left = left
    tally.differences += [f"worker {pid} lives on without its process" for pid, _ in left]
    return tally


def _one_run(shell, root, arguments, kills, duration, rng, tally) -> list[str]:
    """Start a run, and kill it while kills are left, until it has finished; returns what is wrong with its end."""
    study = arguments[-1].partition("=")[2]
    while True:
        begun = time.time()
        process = shell.start(root, *arguments)
        if tally.kills == kills:
            result = process.wait()
        elif rng.random() < EARLY:
            result = process.wait(rng.uniform(0, 1))
        else:
            result = _await_training(process, root, study)
            # A quarter: each goes on where the one before was killed, so that the kills of a run spread over all of it.
            result = result or process.wait(rng.uniform(0, duration / 4))
            if result is None and rng.random() < AIMED:
                _await_writing(root, study, process.pid)
        if result is None:
            os.kill(process.pid, signal.SIGSTOP)  # it starts no worker while they are listed
            tally.workers += [(child, begin_of(child)) for child in children(process.pid)]
            process.kill()
            result = process.wait()
        if result.code == -signal.SIGKILL:
            tally.kills += 1
            tally.came[instant(root, study, process.pid, begun)] += 1
        else:
            wrong = "Traceback" in result.err or result.code != 0
            return [f"exit code {result.code}: {result.err.strip()}"] if wrong else []


def only_run(root: Path, study: str) -> RunFolder:
    (folder,) = (root / "outputs" / study).iterdir()
    return RunFolder(folder)


def _await_training(process, root: Path, study: str):
    """Return when a process has begun its file of curves, the last thing before its first step; its end if it ended."""
    pattern = f"*/{EVENTS.removesuffix('*')}*.{process.pid}.*"  # and how many the process has begun
    while not list((root / "outputs" / study).glob(pattern)):
        if (result := process.wait(0.01)) is not None:
            return result
    return None


def _await_writing(root: Path, study: str, pid: int) -> None:
    """Return when a process writes a checkpoint, or after a while without one."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and not _half_written(root, study, pid):
        time.sleep(0.0005)


def _half_written(root: Path, study: str, pid: int) -> list[Path]:
    return list((root / "outputs" / study).glob(f"*/checkpoints/.*.{pid}"))


def instant(root: Path, study: str, pid: int, begun: float) -> str:
    """Where a kill came of a process that began at `begun` (time.time()), as far as the run folder tells."""
    if _half_written(root, study, pid):
        return "writing a checkpoint"
    last = next((root / "outputs" / study).glob(f"*/checkpoints/{checkpoint.LAST}"), None)
    if last is None or last.stat().st_mtime < begun:
        return "before its first step's end"
    content = checkpoint.read(last)
    progress = content["progress"]
    if not progress["batch"]:
        return "near an epoch's end"
    return (
        "in training" if progress["epoch"] < content["identity"]["settings"]["schedule"]["epochs"] else "in fine-tuning"
    )


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """Where two finished runs differ: weights, optimizer, position, metrics, curves, summary, files left behind."""
    found = []
    for name in (checkpoint.LAST, checkpoint.BEST):
        contents = [checkpoint.read(folder.checkpoints / name) for folder in (one, other)]
        found += _unequal(*contents, name)
    found += _unequal(*([*map(json.loads, (f.path / "metrics.jsonl").open())] for f in (one, other)), "metrics.jsonl")
    found += _unequal(one.summary(), other.summary(), "summary.json")
    found += _unequal(curves(one), curves(other), "curves")
    found += _unequal(*({path.name: path.read_text() for path in texts(f)} for f in (one, other)), "predictions")
    kept = [{path.name for path in [*f.path.iterdir(), *f.checkpoints.iterdir()]} for f in (one, other)]
    kept = [{name for name in names if not name.startswith("events.")} for names in kept]
    return found + ([f"files {sorted(kept[0] ^ kept[1])}"] if kept[0] != kept[1] else [])


def texts(folder: RunFolder) -> list[Path]:
    """What a run keeps of its predictions."""
    return sorted((folder.path / "predictions").glob("*"))


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
        keys = {key for key in (one.keys() | other.keys()) - CLOCK - OF_A_PROCESS if not str(key).endswith(RATE)}
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
    """Of a process that is stopped; none of one that has just ended."""
    try:
        found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in found for child in text.split()]


def begin_of(pid: int) -> str:
    """When a process began, in ticks: with its number it names one process for good. Empty for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def alive(process: tuple[int, str]) -> bool:
    return begin_of(process[0]) == process[1] != ""
