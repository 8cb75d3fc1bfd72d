"""Summaries: what is kept of the runs of a table where their folders are not, a JSON file a table.

They are read again as run folders are, with the same checks, so that a table can be rendered and completed elsewhere.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from luqrun.report.consistency import one_a_seed
from luqrun.report.records import LeftOut, Record, make_record, names_a_cell, read_folders
from luqrun.report.rerun_commands import split
from luqrun.runs.reading import (
    RENAMED_SCALES,
    RUN,
    SUMMARY,
    StoredRun,
    Unusable,
    check,
    check_config,
    metric_of,
    renamed_options,
)

# Of run.json; not its paths and times.
KEPT = (
    "status", "diverged_at_step", "git_commit", "git_dirty", "versions", "device", "kernel_backend", "threads",
    "world_size", "world_sizes", "layout", "results", "data", "metric",
)  # fmt: skip
CELL = ("study", "table", "scale", "row", "column", "seed")
# What an entry holds beside the numbers of the end, which are called as in Record.more.
HOLDS = {"run", "command", "curve", "config", "rounding", "notes", *CELL, *KEPT}


def summary(record: Record) -> dict:
    """A run as an entry of a file of summaries: no paths of the machine, no checkpoints."""
    kept = {name: record.run[name] for name in KEPT if name in record.run}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {name: value for name, value in kept["data"].items() if name != "root" or value is None}
    entry = {
        "run": record.path.name,
        **{name: getattr(record, name) for name in CELL},
        "command": record.command,
        record.metric.short: record.value,
        **record.more,
        **({"notes": record.notes} if record.notes else {}),
        "curve": record.curve,
        **kept,
        "config": _without_places(record.config),
    }
    return {**entry, "rounding": record.rounding} if record.rounding else entry


def to_json(records: Sequence[Record], before: Path | None = None) -> str:
    """A file of summaries, an entry for each record. before: the file whose other entries, left out, are to stay."""
    entries = [summary(record) for record in records]
    written = [(record.study, record.path.name) for record in records]
    try:
        others = json.loads(before.read_text()) if before and before.is_file() else []
    except (OSError, ValueError, RecursionError):
        others = []
    for other in others if isinstance(others, list) else []:
        if not isinstance(other, dict) or (other.get("study"), other.get("run")) not in written:
            entries.append(other)
    return json.dumps(entries, indent=1) + "\n"


def read_inputs(inputs: Sequence[Path]) -> tuple[list[Record], list[LeftOut]]:
    """The run folders under these folders and the summaries in them, each run once, and what cannot be counted.

    Where a run is there more than once with one result, its folder counts; with several, all are left out.
    """
    records, left_out = [], []
    for read in (read_folders, read_summaries):
        for folder in inputs:
            found, others = read(folder)
            records += found
            left_out += others
    records, others = one_a_seed(records)
    return records, [*left_out, *others]


def read_summaries(folder: Path) -> tuple[list[Record], list[LeftOut]]:
    """The runs of the files of summaries in a folder, and the entries that cannot be counted.

    JSON that is no list is no file of summaries. A run's path is where its folder would be.
    """
    records, left_out = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            entries = json.loads(path.read_text()) if path.is_file() else None
        except (OSError, ValueError, RecursionError) as error:
            left_out.append(LeftOut(path, f"it cannot be read ({type(error).__name__})"))
            continue
        for number, entry in enumerate(entries if isinstance(entries, list) else [], 1):
            place = folder / path.name / f"entry {number}"
            try:
                place = _place(entry, folder)
                records.append(_record(entry, StoredRun(place, *_files(entry, path.name), file=path.name)))
            except Unusable as reason:
                left_out.append(LeftOut(place, f"{path.name}: {reason}"))
    return records, left_out


def _place(entry, folder: Path) -> Path:
    names = [entry.get("study"), entry.get("run")] if isinstance(entry, dict) else [None]
    if not all(isinstance(name, str) and name.isprintable() and len(name) < 1000 for name in names):
        raise Unusable("it does not say which run of which study it is")
    study, run = map(PurePosixPath, names)
    if study.is_absolute() or ".." in (*study.parts, *run.parts) or len(run.parts) != 1 or not study.parts:
        raise Unusable("it does not say which run of which study it is")
    return folder / study / run


def _files(entry: dict, source: str) -> tuple[dict, dict, dict, tuple[float, ...]]:
    """What the files of the run folder said: config, run, summary and curve. Raises Unusable."""
    try:
        json.dumps(entry, allow_nan=False)
    except (ValueError, RecursionError):
        raise Unusable("it holds NaN or an infinite number") from None
    config, command, curve = (entry.get(name) for name in ("config", "command", "curve"))
    config = check_config(config, "its config")
    if not names_a_cell(config, "its config"):
        raise Unusable("its config does not say which cell of which table this is")
    try:
        words = shlex.split(command) if isinstance(command, str) and command else None
        overrides = words and split(words[1:])[1]
    except ValueError:
        words = overrides = None
    run = {name: entry[name] for name in KEPT if name in entry} | {"command": words, "overrides": overrides}
    check(run, RUN, source)
    run = renamed_options(run, config)
    metric = metric_of(run)
    if not isinstance(curve, list) or not all(map(metric.allows, curve)):
        raise Unusable("its curve is damaged")
    numbers = {name: value for name, value in entry.items() if name not in HOLDS}
    result = {_long(name): value for name, value in numbers.items()} | {"rounding": entry.get("rounding", [])}
    notes = entry.get("notes", {})
    if (
        not isinstance(notes, dict)
        or not all(isinstance(text, str) for text in notes.values())
        or notes.keys() & result
    ):
        raise Unusable(f"{source} is damaged (notes)")
    result |= notes
    check(result, SUMMARY, source)
    return config, run, result, tuple(map(float, curve))


def _long(name: str) -> str:
    """As summary.json calls a number of the end."""
    return name if "/" in name or name == "train_seconds" else f"val/{name}"


def _record(entry: dict, stored: StoredRun) -> Record:
    record = make_record(stored, str(PurePosixPath(entry["study"])))
    said = {name: entry.get(name) for name in CELL}
    said["scale"] = RENAMED_SCALES.get(str(said["scale"]), said["scale"])
    if any(said[name] != getattr(record, name) for name in CELL):
        raise Unusable("its cell or seed is not that of its config")
    return record


def _without_places(config: dict) -> dict:
    """Without where this machine keeps its files; of dataset=folder the root is what was trained on."""
    config, dataset, model = dict(config), config.get("dataset"), config.get("model")
    if isinstance(dataset, dict) and dataset.get("name") != "folder" and _is_place(dataset.get("root")):
        config["dataset"] = {name: value for name, value in dataset.items() if name != "root"}
    if isinstance(model, dict) and _is_place(model.get("weights")):
        config["model"] = {name: value for name, value in model.items() if name != "weights"}
    return {name: value for name, value in config.items() if name != "resume" or not _is_place(value)}


def _is_place(value) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~"))
