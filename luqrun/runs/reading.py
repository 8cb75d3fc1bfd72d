"""The one reader of run folders: config.yaml, run.json, metrics.jsonl and summary.json, checked against SCHEMA.

Folders that an earlier luqrun wrote are read too: what was not recorded then has the default that held then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from luqrun.errors import UserError
from luqrun.runs.metric import TOP1, Metric, is_number

CONFIG, RUN, METRICS, SUMMARY = "config.yaml", "run.json", "metrics.jsonl", "summary.json"


# What an earlier luqrun called otherwise: keys of the config, the scales of cells, and options of the command line.
RENAMED = {"task": "job"}
RENAMED_SCALES = {"glyphs": "embedded"}
_RENAMED_OPTION = re.compile(r"^(\+*experiment=(\w+)/|\+*scale=|schedule=)glyphs(?=$|/)")


class Unusable(UserError):
    """A file of a run folder that is damaged or missing, or says what cannot be. The text names the file, not the
    folder."""


class Missing(Unusable):
    """There is no such file."""


def _is_integer(value: object) -> bool:
    return type(value) is int


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _or_none(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or kind(value)


def _is_metric(value: object) -> bool:
    return _is_mapping(value) and [type(value.get(name)) for name in Metric.__dataclass_fields__] == [str, str, bool]


# What a value must be where it is there. Other keys may hold anything.
SCHEMA: dict[str, dict[str, Callable[[object], bool]]] = {
    RUN: {
        "status": _or_none(_is_text),
        "reason": _or_none(_is_text),
        "layout": _is_integer,
        "results": _is_integer,
        "data": _or_none(_is_mapping),
        "world_size": _is_integer,
        "world_sizes": _list_of(_is_integer),
        "metric": _is_metric,
        "overrides": _list_of(_is_text),
        "command": _list_of(_is_text),
        "git_commit": _or_none(_is_text),
        "reused": _or_none(_is_text),
        "parent": _or_none(_is_text),
        "diverged_at_step": _or_none(_is_integer),
    },
    SUMMARY: {
        "val/": _or_none(is_number),  # whatever begins so
        "test/": _or_none(is_number),
        "train_seconds": _or_none(is_number),
        "rounding": _list_of(_is_mapping),
    },
}


@dataclass(frozen=True)
class StoredRun:
    """What the files of a run folder say. summary: None for a run that has not finished; curve: the metric after each
    epoch, of a run that diverged as far as the file is sound. file: where all this stands instead of in a folder."""

    path: Path
    config: dict
    run: dict
    summary: dict | None
    curve: tuple[float, ...]
    file: str | None = None

    def source(self, name: str) -> str:
        """What to call the file that says what `name` says in a run folder."""
        return self.file or name

    @property
    def metric(self) -> Metric:
        return metric_of(self.run)


def metric_of(run: dict) -> Metric:
    """By what run.json says that the run is judged."""
    return Metric(**{name: run["metric"][name] for name in Metric.__dataclass_fields__}) if "metric" in run else TOP1


def read_run(folder: Path, wanted: Callable[[dict], bool] = lambda config: True) -> StoredRun | None:
    """All files of a run folder; None where its config is not `wanted`, and no other file is read. Raises Unusable.

    A summary counts only in a run that has finished, and then it must be there.
    """
    config = read_config(folder)
    if not wanted(config):
        return None
    run = renamed_options(read_json(folder, RUN), config)
    finished = run.get("status") == "finished"
    if finished and not (folder / SUMMARY).is_file():
        raise Unusable(f"incomplete: finished without {SUMMARY}")
    summary = read_json(folder, SUMMARY) if finished else None
    metric = metric_of(run)
    if not finished:
        curve = tuple(_while_sound(read_curve(folder, metric)))
    else:
        curve = tuple(read_curve(folder, metric)) if metric.name in summary else ()
    return StoredRun(folder, config, run, summary, curve)


def read_config(folder: Path) -> dict:
    """config.yaml. Raises Unusable."""
    text = _text(folder / CONFIG)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a number or date that Python cannot hold
        raise Unusable(f"{CONFIG} is not YAML") from None
    return check_config(config, CONFIG)


def check_config(config: object, source: str) -> dict:
    """The config, an earlier one with today's names of keys. Raises Unusable where it is no mapping that JSON could
    hold, with keys of one type, or has no end."""
    with suppress(TypeError, ValueError, RecursionError):
        if isinstance(config, dict) and json.dumps(config, sort_keys=True) and _is_shallow(config):
            return {RENAMED.get(key, key): _renamed_scale(key, value) for key, value in config.items()}
    raise Unusable(f"{source} is not a configuration")


def _renamed_scale(key: str, value: object) -> object:
    """The value of a key of the config; of `cell` the scale by today's name."""
    if key != "cell" or not _is_mapping(value) or not _is_text(value.get("scale")):
        return value
    return {**value, "scale": RENAMED_SCALES.get(value["scale"], value["scale"])}


