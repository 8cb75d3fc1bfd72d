"""Where a run starts from: its own last checkpoint, the one before it, or that of another run (resume=PATH, base)."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from luqrun.config import Config, FinetuneConfig
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import Identity, difference, run_id, runs_beside
from luqrun.runs.parent import is_same, last_checkpoint, parent_checkpoint, parent_folder
from luqrun.runs.reading import RUN, usable_run

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """content: of a checkpoint (checkpoint.load), read from `path`; own: whether it is of this run's own folder."""

    content: dict
    path: Path
    own: bool


def find_start(config: Config, folder: RunFolder, data: dict) -> Start | None:
    """The checkpoint that `resume` and the folder ask for; None for a run that begins. data: the fingerprint.

    Of a damaged last checkpoint the previous one takes the place, with a warning. Raises UserError, naming the file.
    """
    wanted, own = config.resume, folder.checkpoints / checkpoint.LAST
    previous = folder.checkpoints / checkpoint.PREVIOUS
    if not own.exists() and not previous.exists():
        if wanted == "base" and config.finetune.epochs > 0:
            path = base_checkpoint(config, folder, data)
            return _foreign(checkpoint.load(path, config, data), path, config, folder, data)
        parent = parent_folder(wanted)
        if wanted in ("auto", "never", "base") or (parent and is_same(parent, folder.path)):
            return None
        if parent:
            path = parent_checkpoint(config)
            return _foreign(checkpoint.load(path, config, data, of_parent=True), path, config, folder, data)
        path = Path(os.path.expanduser(wanted))
        return _foreign(checkpoint.load(path, config, data, any_processes=True), path, config, folder, data)
    if wanted == "never":
        raise UserError(f"resume=never, but {own.parent} exists: choose another study=, or delete the run folder")
    if wanted not in ("auto", "base"):
        log.warning("this run has a checkpoint of its own: resume=%s is not needed any more", wanted)
    try:
        return Start(checkpoint.load(own, config, data), own, own=True)
    except checkpoint.Damaged as damaged:
        if not previous.exists():
            raise
        try:
            start = Start(checkpoint.load(previous, config, data), previous, own=True)
        except checkpoint.Damaged as other:
            both = " and ".join(str(error).removesuffix(f"; {checkpoint.ADVICE}") for error in (damaged, other))
            raise UserError(f"{both}; delete {own.parent} to start over, or give study= another name") from None
        log.warning("%s. Going on from the one before, %s", damaged, previous)
        if own.exists():
            own.replace(own.with_name("damaged.pt"))  # not to be kept as the one before the next
        return start


def _foreign(content: dict, path: Path, config: Config, folder: RunFolder, data: dict) -> Start:
    """A start from another run's checkpoint, which run.json names: by its run folder, where it lies in one."""
    parent = path.parent.parent if (path.parent.parent / RUN).is_file() else path
    folder.update_run(parent=os.path.relpath(parent, folder.path))  # so that outputs/ can be moved as a whole
    if content["progress"].get("best") is not None and folder.writes:
        _take_over_best(content, path.with_name(checkpoint.BEST), config, folder, data)
    return Start(content, path, own=False)


def _take_over_best(content: dict, path: Path, config: Config, folder: RunFolder, data: dict) -> None:
    """Make the best.pt beside a checkpoint this run's own: it counts those epochs as its own, and none of them may be
    surpassed. content: of the checkpoint."""
    value = content["progress"]["best"]
    try:
        best = checkpoint.read(path)
        same_run = not difference(Identity(**best["identity"]), Identity(**content["identity"]))
        why = "" if same_run and best["progress"].get("best") == value else f"{path} is not of these epochs"
    except UserError as error:
        why = str(error).removesuffix(f"; {checkpoint.ADVICE}")
    if why:
        log.warning("%s: there is no %s before an epoch is better than %g", why, checkpoint.BEST, value)
        return
    sizes = {name: value for name, value in best.items() if name not in checkpoint.KEYS}
    parts = (best[name] for name in ("model", "optimizer", "progress"))
    checkpoint.save(folder.checkpoints / checkpoint.BEST, config, data, *parts, sizes)


def diverged_base(config: Config, folder: RunFolder, data: dict) -> Path | None:
    """For resume=base: the run without fine-tune, if it diverged; then the one with it does, at the same step."""
    if config.resume != "base" or config.finetune.epochs == 0:
        return None
    base, run = _base(config, folder, data)
    if run.get("status") != "diverged":
        return None
    if why := difference(Identity.stored(None, run), Identity.of(config, data)):
        raise UserError(f"resume=base: {base} is a run {why}: study=NAME trains it anew")
    return base


def check_base(config: Config, folder: RunFolder, data: dict, planned: Collection[Path] = ()) -> None:
    """Raise UserError where resume=base has no run to start from: none that has ended, and none of these folders, which
    will have one by then."""
    if config.resume != "base" or config.finetune.epochs == 0 or _base(config, folder, data)[0] in planned:
        return
    if diverged_base(config, folder, data) is None:
        base_checkpoint(config, folder, data)


def base_checkpoint(config: Config, folder: RunFolder, data: dict) -> Path:
    """For resume=base: the last checkpoint of the run that is this one without its fine-tune, in the same study."""
    base, run = _base(config, folder, data)
    path = last_checkpoint(base, run)
    status, advice = run.get("status", "not there"), "run the same with finetune=none first"
    if status == "finished":
        if path.is_file():
            return path
        status, advice = f"finished, but {path} is gone", "resume=auto trains both phases in one run"
    others = runs_beside(_without_finetune(config), data, base)
    raise UserError(
        f"resume=base: the run without fine-tuning, {base}, is {status}: {advice}{others and f' ({others})'}"
    )


def _without_finetune(config: Config) -> Config:
    return dataclasses.replace(config, finetune=FinetuneConfig(name="none"))


def _base(config: Config, folder: RunFolder, data: dict) -> tuple[Path, dict]:
    """The folder of the run without fine-tune, and its run.json."""
    base = folder.path.parent / run_id(_without_finetune(config), data)
    return base, usable_run(base)
