"""What is made from the training data and takes a while, such as a tokenizer, kept in the user's cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from luqrun.runs.folder import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")


def cache_folder() -> Path:
    """XDG_CACHE_HOME/luqrun, by default ~/.cache/luqrun; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luqrun"


def cached_text(name: str, read: Callable[[str], T], make: Callable[[], str]) -> T:
    """read(the text of the file `name`); where it is not there, or `read` refuses it, read(make()), which is kept.

    name: says what the text follows from, such as a hash of it.
    """
    file = cache_folder() / name
    try:
        return read(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except Exception as error:  # whatever the library that reads it raises
        log.warning("%s is damaged and is made again (%s)", file, " ".join(str(error).split())[:100])
    text = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text.encode())
    except OSError as error:
        log.warning("cannot keep %s (%s): it is made again each time", file, error.strerror)
    return read(text)
