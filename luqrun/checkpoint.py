"""Checkpoints: written atomically, read with weights_only, refused by name when they do not fit."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from luqrun.config import Config
from luqrun.datasets import Data
from luqrun.errors import UserError
from luqrun.run_folder import what_decides_the_result, write_atomically

VERSION = 1
KEYS = {"version", "config", "num_classes", "num_images", "model", "optimizer", "progress"}


def save(
    path: Path, config: Config, data: Data, model: dict[str, Tensor], optimizer: dict, progress: dict[str, object]
) -> None:
    """Write a checkpoint; on a full disk the old file stays."""
    content = {
        "version": VERSION,
        "config": what_decides_the_result(config),
        "num_classes": len(data.classes),
        "num_images": [len(data.train), len(data.val)],
        "model": model,
        "optimizer": optimizer,
        "progress": progress,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load(path: Path, config: Config, data: Data) -> dict:
    """The content of a checkpoint that belongs to a run with this config and data.

    Only a fine-tune that has not begun may differ: a 4-bit run can be continued with another one. Raises UserError,
    naming the file, for a missing, damaged or foreign one.
    """
    advice = "give resume= another checkpoint, or study= another name"
    num_classes, num_images = len(data.classes), [len(data.train), len(data.val)]
    if not path.is_file():
        raise UserError(f"resume={path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler says of bytes that are no checkpoint, OSError among it
        raise UserError(f"checkpoint {path} is truncated or not a checkpoint ({_line(error)}); {advice}") from None
    if not isinstance(content, dict) or set(content) != KEYS or content["version"] != VERSION:
        raise UserError(f"checkpoint {path} was not written by this version of luqrun; {advice}")
    if content["num_classes"] != num_classes:
        raise UserError(
            f"checkpoint {path} has {content['num_classes']} classes, dataset={config.dataset.name} has {num_classes}; "
            f"{advice}"
        )
    if content["num_images"] != num_images:
        theirs, ours = ("{} training and {} validation images".format(*n) for n in (content["num_images"], num_images))
        raise UserError(
            f"checkpoint {path} was trained on {theirs}, dataset={config.dataset.name} has {ours}; {advice}"
        )
    epoch, batch = content["progress"]["epoch"], content["progress"]["batch"]
    in_finetune = (epoch, batch) > (config.schedule.epochs, 0)
    for key, (theirs, ours) in _differences(content["config"], what_decides_the_result(config)).items():
        if in_finetune or not key.startswith("finetune."):
            raise UserError(f"checkpoint {path} was trained with {key}={theirs}, this run has {key}={ours}; {advice}")
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
