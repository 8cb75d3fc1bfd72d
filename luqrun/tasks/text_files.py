"""Text files under dataset.root, plain or .gz: where they are, what tells them from others, and their lines."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.fingerprint import hash_of, sizes, whole_root


def root_folder(config: DatasetConfig, layout: str) -> Path:
    """dataset.root. Raises UserError where it is not given or not there. layout: what is expected in it, in words."""
    if config.root is None:
        raise UserError(f"dataset.root is not given; dataset={config.name} expects {layout}")
    root = Path(os.path.expanduser(config.root))
    if not root.is_dir():
        raise UserError(f"dataset.root={config.root}: there is no such folder; expected {layout}")
    return root


def find_file(root: Path, name: str) -> Path | None:
    """`name`, or else `name`.gz."""
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


def fingerprint_files(config: DatasetConfig, paths: Sequence[Path]) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data: names and sizes of the files."""
    names = [path.name.encode() for path in paths]
    return {"root": whole_root(config), "names_and_sizes": hash_of([*names, sizes([str(path) for path in paths])])}


def read_lines(path: Path) -> Iterator[str]:
    """The lines, each with its "\\n"; what else Unicode calls the end of a line is none. A mark of byte order is left
    out. Raises UserError for a file that cannot be read, and naming the line that is not UTF-8."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, path, number)
                yield text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged, or no gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} is {line[error.start]:#04x}"
        raise UserError(f"{path}, line {number}: not UTF-8 ({what})") from None
