"""What a run prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luqrun.cli.overrides import shell_words
from luqrun.cli.sweeps import Job, own_overrides
from luqrun.config import Config, QuantConfig
from luqrun.runs.durations import in_words
from luqrun.runs.metric import TOP1, Metric

RATE = "_per_second"  # how summary.json ends the name of the speed; before it stands what is counted
LABELS = {"val/top5": "top-5 %", "val/em": "EM %"}  # of what else an evaluation reports
TEST = "test/"


def closing_table(
    config: Config, summary: dict, folder: Path, overrides: Sequence[str] = (), metric: Metric = TOP1
) -> str:
    """A short table of a finished run: its metrics before and after each fine-tune epoch, those on test data, speed,
    places.

    metric: what it is judged by, which stands first.
    """
    study = shown(folder.parent)
    given = [f"settings     {shell_words(overrides)}"] if overrides else []
    where = [
        *given,
        f"run folder   {shown(folder)}",
        f"curves       tensorboard --logdir {shown(folder.parent.parent)}",
    ]
    if "rounding" in summary:
        rows = [f"{row['operand']:<10}  {row['quantizer']}  bin {row['bin']}" for row in summary["rounding"]]
        return "\n".join(["", f"the rounding of quant={config.quant.name} was measured in", *rows, *where[:-1]])
    if "diverged" in summary:
        return "\n".join(
            ["", f"{config.quant.name} diverged at step {summary['diverged']} (a result; study {study})", *where]
        )
    found = {operand: _fprop_format(config.quant, operand) for operand in ("weight", "activation")}
    formats = " and ".join(f"{name.upper()} {operand}s" for operand, name in found.items() if name is not None)
    before = summary["before_finetune"]
    names = [metric.name, *(name for name in before if name != metric.name)]
    rows = [("after", metric.label, *(_label(name) for name in names[1:]))]
    rows.append(_row(f"{_epochs(config.schedule.epochs)}, quant={config.quant.name}", before, names))
    for number, result in enumerate(summary["finetune"], 1):
        rows.append(_row(f"+ {_epochs(number, 'fine-tune ')}", result, names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    rate, unit = next((value, name.removesuffix(RATE)) for name, value in summary.items() if name.endswith(RATE))
    speed = f"{rate:.0f} {unit}/s in training, {summary['train_seconds']:.0f} s of it"
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    title = f"{config.model.name} on {config.dataset.name}, evaluated with {formats or 'full precision'}"
    return "\n".join(["", title, *lines, *_on_test(summary, metric), f"{speed}, {memory}", *where])


def _on_test(summary: dict, metric: Metric) -> list[str]:
    """The metrics on test data in a line, and the version of each score, as summary.json calls it, in one more."""
    names = [name for name in summary if name.startswith(TEST)]
    names.sort(key=lambda name: name != metric.of_test.name)
    labels = {metric.of_test.name: metric.label} | {TEST + name.removeprefix("val/"): LABELS[name] for name in LABELS}
    shown = [f"{labels.get(name, name.removeprefix(TEST))} {_number(name, summary[name])}" for name in names]
    notes = [f"{name}: {text}" for name, text in summary.items() if isinstance(text, str)]
    return ([f"on test data: {', '.join(shown)}"] if shown else []) + notes


def _fprop_format(quant: QuantConfig, operand: str) -> str | None:
    """The format of an operand in the GEMM that an evaluation runs; None: high precision."""
    changes, plain = quant.fprop and getattr(quant.fprop, operand), getattr(quant, operand)
    if changes is None:
        return None
    return changes.format or (plain and plain.format)


def _epochs(number: int, kind: str = "") -> str:
    return f"{number} {kind}epoch" + ("s" if number > 1 else "")


def _label(name: str) -> str:
    return LABELS.get(name, name.removeprefix("val/"))


def _row(label: str, result: dict, names: Sequence[str]) -> list[str]:
    return [label, *(_number(name, result[name]) for name in names)]


def _number(name: str, value: float) -> str:
    """Losses have one more digit."""
    return f"{value:.{3 if name.endswith('loss') else 2}f}"


def shown(path: Path) -> str:
    """Relative to here where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def jobs_table(jobs: Sequence[Job], seconds: float) -> str:
    """The end of a sweep: each job's status and metric, what differs in its overrides, and its folder; and how long all
    of it took."""
    outcomes = [job.outcome() for job in jobs]
    labels = list(dict.fromkeys(outcome.metric.label for outcome in outcomes if outcome.value))
    rows = [("status", labels[0] if len(labels) == 1 else "result", "job", "run folder")]
    for job, own, (status, value, metric) in zip(jobs, own_overrides(jobs), outcomes, strict=True):
        value = f"{value} {metric.label}" if value and len(labels) > 1 else value
        rows.append((status, value, own, shown(job.folder) if job.folder.is_dir() else ""))
    took = f"{len(jobs)} job{'s' if len(jobs) > 1 else ''} in {in_words(seconds)}"
    return "\n".join(["", *aligned(rows), took])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
