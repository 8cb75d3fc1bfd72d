"""What must hold before Hydra makes a folder or starts a sweep, and what is to be done when a job ends."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from luqrun.cli import optuna_storage, overrides, own_configs, plan, sweeps
from luqrun.cli.messages import refuse
from luqrun.cli.validation import to_config, validate
from luqrun.errors import UserError
from luqrun.runtime import process_group

REFUSED = (UserError, OSError, OmegaConfBaseException, HydraException)


class RunCallback(Callback):
    """What must hold before Hydra makes a folder or starts a sweep. (Hydra swallows all errors here but SystemExit.)"""

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        try:
            _introduce(config)
            overrides.refuse_alone(config)
            overrides.repeated(config)
            if plan.asked:
                plan.show(config)
            with own_configs.naming_files(config, sys.argv[1:]):
                own = to_config(config)
                validate(own, lambda: Path(config.hydra.run.dir))
            from luqrun.tasks import fingerprint_data  # loads numpy

            fingerprint_data(own)  # the folder is named for the data: without them there is none
            if process_group.is_first():
                make_folder(Path(config.hydra.run.dir))
        except REFUSED as error:
            refuse(error)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        try:
            if process_group.world_size() > 1:
                raise UserError("-m (a sweep) cannot run under torchrun: start one job after the other")
            _introduce(config)
            repeated = overrides.repeated(config)
            count = overrides.count_jobs(config, GlobalHydra.instance().config_loader())
            if plan.asked:
                plan.show(config)
            optuna_storage.prepare(config)
            sweeps.watch(config, count)
            make_folder(Path(config.hydra.sweep.dir))
            print(*repeated, sep="\n", end="\n" * bool(repeated), file=sys.stderr)
        except REFUSED as error:
            refuse(error)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            sweeps.ended(config.hydra.job.num, job_return)
            close_logs()  # what is said until the next job begins is none of this one's


def _introduce(config: DictConfig) -> None:
    """Let ${hydra:...} mean this config, as in the job itself, which is the first where it has no number."""
    with read_write(config.hydra), open_dict(config.hydra):
        for name in ("num", "id"):
            if OmegaConf.is_missing(config.hydra.job, name):
                config.hydra.job[name] = 0
    HydraConfig.instance().set_config(config)
    OmegaConf.set_readonly(config.hydra, None)
    own_configs.refuse_empty(config, sys.argv[1:])
    overrides.refuse_deleted(config)


def make_folder(path: Path) -> None:
    """Make the folder and prove that it takes a file."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe.{os.getpid()}"
    try:
        probe.write_text("luqrun")
    finally:
        probe.unlink(missing_ok=True)


def close_logs() -> None:
    """Write to no file any more what is logged in this process, until a job begins."""
    for handler in [each for each in logging.root.handlers if isinstance(each, logging.FileHandler)]:
        logging.root.removeHandler(handler)
        handler.close()
