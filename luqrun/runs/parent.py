"""Going on: resume=RUN, the folder of a finished run, which this run continues with more epochs.

It ends as a run of so many epochs that nobody ended in between does, bit for bit: so it is that run, with its name. Its
run.json says which folder it came from.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs.folder import LAST
from luqrun.runs.identity import Identity, difference
from luqrun.runs.reading import CONFIG, RUN, Unusable, read_config, read_json

OPEN_ENDED = ("step", "inverse_sqrt")  # schedule.name: rates of a step that do not depend on how many there are in all


def parent_folder(resume: str) -> Path | None:
    """The run folder that `resume` names; None where it is no folder."""
    path = os.path.expanduser(resume)
    return Path(path) if os.path.isdir(path) else None  # Path.is_dir raises for a name that is too long


def is_same(parent: Path, folder: Path) -> bool:
    """Whether a run would go on from itself: where it stopped before its first checkpoint, it begins again."""
    return os.path.realpath(parent) == os.path.realpath(folder)


def last_checkpoint(folder: Path, run: dict) -> Path:
    """Of a run; that of one taken over lies where it was trained. run: run.json."""
    # By name, as relpath made it: a study may be a link.
    return Path(os.path.normpath(folder / (run.get("reused") or ""))) / "checkpoints" / LAST


def parent_checkpoint(config: Config) -> Path:
    """The last checkpoint of the finished run whose folder config.resume names. Raises UserError where a run of this
    config cannot go on from there, as far as it is known without reading the checkpoint and the data."""
    folder, named = parent_folder(config.resume), f"resume={config.resume}"
    assert folder is not None
    try:
        run, settings = read_json(folder, RUN), read_config(folder)
    except Unusable as reason:
        raise UserError(f"{named} is not the folder of a run ({reason}); such a one is outputs/STUDY/RUN_ID") from None
    if (job := settings.get("job", "train")) != "train":
        raise UserError(f"{named} is of job={job}, which trains nothing: there are no epochs to go on with")
    status = run.get("status")
    if status == "diverged":
        raise UserError(f"{named} diverged at step {run.get('diverged_at_step')}: there is nothing to go on from")
    if status != "finished":
        raise UserError(
            f"{named} has not finished ({run.get('reason') or status}): its own command, or {named} with nothing else, "
            "ends it first"
        )
    theirs = Identity.stored(settings, run)
    ours = dataclasses.replace(Identity.of(config, {}), data=theirs.data)  # compared where they are known
    if why := why_not_on(theirs, ours, config):
        raise UserError(f"{named} is a run {why}")
    path = last_checkpoint(folder, run)
    if not path.is_file():
        raise UserError(f"{named} has finished, but {path} is gone: without resume= all epochs are trained")
    return path


def epochs_before(config: Config) -> int:
    """How many epochs are done where a run of this config begins: those of what `resume` names; 0 where it does not
    say."""
    if config.job != "train":
        return 0
    if config.resume == "base":
        return config.schedule.epochs if config.finetune.epochs else 0
    folder = parent_folder(config.resume)
    with suppress(Unusable):
        return (_epochs(read_config(folder), "schedule") or 0) if folder else 0
    return 0


def why_not_on(theirs: Identity, ours: Identity, config: Config) -> str:
    """Why a run of this config and identity cannot go on from a finished one, in words that go on from "a run"; ""
    where it can. The number of processes may differ."""
    epochs = config.schedule.epochs
    before, tuned = (_epochs(theirs.settings, part) for part in ("schedule", "finetune"))
    if before is None:
        return difference(theirs, ours, ("processes",)) or f"whose {CONFIG} does not say schedule.epochs"
    if before != epochs and tuned:
        return f"that ends in a fine-tune of {tuned} epochs, after which the schedule cannot go on: finetune=none does"
    schedule = {**theirs.settings["schedule"], "epochs": epochs}
    as_long = dataclasses.replace(theirs, settings={**theirs.settings, "schedule": schedule})
    if why := difference(as_long, ours, ("processes",) if tuned else ("processes", "finetune")):
        return f"{why}; only schedule.epochs may differ" + ("" if tuned else ", and a fine-tune")
    if epochs < before:
        return f"of {before} epochs, more than schedule.epochs={epochs}; to go on it must be larger"
    if epochs == before:
        return ""
    if (config.schedule.average or 1) > 1:
        return f"with schedule.average={config.schedule.average}, which left the average of its weights, not the last"
    if config.schedule.name not in OPEN_ENDED:
        return (
            f"with schedule.name={config.schedule.name}, whose learning rates follow from schedule.epochs={before}: of "
            f"{epochs} epochs they differ from the first step on; {' and '.join(OPEN_ENDED)} can go on"
        )
    return ""


def _epochs(settings: dict | None, part: str) -> int | None:
    """What a config that was read says of the epochs of its schedule or fine-tune; None where it does not."""
    found = (settings or {}).get(part)
    found = found.get("epochs") if isinstance(found, dict) else None
    return found if type(found) is int else None
