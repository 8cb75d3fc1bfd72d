"""The arguments of a command line as a whole: what is given twice, what only a sweep reads, what has no value, what
Hydra's grammar wants in quotes."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from luqrun.config import COMPANIONS, Config, conf_dir
from luqrun.errors import UserError
from luqrun.internals.of_hydra import args_parser
from luqrun.runs.parent import parent_folder
from luqrun.runs.reading import usable_run

OF_A_SWEEP = ("hydra.launcher.", "hydra.sweeper.", "hydra.sweep.")
UNQUOTED = re.compile(r"[\w\-./\\ :%+*@?|$,]", re.ASCII)  # what Hydra's grammar takes in a value without quotes


def options_first(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra can read it, whose overrides may not stand on both sides of an option."""
    parser = args_parser()

    def refuse(message: str) -> None:
        raise UserError(f"{message}; luqrun --help shows how it is used")

    parser.error = refuse
    overrides = parser.parse_intermixed_args(arguments).overrides
    left, options = list(overrides), []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            options.append(argument)
    return [*options, *overrides]


def with_parents_overrides(arguments: Sequence[str]) -> list[str]:
    """The command line, and before it what the run was given whose folder `resume` names, where it is not given anew:
    who goes on with a run need not repeat its settings."""
    given = {_key(argument): argument.partition("=")[2] for argument in arguments if "=" in argument}
    resume = given.get("resume", "").strip("'\"")
    folder = parent_folder(resume) if resume else None
    theirs = usable_run(folder).get("overrides", []) if folder else []
    return [*(_unescaped(text) for text in theirs if _key(text) not in given), *arguments]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def with_companions(arguments: Sequence[str]) -> list[str]:
    """The command line, and on it the network and the schedule that its data set brings, where it names none.

    An experiment or a scale chooses them itself.
    """
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments if "=" in argument)
    companions = COMPANIONS.get(given.get("dataset"), {})
    if {"experiment", "scale"} & given.keys():
        return list(arguments)
    return [*arguments, *(f"{group}={option}" for group, option in companions.items() if group not in given)]


def shell_words(overrides: Sequence[str]) -> str:
    """Overrides as one writes them in a shell."""
    return " ".join(map(_for_the_shell, overrides))


def repeated(config: DictConfig) -> list[str]:
    """A line for each key that the command line gives more than once with different values, of which the last counts,
    and for each group that is given a list of options.

    Raises UserError where a sweep over the key would be dropped.
    """
    seen: dict[str, Override] = {}
    lines = []
    for each in _given(config):
        key = each.key_or_group + (f"@{each.package}" if each.package else "")
        options = each.value()
        if isinstance(options, list) and len(options) > 1 and (conf_dir() / each.key_or_group).is_dir():
            swept = ",".join(map(str, options))
            lines.append(f"{each.input_line} is one run, with these options merged; -m {key}={swept} runs each")
        before = seen.get(key)
        seen[key] = each
        if before is None or each.is_delete() or before.is_delete() or before.input_line == each.input_line:
            continue
        if before.is_sweep_override():
            again = "swept over twice" if each.is_sweep_override() else "swept over, and given again"
            raise UserError(
                f"{key} is {again} ({before.input_line} and {each.input_line}), which drops the first: give it once"
            )
        if not isinstance(each.value(), dict):  # mappings are merged
            lines.append(f"{key} is given more than once, the last one counts: {each.input_line}")
    return lines


def _given(config: DictConfig) -> list[Override]:
    """The command line's overrides without Hydra's own hydra.mode, and without what deletes."""
    texts = [*config.hydra.overrides.hydra, *_raw(config)]
    return OverridesParser.create().parse_overrides([text for text in texts if not text.startswith("hydra.mode=")])


def _raw(config: DictConfig) -> list[str]:
    return OmegaConf.to_container(config.hydra.overrides.task)  # unresolved: ${..x} means nothing here


def refuse_deleted(config: DictConfig) -> None:
    """Raise UserError for ~key: without a value of its own the key would silently have the schema's."""
    for each in _given(config):
        key = each.key_or_group
        if (
            each.is_delete()
            and key.partition(".")[0] in Config.__dataclass_fields__
            and not (conf_dir() / key).is_dir()
        ):
            raise UserError(f"{each.input_line}: every key has a value, and none can be left out")


