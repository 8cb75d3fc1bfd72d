"""The fingerprint of a data set: by which a run that reads other data is told from this one, without reading them.

A dict of plain JSON: `root` says where the data lie, all else what they are (counts as integers, and a hash of names
and sizes). It is a part of the run's identity and the name of its folder (luqrun.runs.identity), so that it must be had
quickly, and is empty for data that follow from the settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

from luqrun.config import Config, DatasetConfig

SAMPLES = 1024  # files of a split whose size is asked for: a network file system takes a while for each


def fingerprint(config: Config) -> dict:
    """Of what a run reads; {} where it reads nothing, or what follows from its settings.

    Raises UserError naming dataset.root, or what is wrong there. Found once in a process: the trainer
    notices data that have changed since.
    """
    if config.task != "train":
        return {}
    from luqrun.tasks.classification.data import fingerprint_dataset

    dataset = config.dataset
    key = dataset.name, dataset.root, os.getcwd()
    if key not in _found:
        _found[key] = fingerprint_dataset(dataset)
    return _found[key]


_found: dict[tuple, dict] = {}


def whole_root(config: DatasetConfig) -> str | None:
    """dataset.root as an absolute path without links, or None where it is not given."""
    return None if config.root is None else os.path.realpath(os.path.expanduser(config.root))


def hash_of(parts: Iterable[bytes]) -> str:
    """16 hex digits of a hash over the parts and where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()[:16]


def sizes(paths: Sequence[str]) -> bytes:
    """The sizes in bytes, as JSON, of at most SAMPLES of these files, evenly spaced, with the first and the last."""
    steps = min(len(paths), SAMPLES) - 1
    chosen = [round(step * (len(paths) - 1) / max(steps, 1)) for step in range(steps + 1)]
    return json.dumps([os.stat(paths[index]).st_size for index in chosen]).encode()
