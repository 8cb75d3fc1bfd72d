"""CoverageCheck a run from outside while it trains many steps: memory, threads, open files, bytes written.

For tests/runs/test_kills.py and scripts/soak.py. Needs Linux: it reads /proc.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

# 20 steps an epoch, and all that is written every few steps.
SOAK = (
    "device=cpu",
    "dataset.glyphs.train_images=320",
    "dataset.glyphs.val_images=47",
    "dataset.batch_size=16",
    "finetune=fnt1",
    "study=soak",
    "tracking.log_every=5",
    "tracking.health_every=50",
    "tracking.histogram_every=100",
    "tracking.checkpoint_every=50",
)
STEPS_PER_EPOCH = 20
FILES = {"metrics.jsonl": "metrics.jsonl", "run.log": "run.log", "TensorBoard": "events.out.tfevents.*"}


@dataclass
class Sample:
    """After `step`: MiB of resident memory, threads, open files, and bytes written so far by kind of file."""

    step: int
    memory: float
    threads: int
    open_files: int
    written: dict[str, int]


def soak(shell, root: Path, steps: int, *overrides: str) -> list[Sample]:
    """Train for `steps` (whole epochs, the last of them fine-tuning) and sample the process every few steps.

    shell: start(cwd, *arguments) gives a process with pid and wait(timeout); see tests/shell.py.
    """
    assert steps % STEPS_PER_EPOCH == 0, steps
    epochs = f"schedule.epochs={steps // STEPS_PER_EPOCH - 1}"
    process, samples, seen = shell.start(root, *SOAK, epochs, *overrides), [], -1
    while (result := process.wait(0.02)) is None:
        (folder,) = list((root / "outputs" / "soak").glob("*")) or [root]
        size = _bytes(folder, "metrics.jsonl")
        if size != seen and size:
            seen = size
            samples.append(_sample(process.pid, folder))
    assert result.code == 0, result.err
    return [sample for sample in samples if sample is not None]


def _sample(pid: int, folder: Path) -> Sample | None:
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    try:
        step = json.loads(rows[-1])["step"]
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        memory = int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError, ValueError):
        return None  # the process ends, or a line is half written
    written = {kind: _bytes(folder, pattern) for kind, pattern in FILES.items()}
    return Sample(step, memory, int(status["Threads"]), open_files, written)


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def summary(samples: list[Sample], warm_up: int) -> dict[str, float]:
    """Medians just after `warm_up` steps and at the end, a tenth of the rest each; bytes per 1,000 steps by halves.

    A median, because what a process holds differs from step to step: a validation pass, a checkpoint.
    """
    rest = [sample for sample in samples if sample.step > warm_up]
    part, half = max(len(rest) // 10, 1), len(rest) // 2
    found = {}
    for name in ("memory", "threads", "open_files"):
        begin, end = ([getattr(sample, name) for sample in some] for some in (rest[:part], rest[-part:]))
        found[f"{name} after warm-up"], found[f"{name} at the end"] = statistics.median(begin), statistics.median(end)
    found["growth MiB"] = found["memory at the end"] - found["memory after warm-up"]
    found["growth %"] = 100 * found["growth MiB"] / found["memory after warm-up"]
    for kind in FILES:
        for title, first, last in (("first half", rest[0], rest[half]), ("second half", rest[half], rest[-1])):
            grown = (last.written[kind] - first.written[kind]) / (last.step - first.step)
            found[f"{kind} bytes per 1,000 steps, {title}"] = 1000 * grown
    return found
