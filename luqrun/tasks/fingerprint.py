"""What was found of a data set: how much of it, and a digest by which other images are told from these."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from luqrun.config import DatasetConfig

SAMPLES = 64  # images of a split whose content is part of the digest: reading all would take as long as training


@dataclass(frozen=True)
class Found:
    """Counts are of all images, before dataset.limit. root: the whole path, None for generated images; digest: hex, of
    class names, labels, file names and the content of some images; left_out: what was no image, in words."""

    root: str | None
    classes: int
    train: int
    val: int
    digest: str
    left_out: str = ""


def differing(recorded: dict, found: Found) -> str:
    """How what run.json recorded of a data set differs from what is found now, in words; "" where it does not."""
    for name, words in (("classes", "classes"), ("train", "training images"), ("val", "validation images")):
        if recorded.get(name) != getattr(found, name):
            return f"{recorded.get(name)} {words} instead of {getattr(found, name)}"
    return "" if recorded.get("digest") == found.digest else "other images or class names"


def whole_root(config: DatasetConfig) -> str | None:
    """dataset.root as an absolute path without links, or None where it is not given."""
    return None if config.root is None else os.path.realpath(os.path.expanduser(config.root))


def digest(parts: Iterable[bytes]) -> str:
    """16 hex digits of a hash over the parts and where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()[:16]


def sampled(count: int) -> Sequence[int]:
    """Indices, evenly spaced, of at most SAMPLES of `count` images; the first and the last are among them."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).round().astype(np.int64)).tolist()
