"""Where a run goes on: its own last checkpoint, the one before it, or that of another run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder
from luqrun.runs.twins import base_checkpoint

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """content: of a checkpoint (checkpoint.load), read from `path`; own: whether it is of this run's own folder."""

    content: dict
    path: Path
    own: bool


def find_start(config: Config, folder: RunFolder, data: dict[str, object]) -> Start | None:
    """The checkpoint that `resume` and the folder ask for; None for a run that begins. data: as checkpoint.load's.

    Of a damaged last checkpoint the previous one takes the place, with a warning. Raises UserError, naming the file.
    """
    wanted, own = config.resume, folder.checkpoints / checkpoint.LAST
    previous = folder.checkpoints / checkpoint.PREVIOUS
    if not own.exists() and not previous.exists():
        based = wanted == "base" and config.finetune.epochs > 0
        if wanted in ("auto", "never", "base") and not based:
            return None
        path = base_checkpoint(config, folder) if based else Path(os.path.expanduser(wanted))
        return Start(checkpoint.load(path, config, data), path, own=False)
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
