"""What the report knows of a run: read from its folder, or named with the reason why it is left out.

The files are read and checked in luqrun.runs.reading; here is checked what a table needs, for run folders and for
summaries (summaries.py) alike.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from luqrun.errors import UserError
from luqrun.report import rerun_commands
from luqrun.report.experiments import ROUNDING_TABLES, TITLES
from luqrun.runs.identity import deciding_data, deciding_settings, flatten
from luqrun.runs.metric import Metric, is_number
from luqrun.runs.reading import (
    CONFIG,
    METRICS,
    RUN,
    SUMMARY,
    StoredRun,
    Unusable,
    metric_of,
    read_run,
)

ROUNDING = {"operand", "quantizer", "bin", "draws", "drawn", "x", "measured", "closed_form", "z"}
DRAWN = ["nearest", "stochastic", "flush"]


@dataclass(frozen=True)
class Record:
    """One finished or diverged run that says which cell of which table it is.

    value: what tables compare, the metric on test data where the run has it, else that of the last evaluation (None
    where the run diverged, or did not train). curve: the metric on validation data after each epoch, of a diverged run
    up to there. rounding: what job=rounding measured. config, run: what config.yaml and run.json say. more: other
    numbers of the end, by name: top5, loss, train_seconds (without evaluations). notes: texts of the end, such as a
    score's signature. tested: whether the value is of test data.
    """

    path: Path
    study: str
    table: str
    scale: str | None
    row: str
    column: str
    seed: int
    value: float | None
    curve: tuple[float, ...]
    rounding: tuple[dict, ...]
    config: dict
    run: dict
    more: dict[str, float | None]
    notes: dict[str, str] = field(default_factory=dict)
    tested: bool = False

    @property
    def metric(self) -> Metric:
        """What the value is of."""
        return self.curve_metric.of_test if self.tested else self.curve_metric

    @property
    def curve_metric(self) -> Metric:
        return metric_of(self.run)

    @property
    def diverged(self) -> bool:
        return self.run["status"] == "diverged"

    @property
    def results(self) -> int:
        """Which RESULTS its numbers are of (luqrun.RESULTS); 1 before that was recorded."""
        return self.run.get("results", 1)

    @property
    def command(self) -> str:
        return shlex.join(["luqrun", *self.options, *self.overrides])

    @property
    def options(self) -> tuple[str, ...]:
        """Of the command line: where the YAML files are that Hydra would not find without."""
        return rerun_commands.split((self.run.get("command") or [])[1:])[0]

    @property
    def overrides(self) -> list[str]:
        return self.run.get("overrides") or []

    def settings(self) -> dict:
        """Its config with dotted keys, without what does not change the result."""
        return flatten(deciding_settings(self.config))

    def trained(self) -> dict:
        """What decides its result beside the settings (luqrun.runs.identity), and by what its training is judged."""
        data = {f"data.{name}": value for name, value in deciding_data(self.run.get("data")).items()}
        if self.config.get("job") == "evaluate":
            data.pop("data.weights", None)  # each run of a table evaluates others
        sizes = self.run.get("world_sizes") or [self.run.get("world_size", 1)]  # one, before that was recorded
        return {**data, "RESULTS": self.results, "processes": sizes, "metric": self.curve_metric.name}


@dataclass(frozen=True)
class LeftOut:
    """A run folder that no table counts, and why."""

    path: Path
    reason: str


def printable(text: str) -> str:
    """In one line, without what a terminal or a file may not take, and not too long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:1000])
    return shown + ("..." if len(text) > 1000 else "")


def differences(own: dict, other: dict) -> str:
    """Such as "schedule.epochs=1 instead of 6": the first three keys that differ, and how many more; "" for none."""
    keys = [key for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key)]
    shown = [f"{key}={own.get(key)} instead of {other.get(key)}" for key in keys[:3]]
    return ", ".join(shown + ([f"and {len(keys) - 3} more"] if keys[3:] else []))


def read_folders(outputs: Path) -> tuple[list[Record], list[LeftOut]]:
    """All runs under `outputs` that belong to a table, duplicates too, and the folders that cannot be counted.

    Runs without a cell (trained for their own sake) are neither.
    """
    records, left_out = [], []
    for path in sorted({path.parent for name in (RUN, CONFIG) for path in outputs.rglob(name)}):
        try:
            stored = read_run(path, names_a_cell)
            records += [] if stored is None else [make_record(stored, _study(path, outputs))]
        except Unusable as reason:
            left_out.append(LeftOut(path, str(reason)))
    return records, left_out


def _study(path: Path, outputs: Path) -> str:
    if path == outputs:
        raise UserError(f"{outputs} is a run; give the folder that holds its study, as outputs/ does")
    study = path.parent.relative_to(outputs)
    if not str(path).isprintable():
        raise Unusable("the name of its folder is not printable")
    return str(study) if study.parts else outputs.resolve().name


