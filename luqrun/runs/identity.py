"""What decides a run's result, and so its folder: the settings, the data that it reads, its processes, and RESULTS.

A run's folder ends in a hash of the four. They are recorded when it starts (config.yaml; `results`, `data` and
`world_sizes` in run.json), stand in every checkpoint, and are compared wherever a folder was not found by its name.
The version of the package decides nothing.

The data are known here by a fingerprint, a dict of plain JSON that luqrun.tasks.fingerprint makes: `root` says where
they lie, all else what they are. It is empty where they follow from the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from luqrun import RESULTS
from luqrun.config import Config, DistributedConfig, HighPrecisionConfig
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.reading import RUN, Unusable, read_config, read_json
from luqrun.runtime import process_group

LAYOUT = 2  # of run folders, in run.json; in the first the hash was of the settings alone
# What the same run may be given differently: where it runs, where its data lie, what it writes.
NOT_IN_RESULT = {
    "": ("study", "resume", "reuse", "cell", "device", "compile", "tracking", "cost"),
    "dataset": ("root", "workers"),
    "model": ("weights",),  # the fingerprint of the data says which they are
    "schedule": ("finetune_lr",),  # acts through finetune.lr_base alone
}
# Keys that decide nothing where they are null or false: most runs have no use for them, earlier ones were without.
OPTIONAL = {
    "dataset": ("source", "target", "vocabulary", "max_length", "stride", "batch_tokens", "examples"),
    "model": ("dropout", "new_head"),
    "schedule": ("warmup_steps", "beta2", "average"),
}
# Those of quantizers and GEMMs, at whatever depth.
OPTIONAL_OF_QUANT = (
    *("block", "scale_format", "scale_rounding", "four_over_six", "headroom", "eden", "requantize"),
    *("hadamard", "signs", "trust_mask"),
)
KIND = "job"  # the key that says whether a run trains, evaluates or measures
# What decides the result of a run that trains nothing.
MEASURED = {
    "evaluate": ("model", "dataset", "quant", "seed", "precision"),
    "rounding": ("quant", "seed"),
    "cost": ("model", "weights", "dataset", "quant", "schedule", "precision", "cost"),
}
MAX_NAME = 200  # bytes; file systems take 255
SHOWN = 3  # runs that are named


@dataclass(frozen=True)
class Identity:
    """What decides a result. settings: nested; None where a config cannot be read. data: a fingerprint; None where
    none was recorded. processes: None where they are not known. results: the RESULTS of the code."""

    settings: dict | None
    data: dict | None
    processes: int | None
    results: int = RESULTS

    @classmethod
    def of(cls, config: Config, data: dict) -> Identity:
        """Of a run of this process, or of this one and others, that reads these data."""
        return cls(deciding_settings(config), data, process_group.world_size())

    @classmethod
    def stored(cls, config: dict | None, run: dict) -> Identity:
        """By what a run folder says: config.yaml and run.json. Of an earlier luqrun's, with what held then."""
        data, sizes = run.get("data"), run.get("world_sizes", [run.get("world_size", 1)])
        settings = None if config is None else deciding_settings(config)
        dataset = settings.get("dataset") if settings else None
        if data and isinstance(dataset, dict) and "root" in dataset:  # a relative one is of the command's folder
            dataset["root"] = data.get("root", dataset["root"])
        return cls(settings, data, sizes[-1] if sizes else None, run.get("results", 1))


