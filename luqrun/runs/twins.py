"""Runs that stand on others: a finished twin in another study, and the 4-bit run that a fine-tune starts from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

from luqrun import __version__
from luqrun.config import Config, FinetuneConfig
from luqrun.errors import UserError
from luqrun.runs.folder import METRICS, RUN, SUMMARY, RunFolder, run_id, write_atomically
from luqrun.runs.identity import differs_from

log = logging.getLogger(__name__)


def find_twin(config: Config, folder: RunFolder) -> Path | None:
    """A finished (or diverged) run of another study beside this one with the same run id, made by this version, of the
    same RESULTS and data and by as many processes. One that is not is named in the log.

    Looked for in studies of one or two names, such as table3 and glyphs/table3.
    """
    name, depth = run_id(config), len(Path(config.study).parts)
    if folder.path.name != name or folder.path.parts[-depth - 1 : -1] != Path(config.study).parts:
        return None  # hydra.run.dir was set by hand: who knows what lies around it
    outputs, differs = folder.path.parents[depth], differs_from(config)
    for path in sorted([*outputs.glob(f"*/{name}"), *outputs.glob(f"*/*/{name}")]):
        run = _read(path / RUN)
        done = run.get("status") == "diverged" or (run.get("status") == "finished" and _read(path / SUMMARY))
        versions = run.get("versions")
        ours = isinstance(versions, dict) and versions.get("luqrun") == __version__
        if done and ours and not run.get("reused") and path != folder.path:
            if not (why := differs(run)):
                return path
            log.info("not taken over from %s: that is a result %s", path, why)
    return None


def adopt(twin: Path, folder: RunFolder) -> dict:
    """Take over the result of `twin`, without its checkpoints and curves; returns what a run of our own would."""
    run = _read(twin / RUN)
    own = {name: folder.run()[name] for name in ("command", "overrides")}
    relative = os.path.relpath(twin, folder.path)  # so that outputs/ can be moved as a whole
    if (twin / METRICS).is_file():
        write_atomically(folder.path / METRICS, (twin / METRICS).read_bytes())
    folder.update_run(**{**run, **own, "reused": relative})
    if (twin / SUMMARY).is_file():  # last, as it says that all the rest is there
        write_atomically(folder.path / SUMMARY, (twin / SUMMARY).read_bytes())
    return folder.summary() or {"diverged": run.get("diverged_at_step")}


def diverged_base(config: Config, folder: RunFolder) -> Path | None:
    """For resume=base: the run without fine-tune, if it diverged; then the one with it does, at the same step."""
    if config.resume != "base" or config.finetune.epochs == 0:
        return None
    base, run = _base(config, folder)
    if run.get("status") != "diverged":
        return None
    if why := differs_from(config)(run):
        raise UserError(f"resume=base: {base} is a result {why}: study=NAME trains it anew")
    return base


def base_checkpoint(config: Config, folder: RunFolder) -> Path:
    """For resume=base: the last checkpoint of the run that is this one without its fine-tune, in the same study."""
    base, run = _base(config, folder)
    # The checkpoint of a run taken over lies where it was trained. By name, as relpath made it: a study may be a link.
    path = Path(os.path.normpath(base / str(run.get("reused") or ""))) / "checkpoints" / "last.pt"
    status, advice = run.get("status", "not there"), "run the same with finetune=none first"
    if status == "finished":
        if path.is_file():
            return path
        status, advice = f"finished, but {path} is gone", "resume=auto trains both phases in one run"
    raise UserError(f"resume=base: the run without fine-tuning, {base}, is {status}: {advice}")


def _base(config: Config, folder: RunFolder) -> tuple[Path, dict]:
    """The folder of the run without fine-tune, and its run.json."""
    base = folder.path.parent / run_id(dataclasses.replace(config, finetune=FinetuneConfig(name="none")))
    return base, _read(base / RUN)


def _read(path: Path) -> dict:
    """A file of a run folder, or {} where there is none or a damaged one: such a run is no twin and no base."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
