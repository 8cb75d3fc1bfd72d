"""Checkpoints: written atomically, checked by a checksum, read with weights_only, refused by name when they do not fit.

A file is what torch.save writes and after it a line with the SHA-256 of that: torch.load reads it all the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from luqrun import RESULTS
from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs.folder import what_decides_the_result, write_atomically
from luqrun.runs.identity import other_results

VERSION = 4
KEYS = {"version", "results", "config", "num_classes", "data", "model", "optimizer", "progress"}
NOT_COMPARED = ("root", "left_out")  # of the data's fingerprint: where they lie, and what was passed over
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64
ADVICE = "give resume= another checkpoint, or study= another name"


class Damaged(UserError):
    """A file that is no checkpoint, or not any more."""


def save(
    path: Path, config: Config, data: dict, model: dict[str, Tensor], optimizer: dict, progress: dict[str, object]
) -> None:
    """Write a checkpoint; on a full disk the old file stays. What was last.pt is then previous.pt.

    data: by which other data are told from these, as plain numbers and strings (luqrun.tasks.task.Data.fingerprint).
    """
    content = {
        "version": VERSION,
        "results": RESULTS,
        "config": what_decides_the_result(config),
        "num_classes": data.get("classes"),  # for who builds the network without luqrun
        "data": data,
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


def read(path: Path) -> dict:
    """The content of a checkpoint, whatever run it is of. Raises Damaged, naming the file; no code in it is run."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: no such file; {ADVICE}") from None
    except OSError as error:
        raise Damaged(f"checkpoint {path} cannot be read ({error.strerror}); {ADVICE}") from None
    if stored[-_TRAILER:-64] != _MARK:
        raise Damaged(f"checkpoint {path} is truncated or not a checkpoint of this version of luqrun; {ADVICE}")
    if hashlib.sha256(memoryview(stored)[:-_TRAILER]).hexdigest().encode() != stored[-64:]:
        raise Damaged(f"checkpoint {path} is damaged: its content does not match its checksum; {ADVICE}")
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler says
        raise Damaged(f"checkpoint {path} is not a checkpoint ({_line(error)}); {ADVICE}") from None
    if isinstance(content, dict) and content.get("version") == 2:  # it knows no RESULTS
        raise UserError(f"checkpoint {path} is {other_results(1)}; {ADVICE}")
    if not isinstance(content, dict) or set(content) != KEYS or content["version"] != VERSION:
        raise Damaged(f"checkpoint {path} was not written by this version of luqrun; {ADVICE}")
    return content


def load(path: Path, config: Config, data: dict) -> dict:
    """The content of a checkpoint that belongs to a run with this config and data.

    Only a fine-tune that has not begun may differ: a 4-bit run can be continued with another one; and the number of
    processes. Raises Damaged, or UserError for a foreign one, naming the file.
    """
    content = read(path)
    if why := other_results(content["results"]):
        raise UserError(f"checkpoint {path} is {why}; {ADVICE}")
    for key, (theirs, ours) in _differences(content["data"], data).items():
        if key == "digest":
            other = f"dataset.root={config.dataset.root} holds others, or of other names"
            raise UserError(f"checkpoint {path} was trained on other data: {other}; {ADVICE}")
        if key not in NOT_COMPARED:
            ours = f"dataset={config.dataset.name} has {ours}"
            raise UserError(f"checkpoint {path} was trained on data with {theirs} {key}, {ours}; {ADVICE}")
    epoch, batch = content["progress"]["epoch"], content["progress"]["batch"]
    in_finetune = (epoch, batch) > (config.schedule.epochs, 0)
    for key, (theirs, ours) in _differences(content["config"], what_decides_the_result(config)).items():
        if in_finetune or not key.startswith("finetune."):
            raise UserError(f"checkpoint {path} was trained with {key}={theirs}, this run has {key}={ours}; {ADVICE}")
    return content


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]


def _differences(theirs: dict, ours: dict, prefix: str = "") -> dict[str, tuple]:
    """Dotted keys on which two nested dicts disagree, with both values."""
    found = {}
    for key in sorted(theirs.keys() | ours.keys()):
        left, right = theirs.get(key), ours.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found[prefix + key] = (left, right)
    return found
