"""The run folder: outputs/<study>/<run_id>/, its lock, and the small files in it as the run writes them.

How a folder is named: luqrun.runs.identity; how it is read: luqrun.runs.reading.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from luqrun import __version__
from luqrun.errors import UserError
from luqrun.runs.metric import Metric
from luqrun.runs.reading import METRICS, RUN, SUMMARY, Missing, Unusable, metric_of, read_json

EVENTS = "events.out.tfevents.*"
LOCK = ".lock"
LAST = "last.pt"  # of the checkpoints
PREDICTIONS = "predictions"
TOKENIZER = "tokenizer.json"  # of text: the subwords
PACKAGES = ("torchvision", "hydra-core", "omegaconf", "numba", "tensorboard", "numpy")  # whose versions are recorded
OF_TEXT = ("transformers", "tokenizers", "sacrebleu")  # and of these, where they are there

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process, or another part of this one, runs this run."""


_held: set[tuple[int, int, int]] = set()  # the locks of this process, and of those it was forked from: `_identity_of`


def _identity_of(file: int | Path) -> tuple[int, int, int]:
    """(process, device, inode): a process that was forked holds none of its parent's locks."""
    status = os.stat(file)
    return os.getpid(), status.st_dev, status.st_ino


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or, after a crash or on a full disk, as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to an open file does not say which
        raise


def _lock(file: IO) -> None:
    """Lock it, with some patience: who only asks whether it is locked holds it for an instant."""
    for wait in (0.005, 0.01, 0.02, None):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, workers do not inherit it
            return
        except (BlockingIOError, PermissionError):
            if wait is None:
                raise
            time.sleep(wait)


