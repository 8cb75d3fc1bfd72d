"""A sweep: its jobs, what became of each, and a failure of one as a value, so that the others go on.

Hydra's launchers differ in where the jobs run, in this process, in others or on a cluster, and what a callback hears
of them; its sweepers end at the first failure. So the launcher in use is watched: see `watch`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from luqrun.cli.messages import one_line
from luqrun.cli.overrides import shell_words
from luqrun.cli.own_configs import refuse_empty
from luqrun.errors import UserError
from luqrun.internals.of_hydra import fail_for_dead_jobs, failure_of, ships_with_hydra
from luqrun.runs.folder import RunFolder
from luqrun.runs.metric import TOP1, Metric

log = logging.getLogger("luqrun")

READ_BEFORE = ("launcher", "sweeper", "callbacks")  # parts of Hydra's settings that are the sweep's and no job's


class Refused(CompactHydraException):
    """A user's mistake in one job of a sweep."""


class Failed(CompactHydraException):
    """An error in one job of a sweep, as text: it travels between processes, and keeps no tensors alive."""


class Died(Failed):
    """A job whose process ended without a result: killed, out of memory, stopped by a signal."""


class Outcome(NamedTuple):
    """What became of a job. value: its metric in the end, as text; "" where it has none."""

    status: str
    value: str = ""
    metric: Metric = TOP1


@dataclass
class Job:
    """A job of the sweep: its overrides, its run folder, and the error with which it ended."""

    overrides: Sequence[str]
    folder: Path
    error: Exception | None = None

    def outcome(self) -> Outcome:
        """For the closing table."""
        died = isinstance(self.error, Died)
        if self.error is not None and not died:
            return Outcome("refused" if isinstance(self.error, Refused) else "failed")
        folder = RunFolder(self.folder)
        try:
            run, metric, value = folder.run(), folder.metric(), (folder.summary() or {}).get(folder.metric().name)
        except UserError:
            return Outcome("damaged")
        status = run.get("status")
        if status is None and not died:
            status = "elsewhere" if folder.is_locked() else "not run"  # it may have just begun there
        elif status is None:
            status = "killed"
        elif status == "failed" and str(run.get("reason")).startswith("stopped by "):  # a signal
            status = "interrupted"
        elif status == "running":
            status = "elsewhere" if folder.is_locked() else "killed"
        return Outcome(str(status), "" if value is None else f"{value:.2f}", metric)


jobs: list[Job] = []  # of this process' sweep, by Hydra's job number


def watch(config: DictConfig, count: int | None) -> None:
    """Let `jobs` have every job that the sweep's launcher is given; `count`: how many there are, if known."""
    JobRuntime.instance().set("jobs", count)  # which launchers hand to their processes
    launcher = get_class(config.hydra.launcher._target_)
    logging.getLogger(launcher.__module__).setLevel(logging.WARNING)  # its announcements, which `announce` makes
    if hasattr(launcher.launch, "__wrapped__"):
        return  # an earlier sweep of this process
    launcher.launch = _watched(launcher.launch)
    if launcher.__module__.startswith("hydra_plugins.hydra_submitit_launcher"):
        fail_for_dead_jobs(Died)


def ended(number: int, job_return: JobReturn) -> None:
    """Note how and where a job of this process' sweep ended."""
    if number >= len(jobs):
        return
    jobs[number].error = failure_of(job_return) or jobs[number].error
    if job_return.hydra_cfg is not None:  # known for certain only now: ${now:} and ${hydra:job.id} may be in the name
        jobs[number].folder = Path(job_return.hydra_cfg.hydra.runtime.output_dir)


def announce() -> None:
    """In a job of a sweep, say which it is."""
    config = HydraConfig.get()
    if config.mode == RunMode.MULTIRUN:
        log.info("%s", _title(config.job.num, OmegaConf.to_container(config.overrides.task)))


def _title(number: int, overrides: Sequence[str]) -> str:
    return f"{_name(number)}: {shell_words(overrides)}"


