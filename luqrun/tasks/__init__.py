"""Tasks: what a network learns, with its data, networks, loss and metrics. The data set decides the task."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from luqrun.config import Config
from luqrun.errors import check_choice
from luqrun.tasks.classification.data import NAMES as IMAGE_SETS
from luqrun.tasks.question_answering import NAMES as QUESTION_SETS
from luqrun.tasks.translation import NAMES as TRANSLATION_SETS

if TYPE_CHECKING:
    from torch import nn

    from luqrun.tasks.outline import Outline
    from luqrun.tasks.task import Task

# dataset.name: the module of its task, loaded on first use. It has `build(config) -> Task`, `outline(config)
# -> Outline`, `bare_network(config, sizes)`, `validate(config)` and `fingerprint(config)`.
MODULES = {
    **dict.fromkeys(IMAGE_SETS, "luqrun.tasks.classification.task"),
    **dict.fromkeys(TRANSLATION_SETS, "luqrun.tasks.translation.task"),
    **dict.fromkeys(QUESTION_SETS, "luqrun.tasks.question_answering.task"),
}


# What runs of any task are judged by, best first: TensorBoard compares runs of several by what one of them declares.
METRICS = ("val/top1", "val/top5", "val/bleu", "test/bleu", "val/f1", "val/em", "val/loss", "test/loss")


def build_task(config: Config) -> Task:
    """The task of a run, with its data. Raises UserError naming the key, or the file, that is wrong."""
    return _module(config).build(config)


def outline_task(config: Config) -> Outline:
    """The network of a run and a training batch by their shapes; no data are read. Raises UserError naming the key
    whose shapes only data tell."""
    return _module(config).outline(config)


def bare_network(config: Config, sizes: Mapping[str, object]) -> tuple[nn.Module, object | None]:
    """The network of a run with drawn weights, and the input that shows its ends (Task.example), without its data.

    sizes: what a checkpoint of the run has of them (Data.sizes), among other keys.
    """
    return _module(config).bare_network(config, sizes)


def validate_task(config: Config) -> None:
    """Raise UserError naming the first key of the model or the data whose value is not allowed; no file is read."""
    _module(config).validate(config)


def fingerprint_data(config: Config) -> dict[str, object]:
    """The fingerprint of what a run reads, by which a run on other data is told from it without reading them; {} where
    it reads nothing, or what follows from its settings.

    A dict of plain JSON: `root` says where the data lie, all else what they are (integers count; a hash of names and
    sizes). The run's folder is named for it (luqrun.runs.identity), so that it must be had quickly. Found once in a
    process: the trainer notices what has changed since. Raises UserError naming dataset.root, or what is wrong there.
    """
    if config.job in ("rounding", "cost"):
        return {}
    key = json.dumps([dataclasses.asdict(config.dataset), config.model.weights, os.getcwd()])
    if key not in _fingerprints:
        _fingerprints[key] = _module(config).fingerprint(config)
    return _fingerprints[key]


_fingerprints: dict[str, dict] = {}


def _module(config: Config) -> ModuleType:
    check_choice("dataset.name", config.dataset.name, MODULES)
    return importlib.import_module(MODULES[config.dataset.name])
