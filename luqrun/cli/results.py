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
    if "cost/share_of_macs_4bit" in summary:
        title = f"{config.model.name} under quant={config.quant.name}: what a training step costs"
        return "\n".join(["", title, *_cost_lines(summary), f"table        {shown(folder / 'cost.md')}", *where[:-1]])
    if "diverged" in summary:
        return "\n".join(
            ["", f"{config.quant.name} diverged at step {summary['diverged']} (a result; study {study})", *where]
        )
    found = {operand: _fprop_format(config.quant, operand) for operand in ("weight", "activation")}
    formats = " and ".join(f"{name.upper()} {operand}s" for operand, name in found.items() if name is not None)
    title = f"{config.model.name} on {config.dataset.name}, evaluated with {formats or 'full precision'}"
    if config.job == "evaluate":
        found = {name: value for name, value in summary.items() if name.startswith("val/")}
        rows, of = [(f"quant={config.quant.name}", found)], summary["evaluated"]
        source = f"weights      {of['weights']}, trained with quant={of['trained_with'] or '(not known)'}"
        return "\n".join(["", title, *_table("", rows, metric), *_on_test(summary, metric), source, *where[:-1]])
    trained = _epochs(config.schedule.epochs) if config.schedule.epochs else "model.weights"
    rows = [(f"{trained}, quant={config.quant.name}", summary["before_finetune"])]
    rows += [(f"+ {_epochs(number, 'fine-tune ')}", result) for number, result in enumerate(summary["finetune"], 1)]
    rate, unit = next((value, name.removesuffix(RATE)) for name, value in summary.items() if name.endswith(RATE))
    speed = f"{rate:.0f} {unit}/s in training, {summary['train_seconds']:.0f} s of it"
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    lines = _table("after", rows, metric)
    return "\n".join(["", title, *lines, *_on_test(summary, metric), f"{speed}, {memory}", *where])


def _cost_lines(summary: dict) -> list[str]:
    """The main numbers of job=cost."""
    numbers = {name.removeprefix("cost/"): value for name, value in summary.items()}
    bounds = {name: numbers[f"bound_over_{name}"] for name in ("fp32", "bf16", "8bit")}
    shown = ", ".join(f"{value:.2f} over {name}" for name, value in bounds.items() if value is not None)
    unknown = numbers["layers_of_unknown_work"]
    rest = f" (of what is known: {unknown} layers are of unknown kinds)" if unknown else ""
    return [
        f"MACs of fprop of all layers, an example {numbers['fprop_macs_per_example']:,}",
        f"at 4 bits, of all layers' MACs          {100 * numbers['share_of_macs_4bit']:.2f} %{rest}",
        f"at 4 bits, of all matrix work           {100 * numbers['share_of_matrix_work_4bit']:.2f} %",
        f"bound on the speed-up of matrix work    {shown}",
    ]


def _table(head: str, results: Sequence[tuple[str, dict]], metric: Metric) -> list[str]:
    """Lines of labelled results, whose metrics are those of the first."""
    names = [metric.name, *(name for name in results[0][1] if name != metric.name)]
    rows = [[head, metric.label, *(_label(name) for name in names[1:])]]
    rows += [[label, *(_number(name, result[name]) for name in names)] for label, result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]


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
