"""Twins: the finished run of another study whose result a run with reuse=true takes over instead of training."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from luqrun.config import Config
from luqrun.runs.folder import PREDICTIONS, TOKENIZER, RunFolder, write_atomically
from luqrun.runs.identity import Identity, difference, run_id
from luqrun.runs.reading import METRICS, SUMMARY, Unusable, read_json, usable_run

log = logging.getLogger(__name__)


def find_twin(config: Config, folder: RunFolder, data: dict) -> Path | None:
    """A finished (or diverged) run of another study beside this one with the same run id: of the same settings, data
    (a fingerprint), number of processes and RESULTS. One that was trained otherwise all the same is named in the log.

    Looked for in studies of one or two names, such as table3 and glyphs/table3.
    """
    name, depth = run_id(config, data), len(Path(config.study).parts)
    if folder.path.name != name or folder.path.parts[-depth - 1 : -1] != Path(config.study).parts:
        return None  # hydra.run.dir was set by hand: who knows what lies around it
    outputs, ours = folder.path.parents[depth], Identity.of(config, data)
    for path in sorted([*outputs.glob(f"*/{name}"), *outputs.glob(f"*/*/{name}")]):
        run = usable_run(path)
        if path == folder.path or run.get("reused") or not _has_ended(path, run):
            continue
        why = difference(Identity.stored(None, run), ours)
        if not why and len(run.get("world_sizes", [])) > 1:  # resumed by hand: no run that starts here would do that
            why = f"by {', then '.join(map(str, run['world_sizes']))} processes"
        if not why:
            return path
        log.info("not taken over from %s: that is a run %s", path, why)
    return None


def _has_ended(path: Path, run: dict) -> bool:
    if run.get("status") == "finished":
        with suppress(Unusable):
            return bool(read_json(path, SUMMARY))
    return run.get("status") == "diverged"


def adopt(twin: Path, folder: RunFolder) -> dict:
    """Take over the result of `twin`, its predictions too, without its checkpoints and curves; returns what a run of
    our own would."""
    run = usable_run(twin)
    run.pop("parent", None)  # as seen from there
    own = {name: folder.run()[name] for name in ("command", "overrides")}
    relative = os.path.relpath(twin, folder.path)  # so that outputs/ can be moved as a whole
    if (twin / METRICS).is_file():
        write_atomically(folder.path / METRICS, (twin / METRICS).read_bytes())
    for path in [twin / TOKENIZER, *(twin / PREDICTIONS).glob("*")]:
        if path.is_file():
            folder.write_text(str(path.relative_to(twin)), path.read_text())
    folder.update_run(**{**run, **own, "reused": relative})
    if (twin / SUMMARY).is_file():  # last, as it says that all the rest is there
        write_atomically(folder.path / SUMMARY, (twin / SUMMARY).read_bytes())
    return folder.summary() or {"diverged": run.get("diverged_at_step")}