def renamed_options(run: dict, config: dict) -> dict:
    """run.json with the command line of an earlier luqrun as today's would have it.

    An experiment that was renamed brought a study of another name, which is now given beside it.
    """
    overrides = run.get("overrides") or []
    renamed = [_RENAMED_OPTION.sub(r"\1embedded", given) for given in overrides]
    experiments = [found[2] for given in overrides if (found := _RENAMED_OPTION.match(given)) and found[2]]
    study = config.get("study")
    if experiments and _is_text(study) and not any(given.startswith("study=") for given in overrides):
        renamed.append(f"study={study}")
    return run if renamed == overrides else {**run, "overrides": renamed}


def _is_shallow(value: object, levels: int = 20) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def read_json(folder: Path, name: str) -> dict:
    """run.json or summary.json, checked. Raises Unusable; Missing where there is none."""
    text = _text(folder / name)
    try:
        content = json.loads(text, parse_constant=_refuse_nan)
    except _NotANumber as constant:
        raise Unusable(f"{name} holds {constant}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{name} is damaged ({error})") from None
    check(content, name)
    return content


def usable_run(folder: Path) -> dict:
    """run.json, or {} where there is none or a damaged one: nothing can be taken over from such a run."""
    with suppress(Unusable):
        return read_json(folder, RUN)
    return {}


def check(content: object, kind: str, source: str | None = None) -> None:
    """Raise Unusable where `content` does not fit SCHEMA[kind]; source: what to call it, by default `kind`."""
    if not isinstance(content, dict):
        raise Unusable(f"{source or kind} is damaged (it holds a {type(content).__name__})")
    for name, value in content.items():
        fits = SCHEMA[kind].get(name) or SCHEMA[kind].get(name.partition("/")[0] + "/")
        if fits and not fits(value):
            raise Unusable(f"{source or kind} is damaged ({name} is {shortened(value)})")


def shortened(value: object) -> str:
    """As Python writes it, of at most a hundred characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; what is nested too deeply
        text = type(value).__name__
    return text if len(text) <= 100 else text[:100] + "..."


def read_curve(folder: Path, metric: Metric) -> Iterator[float]:
    """The metric after each epoch. Raises Unusable at the first line of metrics.jsonl that is not sound."""
    for number, line in enumerate(_text(folder / METRICS).splitlines(), 1):
        try:
            row = json.loads(line, parse_constant=_refuse_nan)
            found = [row[metric.name]] if row.get("kind") == "epoch" else []
        except _NotANumber as constant:
            raise Unusable(f"{METRICS} holds {constant} in line {number}") from None
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise Unusable(f"{METRICS} is damaged in line {number}") from None
        if not all(map(metric.allows, found)):
            raise Unusable(f"{METRICS} is damaged in line {number}")
        yield from map(float, found)


def _while_sound(curve: Iterator[float]) -> Iterator[float]:
    """A diverged run's number does not hang on its curve, which may hold NaN."""
    with suppress(Unusable):
        yield from curve


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise Unusable(f"{path.name} is not a file")
        return path.read_text()
    except FileNotFoundError:
        raise Missing(f"{path.name} is not there") from None
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Unusable(f"{path.name} is damaged (it is no text)") from None


class _NotANumber(Exception):
    """NaN, Infinity or -Infinity, anywhere in a file."""


def _refuse_nan(constant: str):
    raise _NotANumber(constant)
