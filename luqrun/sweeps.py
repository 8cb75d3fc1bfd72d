"""A sweep: its jobs, what became of each, and a failure of one as a value, so that the others go on.

Hydra's launchers differ in where the jobs run, in this process, in others or on a cluster, and what a callback hears
of them; its sweepers end at the first failure. So the launcher in use is watched: see `watch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.utils import get_class
from omegaconf import DictConfig, open_dict

from luqrun.errors import UserError
from luqrun.refusals import one_line
from luqrun.run_folder import RunFolder


class Refused(CompactHydraException):
    """A user's mistake in one job of a sweep."""


class Failed(CompactHydraException):
    """An error in one job of a sweep, as text: it travels between processes, and keeps no tensors alive."""


class Died(Failed):
    """A job whose process ended without a result: killed, out of memory, stopped by a signal."""


@dataclass
class Job:
    """A job of the sweep: what was overridden, its run folder, and the error with which it ended."""

    overrides: str
    folder: Path
    error: Exception | None = None

    def outcome(self) -> tuple[str, str]:
        """(status, top-1) for the closing table."""
        died = isinstance(self.error, Died)
        if self.error is not None and not died:
            return "refused" if isinstance(self.error, Refused) else "failed", ""
        folder = RunFolder(self.folder)
        try:
            status, summary = folder.run().get("status"), folder.summary() or {}
            top1 = f"{summary['val/top1']:.2f}" if "val/top1" in summary else ""
        except (OSError, ValueError, TypeError):  # UserError too
            return "damaged", ""
        if status is None:
            status = "killed" if died else "not run"
        elif status == "running":
            status = "elsewhere" if folder.is_locked() else "killed"
        return str(status), top1


jobs: list[Job] = []  # of this process' sweep, by Hydra's job number


def watch(config: DictConfig) -> None:
    """Let `jobs` have every job that the sweep's launcher is given."""
    launcher = get_class(config.hydra.launcher._target_)
    if hasattr(launcher.launch, "__wrapped__"):
        return  # an earlier sweep of this process
    launcher.launch = _watched(launcher.launch)
    if launcher.__module__.startswith("hydra_plugins.hydra_submitit_launcher"):
        _bear_deaths()


def ended(number: int, job_return: JobReturn) -> None:
    """Note how a job of this process' sweep ended."""
    if number < len(jobs) and job_return.status == JobStatus.FAILED:
        jobs[number].error = job_return._return_value


def _watched(launch: Callable) -> Callable:
    """A launcher's method `launch` that fills `jobs`, and hands failures to it and not to the sweeper."""

    @functools.wraps(launch)
    def watched(launcher: Launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int):
        if initial_job_idx == 0:
            jobs.clear()
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            jobs.append(_planned(launcher, overrides, number))
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


def _planned(launcher: Launcher, overrides: Sequence[str], number: int) -> Job:
    """The job that these overrides make, composed as the launcher will."""
    composed = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    folder = Path(composed.hydra.sweep.dir, composed.hydra.sweep.subdir)
    return Job(" ".join(composed.hydra.overrides.task), folder)


def _bear_deaths() -> None:
    """Let a submitit job that ended without a result be a failed one: the launcher waits for all in one loop."""
    from submitit.core.core import Job as SubmititJob
    from submitit.core.utils import UncompletedJobError

    results = SubmititJob.results

    def borne(job: SubmititJob) -> list[JobReturn]:
        try:
            return results(job)
        except UncompletedJobError as error:
            what = " ".join(" ".join(str(error).splitlines()[:2]).split())
            return [JobReturn(status=JobStatus.FAILED, _return_value=Died(f"{what}; see {job.paths.stderr}"))]

    SubmititJob.results = borne


def own_overrides(of: Sequence[Job]) -> list[str]:
    """What tells each job's overrides from the others'."""
    common = set.intersection(*(set(job.overrides.split()) for job in of)) if len(of) > 1 else set()
    return [" ".join(override for override in job.overrides.split() if override not in common) for job in of]


def failures(of: Sequence[Job]) -> list[str]:
    """A line for each job that was refused, failed or died."""
    words = {Refused: "was refused", Died: "died"}
    return [
        f"job {number} ({own}) {words.get(type(job.error), 'failed')}: {' '.join(str(job.error).split())}"
        for number, (job, own) in enumerate(zip(of, own_overrides(of), strict=True))
        if job.error is not None
    ]