def deciding_settings(config: Config | dict) -> dict:
    """The resolved config as a dict, without what does not change the result.

    A dict is a config read from a file, of which any part may be missing or damaged.
    """
    config = config if isinstance(config, dict) else asdict(config)
    config = {**config, "quant": _without_unused(config.get("quant"))} if "quant" in config else config
    if config.get(KIND) == "rounding":
        return {name: config.get(name) for name in (KIND, *MEASURED["rounding"])}
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    parts = {part: values.get(part) if isinstance(values.get(part), dict) else {} for part in ("dataset", "finetune")}
    root = parts["dataset"].get("root")
    for part, names in NOT_IN_RESULT.items():
        of = values.get(part) if part else values
        for name in names if isinstance(of, dict) else ():
            of.pop(name, None)
    for part, names in OPTIONAL.items():
        of = values.get(part)
        for name in names if isinstance(of, dict) else ():
            if name in of and (of[name] is None or of[name] is False):
                of.pop(name)
    if values.get("fuse") is True:  # earlier runs did not say it
        values.pop("fuse")
    if values.get("distributed") == asdict(DistributedConfig()):  # the only choice that one process has
        values.pop("distributed")
    tune = parts["finetune"]
    if isinstance(tune.get("high_precision"), dict):
        tune["high_precision"] = _in_one_order(tune["high_precision"])
        if tune["high_precision"] == _in_one_order(asdict(HighPrecisionConfig())):  # FNT: earlier runs did not say it
            tune.pop("high_precision")
    if tune.get("epochs") == 0:
        values["finetune"] = {"epochs": 0}
    if config.get(KIND) == "cost":
        model = config.get("model")
        weights = model.get("weights") if isinstance(model, dict) else None  # their config.json says the sizes
        values |= {"cost": config.get("cost"), "weights": _whole_path(weights)}
        return {name: values.get(name) for name in (KIND, *MEASURED["cost"])}
    if parts["dataset"].get("name") == "folder" and root is not None:
        parts["dataset"]["root"] = _whole_path(root)  # here the root is the data set
    if config.get(KIND) == "evaluate":
        return {name: values.get(name) for name in (KIND, *MEASURED["evaluate"])}
    return values


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts of settings to one with dotted keys, such as dataset.root."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _without_unused(quant: object) -> object:
    """The `quant` part without the optional keys that are null."""
    if not isinstance(quant, dict):
        return quant
    used = {key: value for key, value in quant.items() if value is not None or key not in OPTIONAL_OF_QUANT}
    return {key: _without_unused(value) for key, value in used.items()}


def _in_one_order(operands: dict) -> dict:
    """By GEMM, the operands that are named, each once."""
    return {gemm: sorted(set(map(str, each))) if isinstance(each, list) else each for gemm, each in operands.items()}


def _whole_path(root) -> object:
    """Without links; as it is where it is no path (of a damaged file)."""
    try:
        return os.path.realpath(root)
    except (TypeError, ValueError):
        return root


def deciding_data(data: dict | None) -> dict:
    """A fingerprint without where the data lie; {} of generated ones, for which an earlier luqrun recorded no root."""
    if not data or data.get("root", "somewhere") is None:
        return {}
    return {name: value for name, value in data.items() if name not in ("root", "left_out")}


def run_id(config: Config, data: dict, processes: int | None = None) -> str:
    """The name of a run's folder, such as resnet8-glyphs-luq-fnt3-seed0-1f2e3d4c: the parts' names, and 8 digits of the
    hash of what decides the result. data: the fingerprint; processes: by default as many as this one is of."""
    decides = [deciding_settings(config), deciding_data(data), processes or process_group.world_size(), RESULTS]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{_readable(config)}-{digest}"


def _readable(config: Config) -> str:
    return "-".join(name_parts(config))[:MAX_NAME]


def name_parts(config: Config) -> list[str]:
    """What the name of a run's folder begins with: network, data and recipe, the fine-tune where there is one, and the
    seed; of a measurement job, recipe and seed."""
    kind = getattr(config, KIND)
    if kind == "rounding":
        names = [kind, config.quant.name]
    else:
        names = [config.model.name, config.dataset.name, config.quant.name]
        names += [config.finetune.name] if config.finetune.epochs and kind not in MEASURED else []
        names = [kind, *names] if kind in MEASURED else names
    names += [f"seed{config.seed}"] if "seed" in MEASURED.get(kind, ("seed",)) else []
    return [re.sub(r"[^A-Za-z0-9_.]+", "_", str(name)) for name in names]


def difference(theirs: Identity, ours: Identity, besides: tuple[str, ...] = ()) -> str:
    """How a run differs from this one, in words that go on from "a run"; "" where both have the same result.

    The first difference is told, where both are known. besides: "processes", or parts of the settings (finetune), that
    may differ.
    """
    if why := other_results(theirs.results):
        return why
    if theirs.settings is not None and ours.settings is not None:
        pair = flatten(theirs.settings), flatten(ours.settings)
        if key := _first_difference(*pair, besides):
            shown = [f"{key}={settings[key]}" if key in settings else f"no {key}" for settings in pair]
            return f"with {shown[0]}, this one has {shown[1]}"
    if why := differing_data(theirs.data, ours.data):
        return why
    if theirs.processes != ours.processes and "processes" not in besides:
        return f"by {_processes(theirs.processes)}, this one has {ours.processes}"
    return ""


def other_results(theirs: int) -> str:
    """Such as "of RESULTS 1 (...)"; "" for a run of this code's numbers."""
    if theirs == RESULTS:
        return ""
    return f"of RESULTS {theirs} (an earlier or later luqrun, which computes other numbers; here it is {RESULTS})"