def refuse_alone(config: DictConfig) -> None:
    """Raise UserError naming what a command without -m sets and only a sweep reads."""
    for group in ("hydra/launcher", "hydra/sweeper"):
        chosen = config.hydra.runtime.choices.get(group)
        if chosen not in ("basic", None):
            raise UserError(f"{group}={chosen} is for sweeps: add -m, or write {group}=basic to train in this process")
    for text in config.hydra.overrides.hydra:
        if text.lstrip("+~").startswith(OF_A_SWEEP):
            raise UserError(f"{text} is for sweeps, and nothing reads it without -m: add -m, or leave it out")


def count_jobs(config: DictConfig, loader: ConfigLoader) -> int | None:
    """How many jobs the sweep of this config has; None where only its sweeper knows.

    Raises UserError naming what leaves it without a job, or what a sweep does not read.
    """
    for text in config.hydra.overrides.hydra:
        if text.lstrip("+~").startswith("hydra.run."):
            raise UserError(f"{text} is for one run; the jobs of a sweep go to hydra.sweep.dir and hydra.sweep.subdir")
    sweeper = config.hydra.sweeper
    for name in ("max_batch_size", "n_trials", "n_jobs"):
        if isinstance(sweeper.get(name), int) and sweeper[name] < 1:
            raise UserError(f"hydra.sweeper.{name}={sweeper[name]} leaves the sweep without a job; allowed: 1 or more")
    parameters = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    counts = {}
    for each in OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *_raw(config)]):
        counts[each.get_key_element()] = _count(each, loader)
    if sweeper._target_.endswith(".BasicSweeper"):
        return math.prod(counts.values())
    grid = "Grid" in str((sweeper.get("sampler") or {}).get("_target_"))  # which tries each point once
    return None if grid else sweeper.get("n_trials")


def _count(override: Override, loader: ConfigLoader) -> int:
    if not (override.is_sweep_override() and override.is_discrete_sweep()):
        return 1
    count = sum(1 for _ in override.sweep_string_iterator())
    if count == 0:
        options = loader.get_group_options(override.key_or_group) if "glob(" in override.input_line else []
        fitting = f": none of {', '.join(options)} fits" if options else ""
        raise UserError(f"{override.input_line} has no value, so that the sweep has no job{fitting}")
    return count


def in_quotes(text: str) -> str | None:
    """The override with its value in quotes, as one writes it in a shell; None where that does not make it readable."""
    key, equals, value = text.partition("=")
    if not text.isprintable():
        return None
    for mark in "\"'":
        escaped = re.sub(rf"(\\*)({mark}|$)", lambda found, mark=mark: _escaped(*found.groups(), mark), value)
        quoted = f"{key}={mark}{escaped}{mark}"
        try:
            if equals and value and OverridesParser.create().parse_override(quoted).value() == value:
                return _for_the_shell(quoted)
        except HydraException:
            return None  # it is the key
    return None


def _escaped(backslashes: str, end: str, mark: str) -> str:
    """Backslashes that precede a quotation mark, or the end, stand for themselves when doubled."""
    return backslashes * 2 + ("\\" + mark if end else "")


def unreadable(text: str, reason: str) -> str:
    """What to write instead of an override that Hydra's grammar cannot read, for the reason that it gives."""
    if "while evaluating" in reason and "Unknown function" not in reason:  # range(1,x), choice()
        return f"{text!r} cannot be read: {reason.splitlines()[1]}"
    quoted, value = in_quotes(text), text.partition("=")[2]
    odd = " ".join(sorted({character for character in value if not UNQUOTED.match(character)}))
    if quoted is None:
        return f"{text!r} cannot be read; an override is key=value, such as schedule.epochs=3"
    means = "a list is [1,2] and a mapping {a: 1}; " if value[0] in "[{" else ""
    return f"{text!r} cannot be read; {means}a value{f' with {odd}' if odd else ''} stands in quotes: {quoted}"


def _for_the_shell(text: str) -> str:
    text = _unescaped(text)
    if "'" not in text:
        return shlex.quote(text)
    return '"' + re.sub(r'(["\\$`])', r"\\\1", text) + '"'


def _unescaped(text: str) -> str:
    """An override as it was given: a sweep escapes what stands in ${...}, for another reading by Hydra."""
    return re.sub(r"\$\\\{.*?\\\}", lambda found: re.sub(r"\\(.)", r"\1", found[0]), text)
