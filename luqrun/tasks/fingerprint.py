"""Parts of a data set's fingerprint (luqrun.tasks.fingerprint_data): where it lies, and a hash of names and sizes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

from luqrun.config import DatasetConfig

SAMPLES = 1024  # files of a split whose size is asked for: a network file system takes a while for each


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
    return json.dumps([_size(paths[index]) for index in chosen]).encode()


def _size(path: str) -> int:
    """-1 of a link that leads nowhere, as of what cannot be looked at: whoever reads it says so."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
