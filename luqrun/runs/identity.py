"""Whose result a folder holds: by its settings, its data, the number of its processes, and RESULTS.

What a run was is recorded when it starts: config.yaml, and in run.json `results`, `world_sizes` and `data`. It is
compared before a result is shown as this run's, or taken over from another study. A checkpoint holds it too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import yaml

from luqrun import RESULTS
from luqrun.config import Config, flatten
from luqrun.errors import UserError
from luqrun.runs.folder import RUN, RunFolder, of_the_result, run_id, what_decides_the_result
from luqrun.runtime import process_group

if TYPE_CHECKING:
    from luqrun.tasks.fingerprint import Found

CONFIG = "config.yaml"


def refuse_other_settings(config: Config, folder: RunFolder) -> None:
    """Raise UserError where the folder holds a run, finished or begun, of other settings; it names the first of them.

    A folder without its config.yaml, or with a damaged one, is known by its name alone.
    """
    if folder.summary() is None and folder.run().get("status") != "diverged" and not folder.begun():
        return
    named, theirs = folder.path.name == run_id(config), _settings(folder)
    if theirs is None and not named:
        raise UserError(f"{folder.path} holds a run whose {CONFIG} cannot be read: {_advice(config, folder)}")
    ours = flatten(what_decides_the_result(config))
    if theirs is None or not (key := _first_difference(theirs, ours)):
        return
    if named and key == "dataset.root":
        return  # a relative one, of where the first command was given: the name holds the whole path
    shown = [f"{key}={settings[key]}" if key in settings else f"no {key}" for settings in (theirs, ours)]
    raise UserError(f"{folder.path} holds a run with {shown[0]}, this one has {shown[1]}: {_advice(config, folder)}")


def _settings(folder: RunFolder) -> dict | None:
    """What config.yaml says that decides the result, with dotted keys; None where it cannot be read."""
    try:
        found = yaml.safe_load((folder.path / CONFIG).read_text())
        return flatten(of_the_result(found)) if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError):
        return None


def _first_difference(theirs: dict, ours: dict) -> str | None:
    """In the schema's order, in which a part's name comes first; before all others what kind of run it is."""
    missing = object()
    keys = [key for key in [*ours, *theirs] if ours.get(key, missing) != theirs.get(key, missing)]
    rank = {"job": 0, "dataset.root": 2}
    return min(keys, key=lambda key: rank.get(key, 1), default=None)


def refuse_another(config: Config, folder: RunFolder) -> str:
    """Raise UserError where the result in the folder, of these settings, is of other numbers, processes or data.

    Returns what is to be said beside it: "", or such as " (trained by 2, then 1 processes)".
    """
    run = folder.run()
    sizes, recorded = run.get("world_sizes"), run.get("data")
    why, notes = _other_results(run), []
    if not why and (not isinstance(sizes, list) or process_group.world_size() not in sizes):
        why = f"{_processes(sizes)}, this run has {process_group.world_size()}"
    if not why and _reads_files(config):
        why, notes = _compared(config, recorded)
    if why:
        raise UserError(f"{folder.path} holds a result {why}: {_advice(config, folder)}")
    if len(sizes) > 1:
        notes.append(f"trained {_processes(sizes)}")
    return f" ({'; '.join(notes)})" if notes else ""


def _compared(config: Config, recorded: object) -> tuple[str, list[str]]:
    """(why the data of a result are others, notes): where they lie elsewhere, or are no more where they were."""
    from luqrun.tasks.fingerprint import whole_root

    if not isinstance(recorded, dict):
        return f"whose data {RUN} does not name", []
    root = recorded.get("root")
    here = root == whole_root(config.dataset)
    if here and not os.path.isdir(root):
        return "", [f"its data, {root}, are not there any more and were not compared"]
    return _differing(recorded, _found(config)), [] if here else [f"with dataset.root={root}"]


def differs_from(config: Config) -> Callable[[dict], str]:
    """A function of a twin's run.json: why it cannot stand for a run of `config` that starts here; "" where it can.

    The data are looked at once, and only where all else is the same.
    """
    found = functools.cache(lambda: _found(config))

    def differs(run: dict) -> str:
        sizes = run.get("world_sizes")
        if why := _other_results(run):
            return why
        if sizes != [process_group.world_size()]:
            return _processes(sizes)
        if not _reads_files(config):
            return ""
        recorded = run.get("data")
        return _differing(recorded, found()) if isinstance(recorded, dict) else "whose data are not known"

    return differs


def _differing(recorded: dict, found: Found) -> str:
    from luqrun.tasks.fingerprint import differing

    why = differing(recorded, found)
    return f"of other data, {why}" if why else ""


def _found(config: Config) -> Found:
    from luqrun.tasks.classification.data import build_dataset

    return build_dataset(config.dataset).found


def _reads_files(config: Config) -> bool:
    """Glyphs follow from the settings."""
    return config.job == "train" and config.dataset.name != "glyphs"


def other_results(theirs: object) -> str:
    """Such as "of RESULTS 1"; "" for a run of this code's numbers. Before there was a RESULTS it was 1."""
    if theirs == RESULTS:
        return ""
    return f"of RESULTS {theirs} (an earlier or later luqrun, which computes other numbers; here it is {RESULTS})"


def _other_results(run: dict) -> str:
    return other_results(run.get("results", 1))


def _processes(sizes: object) -> str:
    if not isinstance(sizes, list) or not sizes:
        return "of an unknown number of processes"
    return f"by {', then '.join(map(str, sizes))} {'process' if sizes == [1] else 'processes'}"


def _advice(config: Config, folder: RunFolder) -> str:
    if folder.path.name == run_id(config):
        return "study=NAME runs this one elsewhere, or delete the folder"
    return "give this one a folder of its own (hydra.run.dir, hydra.sweep.subdir), or delete that one"
