"""The images of a split, ROOT/train say, found by walking through its class folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from luqrun.errors import UserError
from luqrun.tasks.fingerprint import hash_of, sizes

SHOWN = 4  # kinds of files that are left out


@dataclass
class Split:
    """classes: sorted names. paths, labels: of the images, class by class, as torchvision's ImageFolder orders them."""

    folder: Path
    classes: list[str]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    def parts(self) -> Iterator[bytes]:
        """What its hash is made of: class names, labels, file names, and the sizes of some files."""
        yield "\0".join(self.classes).encode(errors="surrogateescape")
        above = len(str(self.folder)) + 1
        yield b"\0".join(os.fsencode(path[above:]) for path in self.paths)
        yield sizes(self.paths)


def names_and_sizes(*splits: Split) -> str:
    """One hash of several splits."""
    return hash_of(part for split in splits for part in split.parts())


def scan(folder: Path) -> Split:
    """The class folders in `folder` and all images below them. What begins with a dot is neither.

    Links are followed, and a folder that is reached again within its class is looked at once. Raises UserError where
    one is reached from two classes, and where a folder cannot be read.
    """
    try:
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder))
    except OSError as error:
        raise _unreadable(error) from None
    names = [name for name, is_folder in entries if is_folder and not _hidden(name)]
    found = Split(folder, names)
    for name, _ in entries:
        if name not in names:
            found.left_out["hidden" if _hidden(name) else "beside the class folders"] += 1
    owners: dict[tuple[int, int], str] = {}
    for label, name in enumerate(names):
        for directory, files in sorted(_walk(str(folder / name), name, owners, found.left_out)):
            for file in sorted(files):
                if _is_image(file):
                    found.paths.append(os.path.join(directory, file))
                    found.labels.append(label)
                else:
                    kind = "hidden" if _hidden(file) else os.path.splitext(file)[1].lower() or "without a suffix"
                    found.left_out[kind] += 1
    return found


def _walk(
    top: str, name: str, owners: dict[tuple[int, int], str], left_out: Counter
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of `top`, the folder of class `name`, and of all below it.

    owners: by device and inode, the class from which a folder was reached first.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from None

    for directory, below, files in os.walk(top, followlinks=True, onerror=refuse):
        status = os.stat(directory)
        owner = owners.setdefault((status.st_dev, status.st_ino), (name, directory))
        if owner[0] != name:
            raise UserError(
                f"dataset.root: {directory} is {owner[1]} by a link, so that its images would be of two classes, "
                f"{owner[0]} and {name}"
            )
        if owner[1] != directory:
            left_out["folders that a link leads to again"] += 1
            below.clear()
            continue
        left_out["hidden"] += sum(map(_hidden, below))
        # Links last: what they lead to again is what they lose.
        shown = (each for each in below if not _hidden(each))
        below[:] = sorted(shown, key=lambda each: (os.path.islink(os.path.join(directory, each)), each))
        yield directory, files


def _unreadable(error: OSError) -> UserError:
    return UserError(f"dataset.root: {error.filename} cannot be read ({error.strerror})")


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _is_image(name: str) -> bool:
    return not _hidden(name) and name.lower().endswith(IMG_EXTENSIONS)


def told(left_out: Counter) -> str:
    """Such as "12 .gif, 2 hidden"; "" where nothing is left out."""
    kinds = (+left_out).most_common()  # without the zeros
    shown = [f"{count:,} {kind}" for kind, count in kinds[:SHOWN]]
    return ", ".join(shown + ([f"{sum(count for _, count in kinds[SHOWN:]):,} more"] if kinds[SHOWN:] else []))
