"""What the report knows of a run: read from its folder, or named with the reason why it is left out.

summaries.py reads runs whose folders are gone, with the checks that are made here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from luqrun import __version__
from luqrun.config import flatten
from luqrun.errors import UserError
from luqrun.report import remaking
from luqrun.report.experiments import MEASURED, TITLES
from luqrun.runs.folder import METRICS, RUN, SUMMARY, of_the_result

CONFIG = "config.yaml"
ROUNDING = {"operand", "quantizer", "bin", "draws", "drawn", "x", "measured", "closed_form", "z"}
DRAWN = ["nearest", "stochastic", "flush"]
MORE = {"top5": "val/top5", "loss": "val/loss", "train_seconds": "train_seconds"}


@dataclass(frozen=True)
class Record:
    """One finished or diverged run that says which cell of which table it is.

    top1, top5: per cent, of the last evaluation, and its loss (None where the run diverged, or did not train). curve:
    val/top1 after each epoch, of a diverged run up to there. rounding: what job=rounding measured. config: YAML. run:
    what run.json says. train_seconds: without evaluations.
    """

    path: Path
    study: str
    table: str
    scale: str | None
    row: str
    column: str
    seed: int
    top1: float | None
    curve: tuple[float, ...]
    rounding: tuple[dict, ...]
    config: str
    run: dict
    top5: float | None = None
    loss: float | None = None
    train_seconds: float | None = None

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
        return remaking.split((self.run.get("command") or [])[1:])[0]

    @property
    def overrides(self) -> list[str]:
        return self.run.get("overrides") or []

    def settings(self) -> dict:
        """Its config with dotted keys, without what does not change the result (luqrun.runs.folder)."""
        return flatten(of_the_result(yaml.safe_load(self.config)))


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


class Unusable(Exception):
    """The reason why a run is left out."""


class _NotANumber(Exception):
    """NaN, Infinity or -Infinity, anywhere in a file."""


def _refuse_nan(constant: str):
    raise _NotANumber(constant)


def read_folders(outputs: Path) -> tuple[list[Record], list[LeftOut]]:
    """All runs under `outputs` that belong to a table, duplicates too, and the folders that cannot be counted.

    Runs without a cell (trained for their own sake) are neither.
    """
    records, left_out = [], []
    for path in sorted({path.parent for name in (RUN, CONFIG) for path in outputs.rglob(name)}):
        try:
            record = read_run(path, outputs)
        except Unusable as reason:
            left_out.append(LeftOut(path, str(reason)))
        else:
            records += [record] if record else []
    return records, left_out


def without_duplicates(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """Two runs of one cell and seed are both left out: which of them is meant cannot be known."""
    left_out = []
    by_cell: dict[tuple, list[Record]] = {}
    for record in records:
        cell = record.study, record.table, record.scale, record.row, record.column, record.seed
        by_cell.setdefault(cell, []).append(record)
    kept = []
    for same in by_cell.values():
        if len(same) == 1:
            kept += same
        else:
            left_out += _duplicates(same)
    return kept, left_out


def _duplicates(same: list[Record]) -> list[LeftOut]:
    settings = [record.settings() for record in same]
    found = []
    for record, own in zip(same, settings, strict=True):
        others = [(each, differences(own, its)) for each, its in zip(same, settings, strict=True) if each is not record]
        named = ", ".join(f"{each.path.name} ({why or 'nor do their settings differ'})" for each, why in others)
        advice = "; a study=NAME of its own for one of them tells them apart" if any(why for _, why in others) else ""
        found.append(LeftOut(record.path, f"duplicated: the same cell and seed as {named}{advice}"))
    return found


def read_run(path: Path, outputs: Path) -> Record | None:
    """The record of a run folder, or None where the run belongs to no table. Raises Unusable."""
    text = _text(path / CONFIG)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a number or date that Python cannot hold
        raise Unusable(f"{CONFIG} is not YAML") from None
    if not names_a_cell(config, CONFIG):
        return None
    run = _json(path / RUN)
    check_run(run, RUN)
    finished = run["status"] == "finished"
    if finished and not (path / SUMMARY).is_file():
        raise Unusable(f"incomplete: finished without {SUMMARY}")
    summary = _json(path / SUMMARY) if finished else {}
    trained = summary.get("val/top1") is not None
    curve = tuple(_curve(path / METRICS)) if trained else () if finished else _sound(_curve(path / METRICS))
    record = make_record(path, _study(path, outputs), text, config, run, summary, curve, SUMMARY)
    if trained and curve[-1:] != (record.top1,):
        raise Unusable(f"incomplete: {METRICS} does not end in the val/top1 of {SUMMARY}")
    return record


def names_a_cell(config, source: str) -> bool:
    """Whether a config says which cell of which table its run is. Raises Unusable; source: the file of the config."""
    if not isinstance(config, dict) or not _is_plain(config):
        raise Unusable(f"{source} is not a configuration")
    cell = config.get("cell", "cut off")
    if cell is None or (isinstance(cell, dict) and not cell.get("table", "cut off")):
        return False
    if not isinstance(cell, dict) or "table" not in cell:
        raise Unusable(f"{source} does not say which cell of which table this is")
    if cell["table"] not in list(TITLES):  # it may be of any type
        raise Unusable(f"its table {cell['table']} is not known; known: {', '.join(TITLES)}")
    return True


def check_run(run: dict, source: str) -> None:
    """Raise Unusable where what run.json says is not of a run of this version that has ended."""
    status = run.get("status")
    if status not in ("finished", "diverged"):
        raise Unusable(f"incomplete: {status or 'no status'}" + (f" ({run['reason']})" if run.get("reason") else ""))
    versions = run.get("versions")
    version = versions.get("luqrun") if isinstance(versions, dict) else None
    if version != __version__:
        raise Unusable(f"of another version: {version}, this is {__version__}")
    lists, commit = [run.get("overrides", []), run.get("command", [])], run.get("git_commit")
    if type(run.get("results", 1)) is not int or not all(isinstance(each, list) for each in lists):
        raise Unusable(f"{source} is damaged")
    if not all(isinstance(text, str) for text in [*itertools.chain(*lists), commit or ""]):
        raise Unusable(f"{source} is damaged")
    try:
        remaking.split(lists[1][1:])
    except ValueError:
        raise Unusable(f"{source} is damaged") from None


def make_record(
    path: Path, study: str, text: str, config: dict, run: dict, summary: dict, curve: tuple[float, ...], source: str
) -> Record:
    """The record of a run whose config and run have passed the checks above. Raises Unusable; source: of `summary`."""
    cell, seed = config["cell"], config.get("seed")
    names = [cell.get("row"), cell.get("column"), "" if cell.get("scale") is None else cell["scale"]]
    if type(seed) is not int or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise Unusable("its cell or seed is incomplete")
    if "/" in names[2]:
        raise Unusable(f"its scale {names[2]} is not known")
    top1 = summary.get("val/top1")
    rounding = summary.get("rounding", [])
    if not isinstance(rounding, list) or not all(map(_is_rounding, rounding)):
        raise Unusable(f"{source} is damaged")
    measured = cell["table"] in MEASURED
    if bool(rounding) != measured or (measured and run["status"] == "diverged"):
        holds = "what job=rounding measures" if measured else "results of trainings"
        raise Unusable(f"{cell['table']} holds {holds}, which this is not")
    if run["status"] == "finished" and not rounding and top1 is None:
        raise Unusable(f"{source} has no val/top1")
    if top1 is not None and not is_share(top1):
        raise Unusable(f"val/top1 is {top1}")
    more = {name: summary.get(key) for name, key in MORE.items()}
    for name, value in more.items():
        if value is not None and not _is_number(value):
            raise Unusable(f"{MORE[name]} is {value}")
    return Record(
        path=path,
        study=study,
        table=str(cell["table"]),
        scale=cell.get("scale"),
        row=cell["row"],
        column=cell["column"],
        seed=seed,
        top1=top1,
        curve=curve,
        rounding=tuple(rounding),
        config=text,
        run=run,
        **more,
    )


def _study(path: Path, outputs: Path) -> str:
    if path == outputs:
        raise UserError(f"{outputs} is a run; give the folder that holds its study, as outputs/ does")
    study = path.parent.relative_to(outputs)
    if not str(path).isprintable():
        raise Unusable("the name of its folder is not printable")
    return str(study) if study.parts else outputs.resolve().name


def _curve(path: Path) -> Iterator[float]:
    """val/top1 after each epoch. Raises Unusable at the first line that is not sound."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            row = json.loads(line, parse_constant=_refuse_nan)
            found = [row["val/top1"]] if row.get("kind") == "epoch" else []
        except _NotANumber as constant:
            raise Unusable(f"{METRICS} holds {constant} in line {number}") from None
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise Unusable(f"{METRICS} is damaged in line {number}") from None
        if not all(map(is_share, found)):
            raise Unusable(f"{METRICS} is damaged in line {number}")
        yield from map(float, found)


