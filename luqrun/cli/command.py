"""The command line: Hydra in, run folder out.

Light to import: torch and the rest are loaded inside the job, so that --help and typing errors answer at once.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luqrun import RESULTS, __version__
from luqrun.cli import overrides, own_configs, plan, sweeps
from luqrun.cli.callback import close_logs
from luqrun.cli.messages import explain_override, one_line, raised_by_hydra, refuse
from luqrun.cli.overrides import options_first, with_companions, with_parents_overrides
from luqrun.cli.results import closing_table, jobs_table
from luqrun.cli.startup import quick_start, quieten_libraries
from luqrun.cli.validation import to_config, validate
from luqrun.cli.work import work
from luqrun.config import Config, conf_dir
from luqrun.errors import UserError
from luqrun.runs.folder import Busy, RunFolder, now, provenance, write_atomically
from luqrun.runs.identity import LAYOUT, refuse_other_run, run_id, runs_beside
from luqrun.runs.metric import Metric
from luqrun.runs.reading import CONFIG, SUMMARY, metric_of
from luqrun.runs.twins import adopt, find_twin
from luqrun.runtime import process_group
from luqrun.runtime.memory import keep_memory
from luqrun.runtime.openmp import limit_spinning
from luqrun.runtime.signals import Requests, Stopped, call_earlier_handler, handled
from luqrun.runtime.slurm import join_ranks, planned_ranks

log = logging.getLogger("luqrun")


def main() -> None:
    """The `luqrun` command."""
    started = time.monotonic()
    limit_spinning()  # before torch loads its OpenMP
    keep_memory()
    atexit.register(gc.freeze)  # or Python would look through all of torch for garbage before it ends
    logging.raiseExceptions = False  # run.log on a full disk: the error is told once, not at each line
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, and here it becomes one line
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_id", _resolve_run_id, replace=True)
    try:
        if "--version" in sys.argv[1:]:
            print(f"luqrun {__version__}")
            sys.exit()
        sys.argv[1:] = with_companions(options_first(with_parents_overrides(plan.taken_from(sys.argv[1:]))))
        own_configs.refuse_shadowed(sys.argv[1:])
        try:
            with quick_start():
                hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
        finally:
            if sweeps.jobs:
                print(jobs_table(sweeps.jobs, time.monotonic() - started), flush=True)
        _tell_failures()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        refuse(own_configs.located(error, sys.argv[1:]))
    except yaml.YAMLError as error:
        located = own_configs.located(error, sys.argv[1:])
        refuse(located if located is not error else UserError(f"a YAML file cannot be read: {error}"))
    except BrokenPipeError:  # `luqrun --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        when = "; the same command goes on with what is missing" if sweeps.jobs else " before the run began"
        print(f"luqrun: interrupted{when}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "No trials are completed" in str(error):  # Optuna's, where all have failed
            _tell_failures()
        if not raised_by_hydra(error):
            raise
        located = own_configs.located(error, sys.argv[1:])
        if located is not error:
            refuse(located)
        if isinstance(error.__cause__, OSError):  # run.log cannot be opened
            refuse(error.__cause__)
        refuse(UserError(explain_override(error, sys.argv[1:])))


def _tell_failures() -> None:
    """A line for each job of a sweep that failed, and the exit code 1."""
    failures = sweeps.failures(sweeps.jobs)
    for line in failures:
        print(f"luqrun: {line}", file=sys.stderr)
    if failures:
        sys.exit(1)


def _resolve_run_id(*, _root_: DictConfig) -> str:
    """${run_id:}, the name of the run folder. A config that job() will refuse gets a name too, or a sweep would end."""
    circular = "${run_id:} follows from the settings, so that none of them can hold it"
    if "hydra" not in _root_:  # to_config asks, for the settings that the name is made of
        raise UserError(circular)
    circular += "".join(f": {text}" for text in OmegaConf.to_container(_root_.hydra.overrides.task) if "$" in text)
    if _resolving:  # a setting holds ${hydra:run.dir}
        _resolving.append(True)
        raise UserError(circular)
    _resolving.append(True)
    try:
        config = to_config(_root_)
        return run_id(config, _fingerprint(config), planned_ranks(_root_.hydra))
    except (UserError, OSError) as error:
        if len(_resolving) > 1:
            raise UserError(circular) from error
        return "refused-" + hashlib.sha256(str(error).encode()).hexdigest()[:8]
    finally:
        _resolving.clear()


def _fingerprint(config: Config) -> dict:
    from luqrun.tasks import fingerprint_data  # loads numpy

    return fingerprint_data(config)


_resolving: list[bool] = []  # one for each time that ${run_id:} was asked for while it was made


def job(composed: DictConfig) -> float | None:
    """One run, from its composed config to its run folder, or one process of it, where there are several.

    Returns what a sweeper maximizes (see _objective).
    """
    gc.enable()
    quieten_libraries(HydraConfig.get().verbose)
    join_ranks()
    folder = RunFolder(HydraConfig.get().runtime.output_dir, writes=process_group.is_first())
    if not folder.writes:
        _only_warn()
    sweeps.announce()
    summary = failure = None
    requests = Requests()
    try:
        with handled() as requests, ExitStack() as held:
            with own_configs.naming_files(HydraConfig.instance().cfg, sys.argv[1:]):
                config = to_config(composed)
                validate(config, lambda: folder.path)
            data = _fingerprint(config)
            if folder.writes and HydraConfig.get().mode == RunMode.RUN and HydraConfig.get().sweeper.get("params"):
                log.warning("this config is a sweep (hydra.sweeper.params), which only -m runs: without, it is one run")
            if folder.writes and HydraConfig.get().mode == RunMode.RUN:
                for line in overrides.repeated(HydraConfig.instance().cfg):
                    log.warning(line)
            process_group.join()
            held.callback(process_group.leave)
            summary = process_group.run_on_first(lambda: _begin(config, data, folder, held))
            if summary is None:
                with _marking_failure(folder):
                    summary = work(config, folder, requests)
            if folder.writes:
                print(_closing_table(config, summary, folder), flush=True)
            requests.raise_if_asked()
    except Busy as busy:
        if HydraConfig.get().mode == RunMode.RUN:
            refuse(busy)
        log.warning("luqrun: %s; left to it", busy)
    except process_group.RefusedByFirst:
        # In a job of submitit no error: it could end the first one before that has told its own.
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(1)
    except Stopped as stopped:
        found = (folder.checkpoints / "last.pt").exists()
        then = "continues from the last checkpoint" if found else "starts over, there is no checkpoint yet"
        if folder.summary() is not None:
            then = "shows the result, for the run is finished,"
        if folder.writes:
            log.warning("stopped by %s; the same command %s in %s", stopped, then, folder.path)
        handed_on = call_earlier_handler(stopped.number)
        # A rank that leaves with an error could end the first one before that has asked Slurm to run the job again.
        sys.exit(0 if handed_on and not process_group.is_first() else stopped.exit_code)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if HydraConfig.get().mode == RunMode.RUN:
            refuse(error)
        log.error("luqrun: %s", one_line(error))
        folder.remove_if_never_started()
        failure = sweeps.Refused(one_line(error))
    except Exception as error:
        log.exception("the run failed")
        failure = sweeps.Failed(f"{type(error).__name__}: {error}; the traceback is in {folder.path / 'run.log'}")
        if HydraConfig.get().mode == RunMode.RUN:
            refuse(failure)
    if failure is not None:  # raised here, without the first error as its context: that holds the job's tensors
        if requests.received is not None:  # asked to stop, it failed at that: the sweep ends all the same
            sys.exit(Stopped(requests.received).exit_code)
        raise failure
    return None if summary is None else _objective(summary, folder.metric())


def _objective(summary: dict, metric: Metric) -> float | None:
    """The metric in the end, its negative where less is better; of a diverged run the worst there is; None where there
    is none."""
    value = metric.worst if "diverged" in summary else summary.get(metric.name)
    return value if value is None or metric.higher_is_better else -value


def _closing_table(config: Config, summary: dict, folder: RunFolder) -> str:
    run = folder.run()
    try:
        return closing_table(config, summary, folder.path, run.get("overrides", []), metric_of(run))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise folder.damaged(f"{SUMMARY} is damaged ({type(error).__name__}: {error})") from None


def _only_warn() -> None:
    """On the console, what is wrong and in which process; nothing to a file."""
    close_logs()
    for handler in logging.root.handlers:
        handler.setFormatter(logging.Formatter(f"rank {process_group.rank()}: %(message)s"))
    logging.root.setLevel(logging.WARNING)


@contextmanager
def _marking_failure(folder: RunFolder) -> Iterator[None]:
    """If the run ends otherwise, run.json says why. Under the lock: without it run.json may be another's."""
    try:
        yield
    except Stopped as stopped:
        _mark_failed(folder, f"stopped by {stopped}")
        raise
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder.path)  # a file that was open when the disk filled up
        _mark_failed(folder, one_line(error))
        raise
    except Exception as error:
        _mark_failed(folder, f"{type(error).__name__}: {error}")
        raise


