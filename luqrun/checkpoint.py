"""Checkpoints: written atomically, read with weights_only, refused by name when they do not fit."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import torch

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.run_folder import what_decides_the_result, write_atomically

VERSION = 1
KEYS = {"version", "config", "num_classes", "model", "optimizer", "progress"}


def save(path: Path, config: Config, num_classes: int, model: dict, optimizer: dict, progress: dict) -> None:
    """Write a checkpoint; on a full disk the old file stays."""
    content = {
        "version": VERSION,
        "config": what_decides_the_result(config),
        "num_classes": num_classes,
        "model": model,
        "optimizer": optimizer,
        "progress": progress,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue())


def copy(source: Path, target: Path) -> None:
    """A second name for a checkpoint, replaced at once."""
    temporary = target.with_name(f".{target.name}.copy")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def load(path: Path, config: Config, num_classes: int) -> dict:
    """The content of a checkpoint that belongs to a run with this config.

    Only a fine-tune that has not begun may differ: a 4-bit run can be continued with another one. Raises UserError,
    naming the file, for a missing, damaged or foreign one.
    """
    advice = "delete it to start over, or give resume= another checkpoint"
    if not path.is_file():
        raise UserError(f"resume={path}: no such file; allowed: auto, never, or the path of a checkpoint (.pt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is truncated or not a checkpoint ({_line(error)}); {advice}") from None
    if not isinstance(content, dict) or set(content) != KEYS or content["version"] != VERSION:
        raise UserError(f"checkpoint {path} was not written by this version of luqrun; {advice}")
    if content["num_classes"] != num_classes:
        raise UserError(
            f"checkpoint {path} has {content['num_classes']} classes, dataset={config.dataset.name} has {num_classes}; "
            f"{advice}"
        )
    in_finetune = content["progress"]["epoch"] > config.schedule.epochs
    for key, (theirs, ours) in _differences(content["config"], what_decides_the_result(config)).items():
        if in_finetune or not key.startswith("finetune."):
            raise UserError(f"checkpoint {path} was trained with {key}={theirs}, this run has {key}={ours}; {advice}")
    return content


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


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