def names_a_cell(config: dict, source: str = CONFIG) -> bool:
    """Whether a config says which cell of which table its run is. Raises Unusable; source: the file of the config."""
    cell = config.get("cell", "cut off")
    if cell is None or (isinstance(cell, dict) and not cell.get("table", "cut off")):
        return False
    if not isinstance(cell, dict) or "table" not in cell:
        raise Unusable(f"{source} does not say which cell of which table this is")
    if cell["table"] not in list(TITLES):  # it may be of any type
        raise Unusable(f"its table {cell['table']} is not known; known: {', '.join(TITLES)}")
    return True


def make_record(stored: StoredRun, study: str) -> Record:
    """The record of a run whose config names a cell and whose files fit the schema of luqrun.runs.reading.

    Raises Unusable where it has not ended, or does not hold what its table shows.
    """
    _check_ended(stored)
    cell, seed = stored.config["cell"], stored.config.get("seed")
    names = [cell.get("row"), cell.get("column"), "" if cell.get("scale") is None else cell["scale"]]
    if type(seed) is not int or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise Unusable("its cell or seed is incomplete")
    if "/" in names[2]:
        raise Unusable(f"its scale {names[2]} is not known")
    summary = stored.summary or {}
    numbers = {_short(key): value for key, value in summary.items() if _is_shown(key)}
    last, on_test = _value(stored), _test_value(stored)
    judged = stored.metric if on_test is None else stored.metric.of_test
    return Record(
        path=stored.path,
        study=study,
        table=str(cell["table"]),
        scale=cell.get("scale"),
        row=cell["row"],
        column=cell["column"],
        seed=seed,
        value=last if on_test is None else on_test,
        curve=stored.curve,
        rounding=_rounding(stored),
        config=stored.config,
        run=stored.run,
        more={name: value for name, value in numbers.items() if name != judged.short},
        notes={name: printable(text) for name, text in summary.items() if isinstance(text, str)},
        tested=on_test is not None,
    )


def _check_ended(stored: StoredRun) -> None:
    status, reason = stored.run.get("status"), stored.run.get("reason")
    if status not in ("finished", "diverged"):
        raise Unusable(f"incomplete: {status or 'no status'}" + (f" ({reason})" if reason else ""))
    try:
        rerun_commands.split((stored.run.get("command") or [])[1:])
    except ValueError as error:
        raise Unusable(f"{stored.source(RUN)} is damaged (command: {error})") from None


def _rounding(stored: StoredRun) -> tuple[dict, ...]:
    """What a run of job=rounding measured; of another ()."""
    rows = (stored.summary or {}).get("rounding", [])
    if not all(map(_is_rounding, rows)):
        raise Unusable(f"{stored.source(SUMMARY)} is damaged (rounding)")
    table = stored.config["cell"]["table"]
    of_rounding = table in ROUNDING_TABLES
    if bool(rows) != of_rounding or (of_rounding and stored.run["status"] == "diverged"):
        holds = "what job=rounding measures" if of_rounding else "results of trainings"
        raise Unusable(f"{table} holds {holds}, which this is not")
    return tuple(rows)


def _value(stored: StoredRun) -> float | None:
    metric, summary = stored.metric, stored.summary or {}
    value = summary.get(metric.name)
    if value is None:
        if stored.run["status"] == "finished" and not summary.get("rounding"):
            raise Unusable(f"{stored.source(SUMMARY)} has no {metric.name}")
        return None
    if stored.run["status"] == "diverged":
        raise Unusable(f"it diverged, and has a {metric.name} all the same")
    if not metric.allows(value):
        raise Unusable(f"{metric.name} is {value}")
    if stored.curve[-1:] != (value,):
        where = f"the curve of {stored.source(METRICS)} does not end in the {metric.name} of {stored.source(SUMMARY)}"
        raise Unusable(f"incomplete: {where}")
    return value


def _test_value(stored: StoredRun) -> float | None:
    """The metric on test data; None where the run had none."""
    metric = stored.metric.of_test
    value = (stored.summary or {}).get(metric.name)
    if value is not None and not metric.allows(value):
        raise Unusable(f"{metric.name} is {value}")
    if value is not None and stored.run["status"] == "diverged":
        raise Unusable(f"it diverged, and has a {metric.name} all the same")
    return value


def _is_shown(key: str) -> bool:
    return key.startswith(("val/", "test/")) or key == "train_seconds"


def _short(key: str) -> str:
    """As summaries call it: that it is of the validation set is not said."""
    return key.removeprefix("val/")


def _is_rounding(row) -> bool:
    """Whether this is a row as luqrun.train.rounding_experiment.measure returns it."""
    if not row.keys() >= ROUNDING:
        return False
    parts = [row["measured"], row["closed_form"]]
    if not all(isinstance(part, dict) and part.keys() >= {"bias", "variance", "mse"} for part in parts):
        return False
    lists = [row["x"], *(part[name] for part in parts for name in ("bias", "variance", "mse"))]
    same = all(isinstance(each, list) and each and len(each) == len(lists[0]) for each in lists)
    in_bin = isinstance(row["bin"], list) and len(row["bin"]) == 2
    texts = isinstance(row["quantizer"], str) and row["quantizer"].isprintable() and row["drawn"] in DRAWN
    if not (same and in_bin and texts):
        return False
    return all(map(is_number, [*itertools.chain(*lists), *row["bin"], row["draws"], row["z"]]))