class RunFolder:
    """Reads and writes the files of one run. `path` must exist.

    writes: False in the other processes of a distributed run, where changes are left to the first.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.checkpoints = self.path / "checkpoints"

    def summary(self) -> dict | None:
        """summary.json, or None for a run that has not finished."""
        return self._read(SUMMARY)

    def run(self) -> dict:
        """run.json, or {} for a run that has not started."""
        return self._read(RUN) or {}

    def metric(self) -> Metric:
        """By what the run is judged."""
        return metric_of(self.run())

    def _read(self, name: str) -> dict | None:
        try:
            return read_json(self.path, name)
        except Missing:
            return None
        except Unusable as reason:
            raise self.damaged(str(reason)) from None

    def damaged(self, reason: str) -> UserError:
        """The error that a file of this folder is not what luqrun wrote; reason: which, and why."""
        return UserError(f"{self.path}: {reason}: delete it, and the run goes on from its checkpoint")

    def write_json(self, name: str, content: dict) -> None:
        if self.writes:
            write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """name: may be of a file in a folder, which is made."""
        if self.writes:
            (self.path / name).parent.mkdir(exist_ok=True)
            write_atomically(self.path / name, text.encode())

    def keep(self, name: str, text: str) -> None:
        """Write a file that a run needs as it was. Raises UserError where the folder has another one of a run that
        goes on."""
        path = self.path / name
        if self.writes and self.begun() and path.is_file() and path.read_text() != text:
            how = "what its data give now, as with another version of a library: a checkpoint does not fit that"
            raise UserError(f"{path} is not {how}; study=NAME begins the run anew")
        self.write_text(name, text)

    def update_run(self, **fields) -> None:
        """Change fields of run.json."""
        if self.writes:
            self.write_json(RUN, {**self.run(), **fields})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no one else run this run meanwhile: Busy where one does. Of a dead process nothing is left."""
        if self._is_ours():
            raise Busy(f"{self.path} is being run by this process already")
        with (self.path / LOCK).open("a+") as file:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise Busy(f"{self.path} is being run by another process ({file.read().strip()})") from None
            except OSError as error:
                log.warning(
                    "%s cannot be locked (%s): take care that no second process runs this run", self.path, error
                )
            key = _identity_of(file.fileno())
            _held.add(key)
            try:
                # What a process left that was killed while it wrote.
                folders = self.path, self.checkpoints, self.path / PREDICTIONS
                for left in [path for folder in folders for path in folder.glob(".*.[0-9]*")]:
                    left.unlink(missing_ok=True)
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {platform.node()}\n")
                file.flush()
                yield
            finally:
                _held.discard(key)

    def is_locked(self) -> bool:
        """Whether a process runs this run: another one, or this one."""
        try:
            if self._is_ours():
                return True
            with (self.path / LOCK).open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # none there, or a file system without locks
            return False
        return False

    def _is_ours(self) -> bool:
        """Whether this process holds the lock: then its file must not be opened here, as closing any handle of a file
        gives up the process' locks of it (POSIX)."""
        try:
            return _identity_of(self.path / LOCK) in _held
        except OSError:
            return False

    def remove_if_never_started(self) -> None:
        """Remove the folder where it holds nothing but its log and its lock."""
        if not self.writes:
            return
        names = {path.name for path in self.path.iterdir()}
        if names <= {"run.log", LOCK}:
            try:
                with self.locked():
                    for name in names:
                        (self.path / name).unlink()
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()
            except Busy:
                return  # a process has just begun there

    def append_metrics(self, row: dict) -> None:
        """Add a line to metrics.jsonl, at once on disk."""
        assert self.writes
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl: a checkpoint remembers them."""
        path = self.path / METRICS
        return path.stat().st_size if path.exists() else 0

    def ended(self) -> bool:
        """Whether there is a result: of a run that has finished, or diverged."""
        return self.summary() is not None or self.run().get("status") == "diverged"

    def begun(self) -> bool:
        """Whether there is something of a run that has not ended: a checkpoint, or lines of metrics."""
        return self.checkpoints.exists() or self.metrics_size() > 0

    def goes_on_by_itself(self) -> bool:
        """Whether there is a checkpoint or a result here, so that no other run's checkpoint is needed."""
        if any((self.checkpoints / name).exists() for name in ("last.pt", "previous.pt")):
            return True
        return self.ended()

    def truncate_metrics(self, size: int) -> None:
        """Forget the lines written after the checkpoint that a run resumes from."""
        path = self.path / METRICS
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)

    def written(self) -> dict[str, object]:
        """How long metrics.jsonl and each file of TensorBoard curves is: a checkpoint remembers it."""
        events = {path.name: path.stat().st_size for path in self.path.glob(EVENTS)}
        return {"metrics_bytes": self.metrics_size(), "event_bytes": events}

    def rewind(self, written: dict[str, object]) -> None:
        """Forget what was written after the checkpoint that a run resumes from; {}: all. Some of it may repeat a step.

        A file of curves that the checkpoint does not know was begun after it, and goes.
        """
        if not self.writes:
            return
        self.truncate_metrics(written.get("metrics_bytes", 0))
        if written and "event_bytes" not in written:
            return  # the checkpoint of an earlier commit: TensorBoard's own purge must do
        sizes = written.get("event_bytes", {})
        for path in self.path.glob(EVENTS):
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[path.name]:
                os.truncate(path, sizes[path.name])


def now() -> str:
    """The time for run.json, ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def provenance() -> dict:
    """Versions (torch's with its local part, as +cu130) and, in a checkout, the git commit and whether the tree was
    changed."""
    from importlib.metadata import PackageNotFoundError, version  # with it --help would take longer

    import torch  # here, as reading run folders needs none

    versions = {"python": platform.python_version(), "luqrun": __version__, "torch": str(torch.__version__)}
    versions |= {package: version(package) for package in PACKAGES}
    for package in OF_TEXT:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "command": sys.argv,
        **_git(),
    }


def _git() -> dict:
    here = Path(__file__).resolve().parents[2]
    unknown = {"git_commit": None, "git_dirty": None}
    if not (here / "pyproject.toml").exists():
        return unknown  # installed: any repository around it is somebody else's
    try:
        commit, status = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", here, *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return {"git_commit": commit, "git_dirty": bool(status)}
