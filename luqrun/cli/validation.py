"""From what Hydra composed to a checked Config: the mistakes that types cannot see, found before anything starts."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from luqrun.cli.messages import one_line, unknown_key
from luqrun.config import BATCH_NORMS, DEVICES, JOBS, PRECISIONS, RANGE_SCOPES, Config, CostConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.runs.folder import RunFolder
from luqrun.runs.parent import is_same, parent_checkpoint, parent_folder
from luqrun.runtime import process_group

RESUMES = "allowed: auto, never, base, the folder of a finished run, or the path of a checkpoint (.pt)"

MAX_INTEGER = 2**31 - 1
MAX_FLOAT = 1e30  # torch wants float32 of the products of two settings, too
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
MAX_PROFILED = 1000  # steps; a profile is kept in memory


def to_config(composed: DictConfig) -> Config:
    """The typed config of one run, not yet validated. Raises UserError for unknown or missing keys and wrong types."""
    names = [key for key in composed if key != "hydra"]
    values = composed
    try:
        if OmegaConf.get_type(composed) is not Config:  # of a main configuration without the schema in its defaults
            given = OmegaConf.to_container(OmegaConf.masked_copy(composed, names), resolve=True)
            values = OmegaConf.merge(OmegaConf.structured(Config), given)
            names = list(values)
        parts = {name: _plain(values[name]) for name in names}
    except MissingMandatoryValue:
        missing = OmegaConf.missing_keys(OmegaConf.masked_copy(values, names))
        raise UserError(f"not set: {', '.join(sorted(missing))}") from None
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    for key in _unknown_keys(parts, Config):
        raise UserError(unknown_key(key))
    return Config(**parts)


def _plain(part: object) -> object:
    return OmegaConf.to_object(part) if OmegaConf.is_config(part) else part


def _unknown_keys(values: dict, schema: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys that the schema does not have: OmegaConf lets ++ add them to a part of a fixed type."""
    for name, value in values.items():
        if name not in schema.__dataclass_fields__:
            yield prefix + name
        elif dataclasses.is_dataclass(value):
            yield from _unknown_keys(vars(value), type(value), f"{prefix}{name}.")


def validate(config: Config, folder: Callable[[], Path] | None = None) -> None:
    """Raise UserError naming the first key whose value is not allowed.

    folder: of the run, asked for where `resume` names what is not there: it is not needed any more where the folder
    holds a checkpoint or a result.
    """
    _check_values(config)
    if config.job == "plan":
        how = "a word of the command line alone, as in luqrun -m seed=0,1 job=plan"
        raise UserError(f"job=plan is {how}: not in a file, nor in a list of values")
    check_choice("job", config.job, JOBS)
    check_choice("device", config.device, DEVICES)
    check_choice("precision", config.precision, PRECISIONS)
    check_at_least("seed", config.seed, 0)
    check_at_most("seed", config.seed, 2**31 - 1)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", config.study) or {".", ".."} & set(config.study.split("/")):
        raise UserError(f"study={config.study} must be a folder name: letters, digits, '.', '_' and '-'")
    if not config.resume:
        raise UserError(f"resume= is empty; {RESUMES}")
    if config.job != "train" and config.resume not in ("auto", "never"):
        again = "the same command goes on, or shows its result again"
        raise UserError(f"resume={config.resume} is for job=train, which has epochs to go on with; without it {again}")
    if config.resume not in ("auto", "never", "base") and not (
        folder is not None and RunFolder(folder()).goes_on_by_itself()
    ):
        if parent := parent_folder(config.resume):
            if folder is None or not is_same(parent, folder()):
                parent_checkpoint(config)
        elif not os.path.isfile(os.path.expanduser(config.resume)):
            raise UserError(f"resume={config.resume}: no such file; {RESUMES}")
    if config.compile and os.environ.get("LUQRUN_KERNELS") == "mfbprop":
        raise UserError("compile=true does not go with LUQRUN_KERNELS=mfbprop: its GEMMs are no operators of torch")
    for key, value in vars(config.tracking).items():
        check_at_least(f"tracking.{key}", value, 0)
    check_at_most("tracking.profile_steps", config.tracking.profile_steps, MAX_PROFILED)
    _validate_cost(config.cost)
    # These pull in torch; `luqrun --help` does without.
    from luqrun.quant.recipe import Recipe
    from luqrun.runtime.devices import choose_device
    from luqrun.tasks import validate_task
    from luqrun.train.schedules import validate_finetune, validate_schedule

    device = choose_device(config.device)
    validate_task(config)
    _validate_weights(config)
    Recipe.from_config(config.quant)
    validate_schedule(config.schedule)
    validate_finetune(config.finetune)
    check_choice("distributed.batch_norm", config.distributed.batch_norm, BATCH_NORMS)
    check_choice("distributed.range", config.distributed.range, RANGE_SCOPES)
    if process_group.world_size() > 1:
        _validate_distributed(config, device.type)


