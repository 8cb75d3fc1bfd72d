"""For the tests of twins and bases: folders of runs as they are found later, without any training."""

import dataclasses

from running import tiny

from luqrun import RESULTS
from luqrun.config import Config
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import LAYOUT, run_id

FINISHED = {
    "status": "finished",
    "versions": {"luqrun": "0.0.1"},
    "layout": LAYOUT,
    "data": {},
    "results": RESULTS,
    "world_sizes": [1],
    "start": "then",
    "end": "later",
    "command": ["x"],
}
DIVERGED = {**FINISHED, "status": "diverged", "diverged_at_step": 3}


def config(study="a", tuned=False, **changes) -> Config:
    """A run without or with a fine-tune, as Hydra would compose it: that takes it a fifth of a second each."""
    found = tiny("quant=fp32", "finetune=fnt1", "resume=base") if tuned else tiny("quant=fp32")
    return dataclasses.replace(found, study=study, **changes)


def place(outputs, config, run=None, summary=None) -> RunFolder:
    """The folder of a run under `outputs`, with what was written there."""
    folder = RunFolder(outputs / config.study / run_id(config, {}))
    folder.path.mkdir(parents=True, exist_ok=True)
    if run is not None:
        folder.write_json("run.json", run)
    if summary is not None:
        folder.write_json("summary.json", summary)
    return folder


def contents(folder):
    """Every file but the log and the lock: checkpoints, curves, json."""
    files = (path for path in folder.path.rglob("*") if path.is_file() and path.name not in ("run.log", ".lock"))
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}
