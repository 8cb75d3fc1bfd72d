"""How long runs will take, by the finished runs that are there."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from luqrun.config import Config
from luqrun.runs.identity import KIND, deciding_settings, name_parts
from luqrun.runs.reading import METRICS, RUN, SUMMARY, Unusable, read_config, read_json

TRIED = 20  # finished runs of the same name that are looked at, the newest first


class Estimate(NamedTuple):
    """What a run takes. alike: whether a run of the same recipe tells."""

    seconds: float
    alike: bool


class Known(NamedTuple):
    """A finished run: of what kind (see _kind), on a CPU or not, and its seconds an epoch."""

    kind: dict
    on_cpu: bool
    seconds: float


class Estimates:
    """By the finished runs in the studies of a folder, such as outputs/.

    An epoch takes as long as the epochs of the newest run of the same kind did, evaluation included: of the same
    settings but for seed, fine-tune and most of the schedule, and by as many processes; else of the same and another
    recipe. A run that device=cpu or cuda names is compared with such runs alone.
    """

    def __init__(self, outputs: Path):
        found = [path for depth in ("*/*", "*/*/*") for path in outputs.glob(f"{depth}/{SUMMARY}")]
        self.folders = [path.parent for path in sorted(found, key=_changed, reverse=True)]
        self.known: dict[Path, Known | None] = {}

    def of(self, config: Config, processes: int, done: int) -> Estimate | None:
        """Of a run of which so many epochs are done; None where no finished run tells."""
        settings, parts = asdict(config), name_parts(config)
        network = {"train": 2, "rounding": 1}.get(config.job, 3)  # how many parts stand before the recipe
        for length, alike in ((network + 1, True), (network, False)):
            kind = _kind(settings, processes, with_recipe=alike)
            named = "-".join(parts[:length]) + "-"
            for folder in [path for path in self.folders if path.name.startswith(named)][:TRIED]:
                run = self._read(folder)
                if run is None or (config.device != "auto" and run.on_cpu != (config.device == "cpu")):
                    continue
                if (run.kind if alike else {**run.kind, "quant": None}) == kind:
                    return Estimate(run.seconds * max(_epochs(settings) - done, 0), alike)
        return None

    def _read(self, folder: Path) -> Known | None:
        """None where its files do not say what is needed."""
        if folder not in self.known:
            self.known[folder] = None
            with suppress(Unusable, KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError):
                config, run, summary = read_config(folder), read_json(folder, RUN), read_json(folder, SUMMARY)
                kind = _kind(config, run["world_sizes"][-1], with_recipe=True)
                seconds = _seconds(run, summary) / _epochs(config)
                self.known[folder] = Known(kind, run.get("device") == "cpu", seconds)
        return self.known[folder]


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _kind(config: dict, processes: int, with_recipe: bool) -> dict:
    """What decides how long an epoch takes, and is known from a config."""
    settings = deciding_settings(config)
    schedule = settings.pop("schedule", {})
    for name in ("seed", "finetune"):
        settings.pop(name, None)
    kept = {name: schedule.get(name) for name in ("accumulate", "optimizer")}
    recipe = settings["quant"] if with_recipe else None
    return {**settings, **kept, "quant": recipe, "compile": config.get("compile"), "processes": processes}


def _epochs(config: dict) -> int:
    """Of the whole run; what is no training counts as one."""
    if config.get(KIND, "train") != "train":
        return 1
    return config["schedule"]["epochs"] + config["finetune"]["epochs"]


def _seconds(run: dict, summary: dict) -> float:
    """Of training and evaluation; else from the start of the run to its end."""
    if "train_seconds" in summary:
        return summary["train_seconds"] + summary.get("evaluation_seconds", 0.0)
    start, end = (datetime.fromisoformat(run[name]) for name in ("start", "end"))
    return (end - start).total_seconds()


def epochs_done(folder: Path) -> int:
    """Of a run that has begun, by its metrics."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        lines = [line for line in (folder / METRICS).read_text().splitlines() if '"kind": "epoch"' in line]
        return int(json.loads(lines[-1])["epoch"]) if lines else 0
    return 0
