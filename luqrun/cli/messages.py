"""Hydra's and OmegaConf's complaints about a command line, each as the one line that a user needs."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from hydra.conf import HydraConf
from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from luqrun.cli.overrides import in_quotes, unreadable
from luqrun.config import Config, HighPrecisionConfig, conf_dir
from luqrun.runtime import process_group

EXTRAS = {"hydra/launcher": "slurm", "hydra/sweeper": "sweep"}
ANYTHING: dict = {}  # a part of Hydra's settings whose keys depend on the option
RENAMED = {"task": "job=train, job=rounding or job=cost"}  # keys of earlier versions, and what says the same now
HYDRAS = ("hydra", "omegaconf", "antlr4", "yaml")


def one_line(error: BaseException) -> str:
    """The error's text in one line: the key or file, what is wrong, what is allowed."""
    return " ".join(re.sub("UserError raised while resolving interpolation: ", "", _message(error)).split())


def refuse(error: Exception) -> None:
    """Print the line, and leave with exit code 1."""
    who = f"luqrun (rank {process_group.rank()})" if process_group.world_size() > 1 else "luqrun"
    print(f"{who}: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def _message(error: BaseException) -> str:
    text = str(error)
    # Before OSError, which Hydra's error for a group option that does not exist is too.
    if found := re.search(r"Could not (?:find|load) '(hydra/\w+)/(submitit_local|submitit_slurm|optuna)'", text):
        extra = EXTRAS[found[1]]
        return f"{found[1]}={found[2]} needs the extra {extra}: pip install 'luqrun[{extra}]'"
    if found := re.search(r"Could not find '((?:hydra/)?[^/']+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text.partition("Config search path")[0], re.MULTILINE)
        group, (folder, _, name) = conf_dir() / found[1], found[2].rpartition("/")
        known = sorted(str(path.relative_to(group).with_suffix("")) for path in group.rglob("*.yaml"))
        inside = [each for each in known if folder and each.startswith(f"{folder}/")]
        options = inside or options or known
        # An experiment asks for the data and the schedule of a model.
        of_model = inside and (conf_dir() / f"model/{name}.yaml").is_file()
        why = f": there is none for model={name}" if of_model else ""
        return f"{found[1]}={found[2]} is not known{why}; allowed: {', '.join(options)}"
    if isinstance(error, OSError):
        return _about_files(error)
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, text)
    if re.search("(override|delete|append to|Key) ''|Key None", text):
        return "an override is key=value, such as schedule.epochs=3; here one has no key"
    if found := re.search(r"^(\S+) appears more than once in the final defaults list", text):
        return (
            f"{text} (an override such as +experiment= is given twice, or a + stands before a group that has an option "
            f"already: {found[1]}=OPTION, or in a file's defaults 'override /{found[1]}: OPTION', exchanges it)"
        )
    if found := re.search("Ambiguous value for argument '(.*)'$", text, re.MULTILINE):
        quoted = in_quotes(found[1])
        comma = f"; one value with a comma stands in quotes: {quoted}" if quoted else ""
        return f"{text.splitlines()[0]}: several values are a sweep, which needs -m (luqrun -m seed=0,1){comma}"
    if "does not support sweep type" in text:
        return "interval() is for a search (hydra/sweeper=optuna): a sweep tries each of some values, as in seed=0,1,2"
    if found := re.search(r"Multiple values for (\S+)\.", text):
        return f"{found[1]} is given twice, with different options: give it once"
    if found := re.search("An item is already at '(.*)'", text):
        return f"+{found[1]}= would add a key, but {found[1]} is there already: without +, {found[1]}=VALUE sets it"
    if found := re.search(r"append to your default list use \+(([^\s=@]+)=\S*)", text):
        return f"{found[2]} has no option yet: write +{found[1]}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    overridden = re.search(r"(?:Could not (?:override|append)|Error merging override) '?[+~]*([^'\s=]+)", text)
    key = overridden[1] if overridden else getattr(cause, "full_key", None)
    reason = str(cause).splitlines()[0] if str(cause) else type(error).__name__
    if cause is error and overridden:
        reason = " ".join(line.strip() for line in text.splitlines()[1:2]) or reason
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in", str(cause)):
        return unknown_key(key if key and unknown[1] in re.split(r"[.@]", key) else unknown[1])
    if found := re.search(r"Interpolation key 'hydra\.([\w.]+)' not found$", reason):
        reason = f"{reason}: Hydra's own settings have a colon, ${{hydra:{found[1]}}}"
    if "is not a ListConfig" in reason:
        reason = "must be a list, such as [first,last]"
    if key and key not in reason:
        return f"{key}: {reason}"
    return reason


