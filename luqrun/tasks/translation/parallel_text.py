"""Parallel text: two files of a split, a sentence a line, line by line the same; plain or .gz."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.text_files import find_file, fingerprint_files, read_lines, root_folder

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
    root, found = root_folder(config, expected(config)), {}
    for split, stem in zip(SPLITS, STEMS[config.name], strict=True):
        sides = [find_file(root, f"{stem}.{language}") for language in (config.source, config.target)]
        if split == "test" and sides == [None, None]:
            continue
        for side, language in zip(sides, (config.source, config.target), strict=True):
            if side is None:
                missing = f"there is no {stem}.{language} (or {stem}.{language}.gz)"
                raise UserError(f"dataset.root={config.root}: {missing}; expected {expected(config)}")
        found[split] = tuple(sides)
    return found


def fingerprint(config: DatasetConfig) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data: names and sizes of the files."""
    return fingerprint_files(config, [path for pair in find_files(config).values() for path in pair])


def read_pairs(source: Path, target: Path) -> Pairs:
    """Both sides, a sentence with single spaces in it and none around it. Raises UserError for files of different
    lengths, and naming a line that is empty or not UTF-8."""
    sides = Pairs(*([" ".join(line.split()) for line in read_lines(path)] for path in (source, target)))
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
            raise UserError(f"{path}, line {empty[0]}: empty{more}; each line must hold a sentence")
    return sides
