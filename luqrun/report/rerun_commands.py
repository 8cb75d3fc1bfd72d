"""The commands that make runs again: which options they need, and how few commands make a whole table."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Protocol

from luqrun.report import experiments

# Hydra's options that say where the YAML files are. Of an option given twice the last one counts.
OPTIONS = (("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd"))


class Run(Protocol):
    """What a command is made of: see records.Record."""

    options: tuple[str, ...]
    overrides: list[str]


def split(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Of a command line: the options of OPTIONS that it has, each with its value, and everything else.

    ValueError for an option without a value.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for names in OPTIONS:
        parser.add_argument(*names)
    for flags in (("--multirun", "-m"), ("--run", "-r")):
        parser.add_argument(*flags, action="store_true")

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    try:
        known, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    values = vars(known)
    found = [(long, values[long[2:].replace("-", "_")]) for long, _ in OPTIONS]
    return tuple(part for long, value in found if value is not None for part in (long, value)), others


def key(override: str) -> str:
    """What an override sets."""
    return override.partition("=")[0].lstrip("+")


def experiment(overrides: Iterable[str]) -> str | None:
    """The override that chooses an experiment."""
    return next((each for each in overrides if key(each).partition("@")[0] == "experiment"), None)


def name_of(override: str) -> str:
    """Of an override that chooses an experiment, which: table2/embedded."""
    return override.partition("=")[2]


def shared(runs: Sequence[Run]) -> tuple[str, ...]:
    """The overrides that all of these runs, one at least, were given."""
    return tuple(given for given in runs[0].overrides if all(given in run.overrides for run in runs))


def common_options(runs: Sequence[Run]) -> tuple[str, ...]:
    """The options of all of these runs; none where they differ."""
    return runs[0].options if len({run.options for run in runs}) == 1 else ()


def whole_commands(name: str, scale: str, runs: Sequence[Run]) -> list[str]:
    """What makes all of these runs, which are of one table: a command for each experiment and set of options.

    Runs of a shipped experiment whose file is not there have none.
    """
    groups: dict[tuple, list[Run]] = {}
    shipped = experiments.experiments_of(name, scale) or [f"{name}/{scale}"]
    for run in runs:
        chosen = experiment(run.overrides)
        own = name_of(chosen) if chosen else shipped[0]
        groups.setdefault((run.options, own if own in shipped else None), []).append(run)
    found = []
    for (options, own), members in groups.items():
        found += _of_ones_own(options, members) if own is None else _of_the_shipped(own, options, members)
    return found


def _of_the_shipped(name: str, options: tuple[str, ...], runs: Sequence[Run]) -> list[str]:
    """The sweep of the experiment `name`, with what all the runs were given beside, and with recipes and the like that
    it does not go through."""
    if name not in experiments.experiments_of(*name.split("/", 1)):
        return []
    sweep: dict[str, list[str]] = {}
    for wish in experiments.expected_of(name):
        for part in shlex.split(wish.command)[1:]:
            sweep.setdefault(key(part), []).append(part)
    beside = [given for given in shared(runs) if given not in sweep.get(key(given), []) and not _is_experiment(given)]
    settled = {"seed", *map(key, beside)}
    for each in [name for name in sweep if name not in settled]:
        given = [part for run in runs for part in run.overrides if key(part) == each]
        others = [part for part in dict.fromkeys(given) if part not in sweep[each]]
        if others and not _is_experiment(others[0]):
            beside.append(_joined([*dict.fromkeys(sweep[each]), *others]))
    return [shlex.join(["luqrun", *options, "-m", f"+experiment={name}", *beside])]


def _is_experiment(override: str) -> bool:
    return experiment([override]) is not None


def _of_ones_own(options: tuple[str, ...], runs: Sequence[Run]) -> list[str]:
    """As few sweeps as make these runs and no others. (Which runs an experiment of one's own goes through is not asked:
    its file need not be there any more.)"""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((experiment(run.overrides), *map(key, run.overrides)), []).append(run)
    return [command for own in groups.values() for command in _sweeps(options, [run.overrides for run in own])]


def _sweeps(options: tuple[str, ...], runs: Sequence[Sequence[str]]) -> list[str]:
    """runs: their overrides, of the same keys."""
    values = [list(dict.fromkeys(column)) for column in zip(*runs, strict=True)]
    if math.prod(map(len, values)) > len({tuple(run) for run in runs}):
        # Not each with each: one command for each value of what has the fewest.
        at = min((at for at, own in enumerate(values) if len(own) > 1), key=lambda at: len(values[at]))
        parts = [[run for run in runs if run[at] == value] for value in values[at]]
        return [command for part in parts for command in _sweeps(options, part)]
    many = any(len(own) > 1 for own in values)
    return [shlex.join(["luqrun", *options, *(["-m"] if many else []), *map(_joined, values)])]


def _joined(overrides: Sequence[str]) -> str:
    """Overrides of one key as a sweep over their values."""
    first, *others = overrides
    return ",".join([first, *(each.partition("=")[2] for each in others)])