def _begin(config: Config, data: dict, folder: RunFolder, held: ExitStack) -> dict | None:
    """Lock the folder until `held` ends; the result, where there is one already, or None for a run to be done.

    data: the fingerprint of what the run reads.
    """
    held.enter_context(folder.locked())
    refuse_other_run(config, data, folder)  # before anything in another run's folder is changed
    with _marking_failure(folder):
        summary, run = folder.summary(), folder.run()
        if folder.ended():
            return _ended(config, data, folder, summary, run)
        begun = folder.begun()
        if not begun and (others := runs_beside(config, data, folder.path)):
            log.info("%s", others)
        write_atomically(folder.path / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
        started = {"start": run.get("start", now()), "end": None, "reason": None, "reused": None}
        given = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as given: ${..x} means nothing here
        decides = {"layout": LAYOUT, "results": RESULTS, "data": data, "world_sizes": [process_group.world_size()]}
        folder.update_run(status="running", overrides=given, **decides, **started, **provenance())
        if folder.checkpoints.exists():
            return None
        if config.reuse and (twin := find_twin(config, folder, data)):
            log.info("taken over from %s, the same run in another study (in a new study, reuse=false trains it)", twin)
            return adopt(twin, folder)
        if config.resume != "base":
            return None
        from luqrun.runs.start import diverged_base  # pulls in torch

        if base := diverged_base(config, folder, data):
            log.info("diverged as the run without fine-tuning, %s, did", base)
            return adopt(base, folder)
        return None


def _ended(config: Config, data: dict, folder: RunFolder, summary: dict | None, run: dict) -> dict:
    """The result that is there, which is this run's."""
    what = "diverged before, and would again" if summary is None else "is finished"
    by_name = folder.path.name == run_id(config, data)
    elsewhere = "study=NAME" if by_name else "a folder of its own (hydra.run.dir, hydra.sweep.subdir)"
    log.info("this run %s%s; %s runs it again elsewhere", what, _notes(data, run), elsewhere)
    if config.tracking.profile_steps:
        asked = f"tracking.profile_steps={config.tracking.profile_steps}"
        log.warning("%s: nothing is profiled, as nothing is trained; with reuse=false %s trains it", asked, elsewhere)
    return {"diverged": run.get("diverged_at_step")} if summary is None else summary


def _notes(data: dict, run: dict) -> str:
    """What is to be said beside a result: "", or such as " (trained by 2, then 1 processes)"."""
    root, sizes = (run.get("data") or {}).get("root"), run.get("world_sizes", [])
    notes = [] if root == data.get("root") else [f"with dataset.root={root}"]
    notes += [f"trained by {', then '.join(map(str, sizes))} processes"] if len(sizes) > 1 else []
    return f" ({'; '.join(notes)})" if notes else ""


def _mark_failed(folder: RunFolder, reason: str) -> None:
    """Say so in run.json, if a run had begun there and the disk still takes it."""
    try:
        if folder.writes and folder.run().get("status") == "running":
            folder.update_run(status="failed", reason=reason, end=now())
    except (OSError, UserError) as error:
        log.error("run.json could not be updated: %s", one_line(error))
