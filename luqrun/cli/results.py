"""What a run prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luqrun.cli.overrides import shell_words
from luqrun.cli.sweeps import Job, own_overrides
from luqrun.config import Config


def closing_table(config: Config, summary: dict, folder: Path, overrides: Sequence[str] = ()) -> str:
    """A short table of a finished run: accuracies before and after each fine-tune epoch, speed, places."""
    study = _shown(folder.parent)
    given = [f"settings     {shell_words(overrides)}"] if overrides else []
    where = [
        *given,
        f"run folder   {_shown(folder)}",
        f"curves       tensorboard --logdir {_shown(folder.parent.parent)}",
    ]
    if "rounding" in summary:
        rows = [f"{row['operand']:<10}  {row['quantizer']}  bin {row['bin']}" for row in summary["rounding"]]
        return "\n".join(["", f"the rounding of quant={config.quant.name} was measured in", *rows, *where[:-1]])
    if "diverged" in summary:
        return "\n".join(
            ["", f"{config.quant.name} diverged at step {summary['diverged']} (a result; study {study})", *where]
        )
    quantized = [name for name in ("weight", "activation") if getattr(config.quant, name) is not None]
    formats = " and ".join(f"{getattr(config.quant, name).format.upper()} {name}s" for name in quantized)
    rows = [("after", "top-1 %", "top-5 %", "loss")]
    rows.append(_row(f"{_epochs(config.schedule.epochs)}, quant={config.quant.name}", summary["before_finetune"]))
    for number, result in enumerate(summary["finetune"], 1):
        rows.append(_row(f"+ {_epochs(number, 'fine-tune ')}", result))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  {row[1]:>7}  {row[2]:>7}  {row[3]:>7}" for row in rows]
    speed = f"{summary['images_per_second']:.0f} images/s in training, {summary['train_seconds']:.0f} s of it"
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    title = f"{config.model.name} on {config.dataset.name}, evaluated with {formats or 'full precision'}"
    return "\n".join(["", title, *lines, f"{speed}, {memory}", *where])


def _epochs(number: int, kind: str = "") -> str:
    return f"{number} {kind}epoch" + ("s" if number > 1 else "")


def _row(label: str, result: dict) -> tuple[str, str, str, str]:
    return label, f"{result['val/top1']:.2f}", f"{result['val/top5']:.2f}", f"{result['val/loss']:.3f}"


def _shown(path: Path) -> str:
    """Relative to here where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def jobs_table(jobs: Sequence[Job]) -> str:
    """The end of a sweep: each job's status and top-1, what differs in its overrides, and its folder."""
    rows = [("status", "top-1 %", "job", "run folder")]
    for job, own in zip(jobs, own_overrides(jobs), strict=True):
        rows.append((*job.outcome(), own, _shown(job.folder) if job.folder.is_dir() else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])