def _sound(curve: Iterator[float]) -> tuple[float, ...]:
    """As far as it is sound: a diverged run's number does not hang on it, and it may hold NaN."""
    found = []
    with contextlib.suppress(Unusable):
        for top1 in curve:
            found.append(top1)
    return tuple(found)


def is_share(value) -> bool:
    """A number of per cent."""
    return type(value) in (int, float) and 0 <= value <= 100


def _is_rounding(row) -> bool:
    """Whether this is a row as luqrun.train.rounding_experiment.measure returns it."""
    if not isinstance(row, dict) or not row.keys() >= ROUNDING:
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
    return all(map(_is_number, [*itertools.chain(*lists), *row["bin"], row["draws"], row["z"]]))


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def _is_plain(config: dict) -> bool:
    """Whether it can be compared as JSON: keys of one type, no dates, nothing that holds itself."""
    try:
        json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise Unusable(f"incomplete: {path.name} is not a file")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"incomplete: {path.name} cannot be read ({type(error).__name__})") from None


def _json(path: Path) -> dict:
    try:
        content = json.loads(_text(path), parse_constant=_refuse_nan)
    except _NotANumber as constant:
        raise Unusable(f"{path.name} holds {constant}") from None
    except (ValueError, RecursionError):
        raise Unusable(f"{path.name} is damaged") from None
    if not isinstance(content, dict):
        raise Unusable(f"{path.name} is damaged")
    return content
