"""The run folder: outputs/<study>/<run_id>/ and the small files in it.

run_id has no clock: it is readable and ends in a hash of everything that changes the result, so a repeated command
finds its own folder again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from luqrun import __version__
from luqrun.config import Config, DistributedConfig
from luqrun.errors import UserError

# What the same run may be given differently: where it runs, where its data lie, what it writes.
NOT_IN_RESULT = {
    "": ("study", "resume", "reuse", "cell", "device", "compile", "tracking"),
    "dataset": ("root", "workers"),
    "schedule": ("finetune_lr",),  # acts through finetune.lr_base alone
}
MAX_NAME = 200  # bytes; file systems take 255
SUMMARY = "summary.json"
RUN = "run.json"
METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents.*"
LOCK = ".lock"

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process runs this run."""


def what_decides_the_result(config: Config) -> dict:
    """The resolved config as a dict, without what does not change the result."""
    return of_the_result(asdict(config))


def of_the_result(config: dict) -> dict:
    """`what_decides_the_result` of a config read from a file, of which any part may be missing or damaged."""
    if config.get("job") == "rounding":  # nothing is trained
        return {name: config.get(name) for name in ("job", "quant", "seed")}
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    parts = {part: values.get(part) if isinstance(values.get(part), dict) else {} for part in ("dataset", "finetune")}
    root = parts["dataset"].get("root")
    for part, names in NOT_IN_RESULT.items():
        of = values.get(part) if part else values
        for name in names if isinstance(of, dict) else ():
            of.pop(name, None)
    if values.get("distributed") == asdict(DistributedConfig()):  # the only choice that one process has
        values.pop("distributed")
    if parts["finetune"].get("epochs") == 0:
        values["finetune"] = {"epochs": 0}
    if parts["dataset"].get("name") == "folder" and root is not None:
        parts["dataset"]["root"] = _whole_path(root)  # here the root is the data set
    return values


def _whole_path(root) -> object:
    """Without links; as it is where it is no path (of a damaged file)."""
    try:
        return os.path.realpath(root)
    except (TypeError, ValueError):
        return root


def run_id(config: Config) -> str:
    """Such as resnet8-glyphs-luq-fnt3-seed0-1f2e3d4c: the parts' names, and 8 digits of the hash."""
    text = json.dumps(what_decides_the_result(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    if config.job == "rounding":
        names = [config.job, config.quant.name]
    else:
        names = [config.model.name, config.dataset.name, config.quant.name]
        names += [config.finetune.name] if config.finetune.epochs else []
    readable = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", str(name)) for name in [*names, f"seed{config.seed}"])
    return f"{readable[:MAX_NAME]}-{digest}"


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

    def _read(self, name: str) -> dict | None:
        path = self.path / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise self.damaged(name, str(error)) from None
        if not isinstance(content, dict):
            raise self.damaged(name, f"it holds a {type(content).__name__}")
        return content

    def damaged(self, name: str, why: str) -> UserError:
        """The error that a file of this folder is not what luqrun wrote."""
        return UserError(f"{self.path / name} is damaged ({why}): delete it, and the run goes on from its checkpoint")

    def write_json(self, name: str, content: dict) -> None:
        if self.writes:
            write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def update_run(self, **fields) -> None:
        """Change fields of run.json."""
        if self.writes:
            self.write_json(RUN, {**self.run(), **fields})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process run this run meanwhile: Busy where one does. Of a dead process nothing is left."""
        with (self.path / LOCK).open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, workers do not inherit it
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise Busy(f"{self.path} is being run by another process ({file.read().strip()})") from None
            except OSError as error:
                log.warning(
                    "%s cannot be locked (%s): take care that no second process runs this run", self.path, error
                )
            # What a process left that was killed while it wrote.
            for left in [*self.path.glob(".*.[0-9]*"), *self.checkpoints.glob(".*.[0-9]*")]:
                left.unlink(missing_ok=True)
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether another process runs this run."""
        try:
            with (self.path / LOCK).open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # none there, or a file system without locks
            return False
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

    def begun(self) -> bool:
        """Whether there is something of a run that has not ended: a checkpoint, or lines of metrics."""
        return self.checkpoints.exists() or self.metrics_size() > 0

    def goes_on_by_itself(self) -> bool:
        """Whether there is a checkpoint or a result here, so that no other run's checkpoint is needed."""
        if any((self.checkpoints / name).exists() for name in ("last.pt", "previous.pt")):
            return True
        return (self.path / SUMMARY).exists() or self.run().get("status") == "diverged"

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
    from importlib.metadata import version  # with it --help would take longer

    import torch  # here, as reading run folders needs none

    packages = ("torchvision", "hydra-core", "omegaconf", "numba", "tensorboard", "numpy")
    return {
        "versions": {"python": platform.python_version(), "luqrun": __version__, "torch": str(torch.__version__)}
        | {package: version(package) for package in packages},
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
