"""job=plan: what a command would run. Each job with its state, its folder and how long it still takes; none is started,
and nothing is written."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from luqrun.cli import own_configs, sweeps
from luqrun.cli.messages import one_line
from luqrun.cli.results import aligned, shown
from luqrun.cli.sweeps import Job
from luqrun.cli.validation import to_config, validate
from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.internals.of_hydra import grid
from luqrun.runs.durations import in_words
from luqrun.runs.estimates import Estimate, Estimates, epochs_done
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import refuse_other_run
from luqrun.runs.parent import epochs_before
from luqrun.runs.twins import find_twin
from luqrun.runtime import process_group
from luqrun.runtime.slurm import planned_ranks

PLAN = "job=plan"
FINISHED, DIVERGED, TAKEN_OVER = "finished", "diverged", "taken over"
ELSEWHERE, BEGUN, MISSING, AGAIN, REFUSED = "elsewhere", "begun", "missing", "again", "refused"

asked = False  # whether this process' command is for a plan


@dataclass
class Planned:
    """A job, what it has come to, and what it still takes: None where nothing tells. reason: of one that is refused."""

    job: Job
    state: str
    left: Estimate | None = None
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether the command would train here."""
        return self.state in (BEGUN, MISSING)

    @property
    def will_end(self) -> bool:
        """Whether the command brings a result here, which may not be there yet."""
        return self.runs or self.state == TAKEN_OVER


def taken_from(arguments: Sequence[str]) -> list[str]:
    """The command line without job=plan: its jobs are those of the command without."""
    global asked
    left = [argument for argument in arguments if argument.lstrip("+") != PLAN]
    asked = len(left) < len(arguments)
    return left


def show(config: DictConfig) -> None:
    """Print the plan of the command with this config, and leave: with exit code 1 where a job would be refused."""
    jobs = _plan(config)
    if not process_group.is_first():
        sys.exit()
    print("\n".join([*_table(jobs), _total(jobs)]), flush=True)
    refused = [(number, planned) for number, planned in enumerate(jobs, 1) if planned.state == REFUSED]
    for number, planned in refused:
        print(f"luqrun: job {number} of {len(jobs)} would be refused: {planned.reason}", file=sys.stderr)
    sys.exit(1 if refused else 0)


def _plan(config: DictConfig) -> list[Planned]:
    if config.hydra.mode == RunMode.MULTIRUN:
        loader = GlobalHydra.instance().config_loader()
        jobs = grid(config, OmegaConf.to_container(config.hydra.overrides.task), loader)
        if jobs is None:
            name = config.hydra.runtime.choices["hydra/sweeper"]
            raise UserError(
                f"{PLAN}: which jobs hydra/sweeper={name} runs follows from their results; basic has a plan"
            )
        composed = (sweeps.planned(loader, config, overrides, number) for number, overrides in enumerate(jobs))
    else:
        composed = [(Job(OmegaConf.to_container(config.hydra.overrides.task), Path(config.hydra.run.dir)), config)]
    estimates: dict[Path, Estimates] = {}
    found: dict[Path, Planned] = {}
    plan = []
    for job, own in composed:
        again = found.get(job.folder)
        if again and again.state != REFUSED:
            plan.append(Planned(job, AGAIN))
            continue
        before = {folder for folder, planned in found.items() if planned.will_end}
        found[job.folder] = _planned(job, own, estimates, before)
        plan.append(found[job.folder])
    return plan


def _planned(job: Job, composed: DictConfig, estimates: dict[Path, Estimates], before: Collection[Path]) -> Planned:
    """before: the folders to which jobs before this one bring a result."""
    from luqrun.runs.start import check_base  # loads torch
    from luqrun.tasks import fingerprint_data

    processes = planned_ranks(composed.hydra)
    folder = RunFolder(job.folder, writes=False)
    try:
        with process_group.planned_as(processes), own_configs.naming_files(composed, sys.argv[1:]):
            config = to_config(composed)
            validate(config, lambda: job.folder)
            data = fingerprint_data(config)
            refuse_other_run(config, data, folder)
            state = _state(config, data, folder)
            if state == MISSING:
                check_base(config, folder, data, before)
    except (UserError, OSError) as error:
        return Planned(job, REFUSED, reason=one_line(error))
    if state not in (BEGUN, MISSING):
        return Planned(job, state)
    study = Path(config.study).parts
    if job.folder.parts[-len(study) - 1 : -1] != study:  # hydra.run.dir was set by hand: who knows what lies around it
        return Planned(job, state)
    studies = job.folder.parents[len(study)]
    if studies not in estimates:
        estimates[studies] = Estimates(studies)
    done = epochs_done(job.folder) if state == BEGUN else epochs_before(config)
    return Planned(job, state, estimates[studies].of(config, processes, done))


def _state(config: Config, data: dict, folder: RunFolder) -> str:
    if folder.is_locked():
        return ELSEWHERE
    if folder.ended():
        if folder.run().get("reused"):
            return TAKEN_OVER
        return DIVERGED if folder.summary() is None else FINISHED
    if folder.begun():
        return BEGUN
    return TAKEN_OVER if config.reuse and find_twin(config, folder, data) else MISSING


def _table(jobs: Sequence[Planned]) -> list[str]:
    rows = [("state", "time left", "job", "run folder")]
    for planned, own in zip(jobs, sweeps.own_overrides([planned.job for planned in jobs]), strict=True):
        rows.append((planned.state, _left(planned), own, shown(planned.job.folder)))
    return aligned(rows)


def _left(planned: Planned) -> str:
    if not planned.runs:
        return ""
    if planned.left is None:
        return "unknown"
    return ("" if planned.left.alike else "~ ") + in_words(planned.left.seconds)


def _total(jobs: Sequence[Planned]) -> str:
    """Such as "12 jobs: 5 finished, 7 missing; 1 h 10 min left, one after the other"."""
    counts = ", ".join(f"{number} {state}" for state, number in Counter(planned.state for planned in jobs).items())
    text = f"{len(jobs)} job{'s' if len(jobs) > 1 else ''}: {counts}"
    missing = [planned.left for planned in jobs if planned.runs]
    known = [left for left in missing if left is not None]
    if known:
        text += f"; {in_words(sum(left.seconds for left in known))} left, one after the other"
        text += ", by finished runs of the same kind" if all(left.alike for left in known) else ""
        text += "" if all(left.alike for left in known) else " (~: by runs of another recipe)"
    if unknown := len(missing) - len(known):
        text += (
            f"; how long {unknown} of them take{'s' if unknown == 1 else ''}, no finished run of the same kind tells"
        )
    return text
