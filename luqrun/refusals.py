"""Hydra's and OmegaConf's complaints about a command line, each as the one line that a user needs."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import re
import types
import typing

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from luqrun.config import Config, conf_dir

EXTRAS = {"hydra/launcher": "slurm", "hydra/sweeper": "sweep"}


def one_line(error: BaseException) -> str:
    """The error's text in one line: the key or file, what is wrong, what is allowed."""
    text = str(error)
    # Before OSError, which Hydra's error for a group option that does not exist is too.
    if found := re.search(r"Could not (?:find|load) '(hydra/\w+)/(submitit_local|submitit_slurm|optuna)'", text):
        extra = EXTRAS[found[1]]
        return f"{found[1]}={found[2]} needs the extra {extra}: pip install 'luqrun[{extra}]'"
    if found := re.search(r"Could not find '((?:hydra/)?[^/']+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text.partition("Config search path")[0], re.MULTILINE)
        group = conf_dir() / found[1]
        options = options or sorted(str(path.relative_to(group).with_suffix("")) for path in group.rglob("*.yaml"))
        return f"{found[1]}={found[2]} is not known; allowed: {', '.join(options)}"
    if isinstance(error, OSError):
        return _about_files(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read; an override is key=value, such as schedule.epochs=3"
    if "Ambiguous value for argument" in text:
        return f"{text.splitlines()[0]}: several values are a sweep, which needs -m (luqrun -m seed=0,1)"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    overridden = re.search(r"Could not (?:override|append) '?([^'\s=]+)", text)
    key = overridden[1] if overridden else getattr(cause, "full_key", None)
    reason = str(cause).splitlines()[0] if str(cause) else type(error).__name__
    if cause is error and overridden:
        reason = " ".join(line.strip() for line in text.splitlines()[1:2]) or reason
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in", str(cause)):
        return unknown_key(key if key and key.endswith(unknown[1]) else unknown[1])
    if "is not a ListConfig" in reason:
        reason = "must be a list, such as [first,last]"
    if key and key not in reason:
        return f"{key}: {reason}"
    return " ".join(reason.split())


def unknown_key(key: str) -> str:
    """That a key does not exist, with the nearest that do."""
    known = dotted_keys(Config)
    near = difflib.get_close_matches(key, known, n=2)
    # Or the right last part under another group.
    near = near or [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "luqrun --help lists the keys"
    return f"{key} is not a key; {hint}"


def below_null(overrides: list[str]) -> str:
    """What Hydra cannot say: that an override lies below a part of the config that is null."""
    deep = [override for override in overrides if override.partition("=")[0].count(".") >= 2]
    return f"{' '.join(deep)} sets a key below a part that is null here (such as quant.gradient with quant=fp32)"


def dotted_keys(schema: type, prefix: str = "") -> list[str]:
    """All keys of a dataclass and of the dataclasses in it, such as dataset.root."""
    keys = []
    for name, hint in typing.get_type_hints(schema).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        nested = [part for part in parts if dataclasses.is_dataclass(part)]
        keys += dotted_keys(nested[0], f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def _about_files(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}: make room; the same command then continues from the last checkpoint"
    if error.errno == errno.EFBIG:
        return f"a file is larger than allowed{where} (ulimit -f): the same command continues under a higher limit"
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else " ".join(str(error).split())
