"""The settings of a run, from its folder, as the runner had them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from luqrun.config import PRECISIONS, Config
from luqrun.errors import UserError, check_choice
from luqrun.runs.reading import CONFIG, read_config
from luqrun.runs.weights import SETTINGS, is_file
from luqrun.tasks import validate_task


def stored_config(run: Path) -> Config:
    """config.yaml of a run folder, checked. Raises UserError where there is none, or one that no run can have."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(Config, OmegaConf.create(read_config(run))))
        validate_task(config)
        check_choice("precision", config.precision, PRECISIONS)
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError, TypeError) as error:  # UserError too
        raise UserError(f"{run / CONFIG}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    return config


def with_own_weights(config: Config, run: Path, path: Path) -> Config:
    """The settings of a run that started from model.weights, with its own checkpoint in their place: they may be gone,
    and what belonged to them (tokenizer, sizes) lies in the run folder. Those of another run as they are."""
    if is_file(config.model.weights) or (run / SETTINGS).is_file():
        return dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(path)))
    return config
