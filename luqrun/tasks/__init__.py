"""Tasks: what a network learns, with its data, networks, loss and metrics. The data set decides the task."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from luqrun.config import Config, check_choice
from luqrun.tasks.classification.data import NAMES as IMAGE_SETS

if TYPE_CHECKING:
    from luqrun.tasks.task import Task

# dataset.name: the module of its task, loaded on first use. It has `build(config) -> Task` and `validate(config)`.
MODULES = dict.fromkeys(IMAGE_SETS, "luqrun.tasks.classification.task")


def build_task(config: Config) -> Task:
    """The task of a run, with its data. Raises UserError naming the key, or the file, that is wrong."""
    return _module(config).build(config)


def validate_task(config: Config) -> None:
    """Raise UserError naming the first key of the model or the data whose value is not allowed; no file is read."""
    _module(config).validate(config)


def _module(config: Config) -> ModuleType:
    check_choice("dataset.name", config.dataset.name, MODULES)
    return importlib.import_module(MODULES[config.dataset.name])
