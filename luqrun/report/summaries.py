"""Summaries: what is kept of the runs of a table where their folders are not, a JSON file a table.

They are read again as run folders are, with the same checks, so that a table can be rendered and completed elsewhere.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from luqrun.report.records import (
    MORE,
    LeftOut,
    Record,
    Unusable,
    check_run,
    is_share,
    make_record,
    names_a_cell,
    printable,
    read_folders,
    without_duplicates,
)
from luqrun.report.remaking import split

# Of run.json; not its paths and times.
KEPT = (
    "status", "diverged_at_step", "git_commit", "git_dirty", "versions",
    "device", "kernel_backend", "threads", "world_size", "world_sizes", "results",
)  # fmt: skip


def summary(record: Record) -> dict:
    """A run as an entry of a file of summaries: no paths of the machine, no checkpoints."""
    entry = {
        "run": record.path.name,
        **_cell(record),
        "command": record.command,
        "top1": record.top1,
        **{name: getattr(record, name) for name in MORE},
        "curve": record.curve,
        **{name: record.run[name] for name in KEPT if name in record.run},
        "config": _without_places(yaml.safe_load(record.config)),
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
    records, contradicting = _once(records)
    records, duplicated = without_duplicates(records)
    return records, [*left_out, *contradicting, *duplicated]


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
                records.append(_record(entry, place, path.name))
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


def _record(entry: dict, place: Path, source: str) -> Record:
    try:
        json.dumps(entry, allow_nan=False)
    except (ValueError, RecursionError):
        raise Unusable("it holds NaN or an infinite number") from None
    config, command, curve = (entry.get(name) for name in ("config", "command", "curve"))
    if not names_a_cell(config, "its config"):
        raise Unusable("its config does not say which cell of which table this is")
    try:
        words = shlex.split(command) if isinstance(command, str) and command else None
        overrides = words and split(words[1:])[1]
    except ValueError:
        words = overrides = None
    run = {name: entry[name] for name in KEPT if name in entry} | {"command": words, "overrides": overrides}
    check_run(run, source)
    if not isinstance(curve, list) or not all(map(is_share, curve)):
        raise Unusable("its curve is damaged")
    result = {"val/top1": entry.get("top1"), "rounding": entry.get("rounding", [])}
    result |= {key: entry.get(name) for name, key in MORE.items()}
    try:
        text = yaml.safe_dump(config, sort_keys=False)
    except RecursionError:
        raise Unusable("its config is not a configuration") from None
    study = str(PurePosixPath(entry["study"]))
    record = make_record(place, study, text, config, run, result, tuple(map(float, curve)), source)
    if record.top1 is not None and (record.diverged or record.curve[-1:] != (record.top1,)):
        raise Unusable("its curve does not end in its top1")
    if any(entry.get(name) != value for name, value in _cell(record).items()):
        raise Unusable("its cell or seed is not that of its config")
    return record


def _cell(record: Record) -> dict:
    names = ("study", "table", "scale", "row", "column", "seed")
    return {name: getattr(record, name) for name in names}


def _without_places(config: dict) -> dict:
    """Without where this machine keeps its files; of dataset=folder the root is what was trained on."""
    config, dataset = dict(config), config.get("dataset")
    if isinstance(dataset, dict) and dataset.get("name") != "folder" and _is_place(dataset.get("root")):
        config["dataset"] = {name: value for name, value in dataset.items() if name != "root"}
    return {name: value for name, value in config.items() if name != "resume" or not _is_place(value)}


def _is_place(value) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~"))


def _once(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """Each run once, of the latest RESULTS and the first where all say the same; where they do not, it is left out."""
    runs: dict[tuple, list[Record]] = {}
    for record in records:
        runs.setdefault((*_cell(record).values(), record.path.name), []).append(record)
    kept, left_out = [], []
    for found in runs.values():
        latest = max(record.results for record in found)
        same = [record for record in found if record.results == latest]
        reason = f"of RESULTS {{}}: this run is there of RESULTS {latest} too"
        left_out += [LeftOut(each.path, reason.format(each.results)) for each in found if each.results != latest]
        if all(_result(record) == _result(same[0]) for record in same):
            kept.append(same[0])
            continue
        shown = ", ".join("diverged" if record.diverged else f"{record.top1}" for record in same)
        reason = printable(f"this run is there {len(same)} times, with different results: {shown}")
        left_out += [LeftOut(record.path, reason) for record in same]
    return kept, left_out


def _result(record: Record) -> tuple:
    return record.top1, record.diverged, record.rounding