def _first_difference(theirs: dict, ours: dict, besides: tuple[str, ...]) -> str | None:
    """In the schema's order, in which a part's name comes first; before all others what kind of run it is."""
    missing = object()
    keys = [key for key in [*ours, *theirs] if ours.get(key, missing) != theirs.get(key, missing)]
    rank = {KIND: 0, "dataset.root": 2}
    return min(
        (key for key in keys if key.partition(".")[0] not in besides), key=lambda key: rank.get(key, 1), default=None
    )


def differing_data(theirs: dict | None, ours: dict | None) -> str:
    """Such as "of other data: 2 classes instead of 3"; "" where the fingerprints are the same."""
    old, new = deciding_data(theirs), deciding_data(ours)
    if new and theirs is None:
        return f"whose data {RUN} does not name"
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            words, numbers = name.replace("_", " "), all(type(each.get(name)) is int for each in (old, new))
            return f"of other data: {f'{old[name]} {words} instead of {new[name]}' if numbers else f'other {words}'}"
    return ""


def _processes(count: int | None) -> str:
    return "an unknown number of processes" if count is None else f"{count} process{'es' if count != 1 else ''}"


def refuse_other_run(config: Config, data: dict, folder: RunFolder) -> None:
    """Raise UserError where the folder holds a run, ended or begun, that is not this one; it says what differs.

    Without its run.json, or with a damaged config.yaml or none, a folder is known by its name alone.
    """
    if not (folder.ended() or folder.begun()):
        return
    named, ours, run, settings = folder.path.name == run_id(config, data), Identity.of(config, data), folder.run(), None
    try:
        settings = read_config(folder.path)
        if not run:
            raise Unusable(f"{RUN} is not there")
    except Unusable as reason:
        if not named:
            raise UserError(f"{folder.path} holds a run of which {reason}: {_advice(named)}") from None
    theirs = Identity.stored(settings, run) if run else dataclasses.replace(ours, settings=settings)
    if why := difference(theirs, ours):
        raise UserError(f"{folder.path} holds a run {why}: {_advice(named)}")


def refuse_changed_data(folder: RunFolder, data: dict) -> None:
    """Raise UserError where a run reads other data (data: their fingerprint) than its folder was named for."""
    if why := differing_data(folder.run().get("data", data), data):
        raise UserError(f"what is read has changed since this run began, {why}; the same command begins one of these")


def _advice(named: bool) -> str:
    if named:
        return "study=NAME runs this one elsewhere, or delete the folder"
    return "give this one a folder of its own (hydra.run.dir, hydra.sweep.subdir), or delete that one"


def runs_beside(config: Config, data: dict, folder: Path) -> str:
    """A line that names the runs beside this folder with the same settings and another result, or another layout; ""
    where there are none. They stay as they are.

    Settings are compared as far as both runs know them. Other weights in another file are another setting: a file is
    named where its content has changed.
    """
    ours = Identity.of(config, data)
    settings, found = flatten(ours.settings), []
    for path in sorted(folder.parent.glob(f"{_readable(config)}-????????")):
        if path == folder:
            continue
        try:
            run = read_json(path, RUN)
            why, last = difference(Identity.stored(None, run), ours), path / "checkpoints" / "last.pt"
            if run.get("layout", 1) != LAYOUT:
                why = why or "of an earlier luqrun, which named its folder otherwise"
            elif why and last.is_file() and not difference(Identity.stored(None, run), ours, ("processes",)):
                why += f", whose last checkpoint resume={last} takes"
            given = read_config(path) if why else {}
        except Unusable:
            continue
        if not why or _other_weights(given, run, config, data):
            continue
        theirs = flatten(deciding_settings(given))
        if all(theirs[key] == settings[key] for key in theirs.keys() & settings.keys()):
            found.append(f"{path}, a run {why}")
    if not found:
        return ""
    more = f"; and {len(found) - SHOWN} more" if found[SHOWN:] else ""
    return f"of the same settings, beside this run: {'; '.join(found[:SHOWN])}{more}. Nothing is taken over from there"


def _other_weights(given: dict, run: dict, config: Config, data: dict) -> bool:
    """Whether a run was given another file as model.weights, or none, and so other weights. given: its config.yaml."""
    model = given.get("model")
    path = model.get("weights") if isinstance(model, dict) else None
    same_file = _whole_path(path) == _whole_path(config.model.weights)
    return not same_file and (run.get("data") or {}).get("weights") != data.get("weights")
