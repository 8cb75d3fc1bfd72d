"""Parallel text: two files of a split, a sentence a line, line by line the same; plain or .gz."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.fingerprint import hash_of, sizes, whole_root

# dataset.name: what its files are called, of training, validation and test; only the test files may be absent.
STEMS = {
    "parallel": ("train", "val", "test"),
    "multi30k": ("train", "val", "test_2016_flickr"),
    "wmt14": ("train", "newstest2013", "newstest2014"),
}
SPLITS = ("train", "val", "test")


class Pairs(NamedTuple):
    """Sentences and their translations, of the same number."""

    source: list[str]
    target: list[str]


def expected(config: DatasetConfig) -> str:
    """The layout that is looked for, in words."""
    train, val, test = STEMS[config.name]
    languages = f"{{{config.source},{config.target}}}"
    return f"ROOT/{{{train},{val}}}.{languages} and, for a test, ROOT/{test}.{languages}; each may be .gz"


def find_files(config: DatasetConfig) -> dict[str, tuple[Path, Path]]:
    """(source, target) of each split that is there. Raises UserError naming dataset.root, or a missing side."""
    if config.root is None:
        raise UserError(f"dataset.root is not given; dataset={config.name} expects {expected(config)}")
    root = Path(os.path.expanduser(config.root))
    if not root.is_dir():
        raise UserError(f"dataset.root={config.root}: there is no such folder; expected {expected(config)}")
    found = {}
    for split, stem in zip(SPLITS, STEMS[config.name], strict=True):
        sides = [_file(root, f"{stem}.{language}") for language in (config.source, config.target)]
        if split == "test" and sides == [None, None]:
            continue
        for side, language in zip(sides, (config.source, config.target), strict=True):
            if side is None:
                missing = f"there is no {stem}.{language} (or {stem}.{language}.gz)"
                raise UserError(f"dataset.root={config.root}: {missing}; expected {expected(config)}")
        found[split] = tuple(sides)
    return found


def _file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


def fingerprint(config: DatasetConfig) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data: names and sizes of the files."""
    paths = [str(path) for pair in find_files(config).values() for path in pair]
    names = [os.path.basename(path).encode() for path in paths]
    return {"root": whole_root(config), "names_and_sizes": hash_of([*names, sizes(paths)])}


def read_pairs(source: Path, target: Path) -> Pairs:
    """Both sides. Raises UserError for files of different lengths, and naming a line that is empty or not UTF-8."""
    sides = Pairs(_lines(source), _lines(target))
    counts = len(sides.source), len(sides.target)
    if counts[0] != counts[1]:
        raise UserError(
            f"{source} has {counts[0]} lines, {target} has {counts[1]}: each line must have its translation"
        )
    if not counts[0]:
        raise UserError(f"{source} and {target} are empty")
    for path, lines in zip((source, target), sides, strict=True):
        empty = [number for number, line in enumerate(lines, 1) if not line]
        if empty:
            more = f", and {len(empty) - 1} more" if empty[1:] else ""
            raise UserError(f"{path}: line {empty[0]} is empty{more}; each must hold a sentence")
    return sides


def _lines(path: Path) -> list[str]:
    """The lines without space around them. What else breaks lines in Unicode does not here."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error.__class__.__name__}: {error})") from None
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(" ".join(line.decode("utf-8-sig" if number == 1 else "utf-8").split()))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason})") from None
    return found
