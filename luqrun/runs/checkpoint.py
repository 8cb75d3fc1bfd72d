"""Checkpoints: written atomically, checked by a checksum, read with weights_only, refused by name when they do not fit.

A file is what torch.save writes and after it a line with the SHA-256 of that: torch.load reads it all the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs.folder import LAST, write_atomically
from luqrun.runs.identity import Identity, difference
from luqrun.runs.parent import why_not_on

VERSION = 4
EVER = {"version", "model", "optimizer", "progress"}  # the keys of every version; others' checkpoints have no progress
KEYS = EVER | {"identity"}
PREVIOUS, BEST = "previous.pt", "best.pt"
_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64
ADVICE = "give resume= another checkpoint, or study= another name"


class Damaged(UserError):
    """A file that is no checkpoint, or not any more."""


def save(
    path: Path,
    config: Config,
    data: dict,
    model: dict[str, Tensor],
    optimizer: dict,
    progress: dict[str, object],
    sizes: dict[str, int] | None = None,
) -> None:
    """Write a checkpoint; on a full disk the old file stays. What was last.pt is then previous.pt.

    data: the fingerprint of what is trained on (luqrun.runs.identity). sizes: what else is needed to build the network
    without luqrun, such as num_classes; nothing here reads it.
    """
    content = {
        **(sizes or {}),
        "version": VERSION,
        "identity": asdict(Identity.of(config, data)),
        "model": model,
        "optimizer": optimizer,
        "progress": progress,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(_MARK + digest.encode())
    path.parent.mkdir(exist_ok=True)
    if path.name == LAST and path.exists():
        _keep(path, path.with_name(PREVIOUS))
    write_atomically(path, buffer.getbuffer())


def _keep(path: Path, twin: Path) -> None:
    """Let `twin` be this file too, without a moment in which there is none."""
    temporary = twin.with_name(f".{twin.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(path, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(twin)
    temporary.unlink(missing_ok=True)  # it stays where both are one file already, after a save that failed


def is_checkpoint(path: Path) -> bool:
    """Whether a file ends as a checkpoint does."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TRAILER, 0))
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


def read(path: Path, advice: str = ADVICE) -> dict:
    """The content of a checkpoint, whatever run it is of. Raises Damaged, naming the file; no code in it is run.

    advice: what to do about one that is not read, the end of each error.
    """
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: no such file; {advice}") from None
    except OSError as error:
        raise Damaged(f"checkpoint {path} cannot be read ({error.strerror}); {advice}") from None
    if stored[-_TRAILER:-64] != _MARK:
        raise Damaged(f"checkpoint {path} is truncated or not a checkpoint of this version of luqrun; {advice}")
    if hashlib.sha256(memoryview(stored)[:-_TRAILER]).hexdigest().encode() != stored[-64:]:
        raise Damaged(f"checkpoint {path} is damaged: its content does not match its checksum; {advice}")
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler says
        raise Damaged(f"checkpoint {path} is not a checkpoint ({_line(error)}); {advice}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is int and version < VERSION:
        how = f"of an earlier luqrun (version {version} of checkpoints, here it is {VERSION}), and cannot be continued"
        raise UserError(f"checkpoint {path} is {how}; {advice}")
    if version != VERSION or not set(content) >= KEYS:
        raise Damaged(f"checkpoint {path} was not written by this version of luqrun; {advice}")
    return content


def load(path: Path, config: Config, data: dict, any_processes: bool = False, of_parent: bool = False) -> dict:
    """The content of a checkpoint that belongs to a run with this config and data, and by as many processes.

    Only a fine-tune that has not begun may differ: a 4-bit run can be continued with another one; and, with
    any_processes, their number; or what may differ where a run goes on with a finished one, its parent
    (luqrun.runs.parent). data: the fingerprint. Raises Damaged, or UserError for a foreign one, naming the file.
    """
    content = read(path)
    epoch, batch = content["progress"]["epoch"], content["progress"]["batch"]
    in_finetune = (epoch, batch) > (config.schedule.epochs, 0)
    besides = (() if in_finetune else ("finetune",)) + (("processes",) if any_processes else ())
    theirs, ours = Identity(**content["identity"]), Identity.of(config, data)
    if why := why_not_on(theirs, ours, config) if of_parent else difference(theirs, ours, besides):
        raise UserError(f"checkpoint {path} is of a run {why}; {ADVICE}")
    return content


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
