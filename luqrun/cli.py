"""The command line: Hydra in, run folder out.

Light to import: torch and the rest are loaded inside the job, so that --help and typing errors answer at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luqrun.closing import closing_table, jobs_table
from luqrun.config import Config, conf_dir
from luqrun.errors import UserError
from luqrun.refusals import is_hydras, one_line, out_of_memory, stumbled
from luqrun.reuse import adopt, diverged_base, find_twin
from luqrun.run_folder import SUMMARY, Busy, RunFolder, now, provenance, run_id, write_atomically
from luqrun.spinning import limit_spinning
from luqrun.stopping import Requests, Stopped, handled
from luqrun.validate import to_config, validate

log = logging.getLogger("luqrun")
jobs: list[tuple[str, Path]] = []  # of the sweep, those that have ended: overrides and run folder


class Refused(CompactHydraException):
    """A user's mistake in one job of a sweep: the others go on."""


def main() -> None:
    """The `luqrun` command."""
    limit_spinning()  # before torch loads its OpenMP
    logging.raiseExceptions = False  # run.log on a full disk: the error is told once, not at each line
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, and here it becomes one line
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_id", _resolve_run_id, replace=True)
    try:
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
        finally:
            if jobs:
                print(jobs_table(jobs), flush=True)
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(error)
    except yaml.YAMLError as error:
        _refuse(UserError(f"a YAML file cannot be read: {error}"))
    except BrokenPipeError:  # `luqrun --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("luqrun: interrupted before the run began", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_hydras(error):
            raise
        if isinstance(error.__cause__, OSError):  # run.log cannot be opened
            _refuse(error.__cause__)
        _refuse(UserError(stumbled(error, sys.argv[1:])))


def _resolve_run_id(*, _root_: DictConfig) -> str:
    """${run_id:}, the name of the run folder. A config that job() will refuse gets a name too, or a sweep would end."""
    if "hydra" not in _root_:  # to_config asks, for the settings that the name is made of
        raise UserError("${run_id:} follows from the settings, so that none of them can hold it")
    try:
        return run_id(to_config(_root_))
    except UserError as error:
        return "refused-" + hashlib.sha256(str(error).encode()).hexdigest()[:8]


class Checks(Callback):
    """What must hold before Hydra makes a folder or starts a sweep. (Hydra swallows all errors here but SystemExit.)"""

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        try:
            if _under_torchrun():
                raise UserError("WORLD_SIZE > 1: training in several processes is not part of this version yet")
            validate(to_config(config))
            _make_folder(Path(config.hydra.run.dir))
        except (UserError, OSError, OmegaConfBaseException) as error:
            _refuse(error)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        try:
            if _under_torchrun():
                raise UserError("-m (a sweep) cannot run under torchrun: start one job after the other")
            _make_folder(Path(config.hydra.sweep.dir))
        except (UserError, OSError, OmegaConfBaseException) as error:
            _refuse(error)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            folder = Path(job_return.working_dir if config.hydra.job.chdir else config.hydra.runtime.output_dir)
            jobs.append((" ".join(job_return.overrides), folder))


def _under_torchrun() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _make_folder(path: Path) -> None:
    """Make the folder and prove that it takes a file."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe.{os.getpid()}"
    try:
        probe.write_text("luqrun")
    finally:
        probe.unlink(missing_ok=True)


def job(composed: DictConfig) -> None:
    """One run, from its composed config to its run folder."""
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    try:
        with handled() as requests:
            config = to_config(composed)
            validate(config)
            with folder.locked():
                _marking_failure(config, folder, requests)
            requests.insist()
    except Busy as busy:
        if HydraConfig.get().mode == RunMode.RUN:
            _refuse(busy)
        log.warning("luqrun: %s; left to it", busy)
    except Stopped as stopped:
        found = (folder.checkpoints / "last.pt").exists()
        then = "continues from the last checkpoint" if found else "starts over, there is no checkpoint yet"
        if folder.summary() is not None:
            then = "shows the result, for the run is finished,"
        log.warning("stopped by %s; the same command %s in %s", stopped, then, folder.path)
        sys.exit(stopped.exit_code)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if HydraConfig.get().mode == RunMode.RUN:
            _refuse(error)
        log.error("luqrun: %s", one_line(error))
        folder.remove_if_never_started()
        raise Refused(f"a job of the sweep was refused: {one_line(error)}") from None
    except Exception as error:
        log.exception("the run failed")
        traceback.clear_frames(error.__traceback__)  # or the failed job's tensors live to the end of a sweep
        raise


def _marking_failure(config: Config, folder: RunFolder, requests: Requests) -> None:
    """The run; if it ends otherwise, run.json says why. Under the lock: without it run.json may be another's."""
    try:
        _start_or_show(config, folder, requests)
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


def _start_or_show(config: Config, folder: RunFolder, requests: Requests) -> None:
    """Run, unless the folder already holds the result."""
    summary = folder.summary()
    run = folder.run()
    if summary is not None:
        log.info("this run is finished%s; study=NAME runs it again elsewhere", _other_root(config, folder))
    elif run.get("status") == "diverged":
        summary = {"diverged": run.get("diverged_at_step")}
        log.info("this run diverged before, and would again; study=NAME runs it again elsewhere")
    else:
        write_atomically(folder.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
        started = {"start": run.get("start", now()), "end": None, "reason": None, "reused": None}
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as given: ${..x} means nothing here
        folder.update_run(status="running", overrides=overrides, **started, **provenance())
        begun = folder.checkpoints.exists()
        twin = find_twin(config, folder) if config.reuse and not begun else None
        base = diverged_base(config, folder) if twin is None and not begun else None
        if twin is not None:
            log.info("taken over from %s, the same run in another study (in a new study, reuse=false trains it)", twin)
            summary = adopt(twin, folder)
        elif base is not None:
            log.info("diverged as the run without fine-tuning, %s, did", base)
            summary = adopt(base, folder)
        else:
            summary = _work(config, folder, requests)
    try:
        table = closing_table(config, summary, folder.path, folder.run().get("overrides", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise folder.damaged(SUMMARY, f"{type(error).__name__}: {error}") from None
    print(table, flush=True)


def _work(config: Config, folder: RunFolder, requests: Requests) -> dict:
    # Imported here and not above: --help and typing errors do without torch.
    if config.task == "rounding":
        from luqrun import rounding

        return rounding.run(config, folder)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from luqrun import trainer

    try:
        with logging_redirect_tqdm():
            return trainer.run(config, folder, requests)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        sizes = f"dataset.batch_size={config.dataset.batch_size}, dataset.image_size={config.dataset.image_size}"
        raise UserError(f"there is not enough memory for model.name={config.model.name}, {sizes}") from None


def _other_root(config: Config, folder: RunFolder) -> str:
    """A hint where the finished run read its images from another place: the run id does not tell."""
    try:
        root = yaml.safe_load((folder.path / "config.yaml").read_text())["dataset"]["root"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError, KeyError):
        return ""  # damaged: but the result is there
    return f" (with dataset.root={root})" if root != config.dataset.root else ""


def _mark_failed(folder: RunFolder, reason: str) -> None:
    """Say so in run.json, if a run had begun there and the disk still takes it."""
    try:
        if folder.run().get("status") == "running":
            folder.update_run(status="failed", reason=reason, end=now())
    except (OSError, UserError) as error:
        log.error("run.json could not be updated: %s", one_line(error))


def _refuse(error: Exception) -> None:
    print(f"luqrun: {one_line(error)}", file=sys.stderr)
    sys.exit(1)
