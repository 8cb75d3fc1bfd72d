"""Hydra's and OmegaConf's complaints about a command line, each as the one line that a user needs."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import re
import traceback
import types
import typing
from collections.abc import Sequence

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from luqrun.config import Config, conf_dir

EXTRAS = {"hydra/launcher": "slurm", "hydra/sweeper": "sweep"}
HYDRAS = ("hydra", "omegaconf", "antlr4", "yaml")


def one_line(error: BaseException) -> str:
    """The error's text in one line: the key or file, what is wrong, what is allowed."""
    return " ".join(_told(error).split())


def _told(error: BaseException) -> str:
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
    if re.search("(override|delete|append to|Key) ''|Key None", text):
        return "an override is key=value, such as schedule.epochs=3; here one has no key"
    if "more than once in the final defaults list" in text:
        return f"{text} (an override such as +experiment= is given twice)"
    if "Ambiguous value for argument" in text:
        return f"{text.splitlines()[0]}: several values are a sweep, which needs -m (luqrun -m seed=0,1)"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    overridden = re.search(r"(?:Could not (?:override|append)|Error merging override) '?[+~]*([^'\s=]+)", text)
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
    return reason


def unknown_key(key: str) -> str:
    """That a key does not exist, with the nearest that do."""
    known = dotted_keys(Config)
    near = difflib.get_close_matches(key, known, n=2)
    # Or the right last part under another group.
    near = near or [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "luqrun --help lists the keys"
    return f"{key} is not a key; {hint}"


def is_hydras(error: Exception) -> bool:
    """Whether Hydra or what it stands on raised this, and no run had begun: then the command line is to blame."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    raised_by = [package for package in packages if package in (*HYDRAS, "luqrun")][-1:]
    in_job = any(
        (package, frame.f_code.co_name) == ("luqrun", "job") for package, frame in zip(packages, frames, strict=True)
    )
    return raised_by != ["luqrun"] and not in_job


def stumbled(error: Exception, arguments: Sequence[str]) -> str:
    """What Hydra does not say itself: which of the overrides it could not digest, in whose frames it is a variable."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Only one of" in text:  # of the options that say what to do
        return text
    at = [frame.f_locals.get("override") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [getattr(each, "input_line", each) for each in at]
    found = [each for each in found if isinstance(each, str)]
    named = found[-1] if found else " ".join(arguments)
    if "Unexpected type for root" in text:
        return f"{named} sets a key below a part that is null here (such as quant.gradient with quant=fp32)"
    return f"{named} cannot be understood ({text})"


def out_of_memory(error: Exception) -> bool:
    """Whether torch or numpy could not get the memory they asked for."""
    return isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)) is not None


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
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