def _validate_cost(cost: CostConfig) -> None:
    for key, value in vars(cost).items():
        if key.startswith("speed_") and value <= 0:
            raise UserError(f"cost.{key}={value} must be a speed above 0, such as {getattr(CostConfig, key):g}")
    if cost.length is not None:
        check_at_least("cost.length", cost.length, 1)


def _validate_weights(config: Config) -> None:
    """Raise UserError where what a run starts from, or evaluates, is not given, or is not read."""
    weights, new_head = config.model.weights, config.model.new_head
    if weights is not None and not weights:
        raise UserError("model.weights= is empty; allowed: null, or a file")
    alone = weights is not None and config.finetune.epochs > 0
    if config.job == "train" and config.schedule.epochs < (0 if alone else 1):
        more = "it must be at least 1, or 0 to fine-tune model.weights alone (with finetune.epochs above 0)"
        raise UserError(f"schedule.epochs={config.schedule.epochs} is too small; {more}")
    if config.schedule.epochs == 0 and config.resume == "base":
        raise UserError("resume=base does not go with schedule.epochs=0: the fine-tune starts from model.weights")
    if new_head and weights is None:
        raise UserError("model.new_head=true is for model.weights=FILE, which is not given: all weights are drawn")
    if config.job != "evaluate":
        return
    if weights is None:
        raise UserError("job=evaluate needs model.weights=FILE, such as RUN/checkpoints/last.pt: what is evaluated")
    if new_head:
        raise UserError("model.new_head=true does not go with job=evaluate: a head that is drawn knows nothing")


def _validate_distributed(config: Config, device_type: str) -> None:
    from luqrun.tasks.loader import check_ranks  # pulls in torch

    if config.job != "train":
        raise UserError(f"job={config.job} runs in one process, without torchrun")
    check_ranks(config.dataset, process_group.world_size())
    if config.distributed.batch_norm == "sync" and device_type == "cpu":
        raise UserError("distributed.batch_norm=sync needs GPUs, as torch's SyncBatchNorm does; allowed here: local")
    if config.compile and config.distributed.range == "global":
        raise UserError("distributed.range=global cannot be compiled; allowed with compile=true: rank")


def _check_values(part, prefix: str = "") -> None:
    """No number is NaN or beyond what every computation with it can take (for some there is a closer bound), and all
    text can be written to a file and read again."""
    for name, value in vars(part).items():
        key = prefix + name
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{key}.")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, list | dict):
                raise UserError(f"{key}={value} must be a list of single values")
            if isinstance(each, float) and not (math.isfinite(each) and abs(each) <= MAX_FLOAT):
                raise UserError(f"{key}={each} must be a finite number of at most {MAX_FLOAT:g}")
            if isinstance(each, int) and abs(each) > MAX_INTEGER:
                raise UserError(f"{key}={each} must be an integer of at most {MAX_INTEGER}")
            if isinstance(each, str) and any(unicodedata.category(character) in UNPRINTABLE for character in each):
                raise UserError(f"{key}={each!r} holds a line break, a control character or what is not Unicode")
