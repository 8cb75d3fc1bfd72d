"""Runs that stand on others: a finished twin in another study, and the 4-bit run that a fine-tune starts from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

from luqrun import __version__
from luqrun.config import Config, FinetuneConfig
from luqrun.errors import UserError
from luqrun.run_folder import METRICS, SUMMARY, RunFolder, run_id


def find_twin(config: Config, folder: RunFolder) -> Path | None:
    """A finished (or diverged) run of another study beside this one with the same run id, made by this version."""
    name, depth = run_id(config), len(Path(config.study).parts)
    if folder.path.name != name or folder.path.parts[-depth - 1 : -1] != Path(config.study).parts:
        return None  # hydra.run.dir was set by hand: who knows what lies around it
    outputs = folder.path.parents[depth]
    for path in sorted([*outputs.glob(f"*/{name}"), *outputs.glob(f"*/*/{name}")]):
        run = _run_of(path)
        done = run.get("status") == "diverged" or (run.get("status") == "finished" and (path / SUMMARY).is_file())
        ours = run.get("versions", {}).get("luqrun") == __version__
        if done and ours and "reused" not in run and path != folder.path:
            return path
    return None


def adopt(twin: Path, folder: RunFolder) -> dict:
    """Take over the result of `twin`, without its checkpoints and curves; returns what a run of our own would."""
    run = _run_of(twin)
    for name in (METRICS, SUMMARY):
        if (twin / name).is_file():
            shutil.copyfile(twin / name, folder.path / name)
    own = {name: folder.run()[name] for name in ("command", "overrides")}
    relative = os.path.relpath(twin, folder.path)  # so that outputs/ can be moved as a whole
    folder.update_run(**{**run, **own, "reused": relative})
    return folder.summary() or {"diverged": run["diverged_at_step"]}


def base_checkpoint(config: Config, folder: RunFolder) -> Path:
    """For resume=base: the last checkpoint of the run that is this one without its fine-tune, in the same study."""
    alone = dataclasses.replace(config, finetune=FinetuneConfig(name="none"))
    base = folder.path.parent / run_id(alone)
    run = _run_of(base)
    if "reused" in run:
        base = (base / run["reused"]).resolve()
    path = base / "checkpoints" / "last.pt"
    if run.get("status") != "finished" or not path.is_file():
        state = run.get("status", "not there")
        raise UserError(
            f"resume=base: the run without fine-tuning, {base}, is {state}: run the same with finetune=none first"
        )
    return path


def _run_of(path: Path) -> dict:
    try:
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        return {}