def _name(number: int) -> str:
    """Such as job 3 of 12, which has number 2."""
    try:
        return f"job {number + 1} of {JobRuntime.instance().get('jobs')}"
    except KeyError:
        return f"job {number + 1}"


def _watched(launch: Callable) -> Callable:
    """A launcher's method `launch` that fills `jobs`, and hands failures to it and not to the sweeper."""

    @functools.wraps(launch)
    def watched(launcher: Launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int):
        if initial_job_idx == 0:
            jobs.clear()
        loader = launcher.hydra_context.config_loader
        found = [planned(loader, launcher.config, each, at) for at, each in enumerate(job_overrides, initial_job_idx)]
        jobs.extend([job for job, _ in found])
        if not ships_with_hydra(type(launcher)):  # the jobs' own words may be on no console
            for number, job in enumerate(jobs[initial_job_idx:], initial_job_idx):
                print(f"to {type(launcher).__name__}: {_title(number, job.overrides)}", file=sys.stderr)
        try:
            returns = launch(launcher, job_overrides, initial_job_idx)
        except (RuntimeError, OSError, SubprocessError) as error:  # no cluster here, no place for a job's folder
            raise UserError(f"the jobs could not be started: {one_line(error)}") from error
        for number, job_return in enumerate(returns, initial_job_idx):
            ended(number, job_return)
            if job_return.status == JobStatus.FAILED:
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        return returns

    return watched


def planned(loader: ConfigLoader, sweep: DictConfig, overrides: Sequence[str], number: int) -> tuple[Job, DictConfig]:
    """The job that these overrides make in a sweep, and its config, composed as the launcher will."""
    composed = loader.load_sweep_config(sweep, list(overrides))
    _refuse_read_before(sweep, composed)
    refuse_empty(composed, sys.argv[1:])
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    hydra_config = HydraConfig.instance()
    of_the_sweep = hydra_config.cfg
    hydra_config.cfg = composed  # for ${hydra:job.num} in what names the folder
    try:
        folder = Path(composed.hydra.sweep.dir, composed.hydra.sweep.subdir)
    finally:
        hydra_config.cfg = of_the_sweep
    return Job(OmegaConf.to_container(composed.hydra.overrides.task), folder), composed


def _refuse_read_before(sweep: DictConfig, job: DictConfig) -> None:
    """Raise UserError for a job that sets what Hydra reads once, before the sweep, as an experiment may that is one of
    several swept over: it would be ignored."""
    before, after = sweep.hydra.runtime.choices, job.hydra.runtime.choices
    differing = [group for group in after if before.get(group) != after[group]]
    for part in READ_BEFORE:
        group = f"hydra/{part}"
        same = OmegaConf.to_container(job.hydra[part]) == OmegaConf.to_container(sweep.hydra[part])
        if same and group not in differing:
            continue
        given = OmegaConf.to_container(job.hydra.overrides.task)
        swept = [text for text in given if text.lstrip("+").partition("=")[0] in differing]
        what = f"{group}={after[group]}" if group in differing else f"hydra.{part}"
        raise UserError(
            f"{shell_words(swept)} sets {what}, which is read once, before a sweep, and not for each job: run one "
            f"command for each of what is swept over here"
        )


def own_overrides(of: Sequence[Job]) -> list[str]:
    """What tells each job's overrides from the others', as one writes it in a shell."""
    common = set.intersection(*(set(job.overrides) for job in of)) if len(of) > 1 else set()
    return [shell_words([override for override in job.overrides if override not in common]) for job in of]


def failures(of: Sequence[Job]) -> list[str]:
    """A line for each job that was refused, failed or died."""
    words = {Refused: "was refused", Died: "died"}
    return [
        f"job {number} of {len(of)} ({own}) {words.get(type(job.error), 'failed')}: {' '.join(str(job.error).split())}"
        for number, (job, own) in enumerate(zip(of, own_overrides(of), strict=True), 1)
        if job.error is not None
    ]