def unknown_key(key: str) -> str:
    """That a key does not exist, with the nearest that do."""
    if found := re.match(r"hydra\.(sweeper|launcher)\.", key):
        return f"{key} is not a key of the hydra/{found[1]} in use; hydra/{found[1]}=NAME with -m chooses another"
    if key in RENAMED:
        return f"{key} is not a key any more; write {RENAMED[key]}"
    if key.startswith("finetune.high_precision."):  # GEMMs are few, and too alike for a guess
        return f"{key} is not a key; allowed: {', '.join(HighPrecisionConfig.__dataclass_fields__)}"
    near = _nearest(key)
    hint = f"did you mean {' or '.join(near)}?" if near else "luqrun --help lists the keys"
    return f"{key} is not a key; {hint}"


def _nearest(key: str) -> list[str]:
    """Up to three keys or groups that may have been meant: each part close to its own, or close as a whole, or the last
    part right, or close, under another group."""
    known = dotted_keys(Config)
    groups = sorted({str(path.parent.relative_to(conf_dir())) for path in conf_dir().glob("*/*.yaml")})
    groups += sorted({str(path.parent.relative_to(conf_dir())).split("/")[0] for path in conf_dir().glob("*/*/*.yaml")})
    tree: dict = {}
    for name in [*known, *dotted_keys(HydraConf, "hydra."), *groups, "hydra/launcher", "hydra/sweeper"]:
        part = tree
        for segment in name.split("."):
            part = part.setdefault(segment, {})
    tree["hydra"].update(launcher=ANYTHING, sweeper=ANYTHING)
    found = _similar_keys(key.lower().split("."), tree)
    last = key.lower().rpartition(".")[2]
    ends = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = found or difflib.get_close_matches(key.lower(), known, n=2)
    near = near or [name for name in known if name.rpartition(".")[2] == last][:3]
    near = near or [ends[each] for each in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.8)]
    adding = [name for name in groups if name not in Config.__dataclass_fields__]  # without an option of their own
    return [f"+{name}" if name in adding else name for name in near if name != key]


def _similar_keys(segments: list[str], tree: dict) -> list[str]:
    """The dotted keys of the tree, of as many segments, whose segments are all the same or close; at most two."""
    if not segments or tree is ANYTHING:
        return [".".join(segments)]
    first, *rest = segments
    near = [first] if first in tree else difflib.get_close_matches(first, list(tree), n=2)
    return [each + (f".{end}" if end else "") for each in near for end in _similar_keys(rest, tree[each])][:2]


def raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra or what it stands on raised this, and no run had begun: then the command line is to blame."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    raised_by = [package for package in packages if package in (*HYDRAS, "luqrun")][-1:]
    in_job = any(
        (package, frame.f_code.co_name) == ("luqrun", "job") for package, frame in zip(packages, frames, strict=True)
    )
    return raised_by != ["luqrun"] and not in_job


def explain_override(error: Exception, arguments: Sequence[str]) -> str:
    """What Hydra does not say itself: which of the overrides it could not digest, in whose frames it is a variable."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Only one of" in text:  # of the options that say what to do
        return text
    at = [frame.f_locals.get("override") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [getattr(each, "input_line", each) for each in at]
    found = [each for each in found if isinstance(each, str)]
    named = found[-1] if found else " ".join(arguments)
    if "Config group override must be" in text or "is not iterable" in text:  # quant=3, quant=[3]
        group, _, option = named.lstrip("+").partition("=")
        if not group:
            return f"{named} has no key: an override is key=value, such as schedule.epochs=3"
        return f"{named}: an option of {group} is a name, and {option} is none; luqrun --help lists the options"
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
    if not (error.filename and error.strerror):
        return str(error)
    if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
        path = Path(os.fsdecode(error.filename))
        for part in [*reversed(path.parents), path]:
            if part.is_symlink() and not part.exists():
                target = os.readlink(part)
                return f"{part} is a link to {target}, which is not there (for {path}): make that, or remove the link"
            if part.is_file() and (part != path or error.errno == errno.EEXIST):
                return f"{part} is a file where a folder is needed (for {path}): move it away"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename}: {error.strerror}: results need a folder that can be written (hydra.run.dir=DIR)"
    return f"{error.filename}: {error.strerror}"
