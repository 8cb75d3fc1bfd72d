"""Checks of the settings under `dataset` that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence

from luqrun.config import COMPANIONS, Config, DatasetConfig, ModelConfig
from luqrun.errors import UserError, check_at_least, check_at_most

MAX_WORKERS = 256  # each is a process
# Keys of some data sets alone. Where they are read they must be given, but for `root`, whose absence says more.
OWN = ("root", "glyphs", "source", "target", "vocabulary", "max_length", "stride", "batch_tokens", "examples")
NOT_NEEDED = ("root", "glyphs", "vocabulary")
OF_IMAGES = {"image_size": DatasetConfig.image_size, "augment": DatasetConfig.augment}  # and what they are by default


def check_common(config: DatasetConfig) -> None:
    """Raise UserError where a value that every data set reads is not allowed."""
    check_at_least("dataset.batch_size", config.batch_size, 1)
    check_at_least("dataset.workers", config.workers, 0)
    check_at_most("dataset.workers", config.workers, MAX_WORKERS)
    if config.limit is not None:
        check_at_least("dataset.limit", config.limit, 1)


def check_read(config: DatasetConfig, read: Sequence[str]) -> None:
    """Raise UserError for a key of OWN that is given and not among `read`, or is among them and not given."""
    for key in (*OWN, *OF_IMAGES):
        given = getattr(config, key) != OF_IMAGES.get(key)
        if given and key not in read:
            shown = key if key == "glyphs" else f"{key}={getattr(config, key)}"
            raise UserError(f"dataset.{shown} is not read by dataset={config.name}; it reads {', '.join(read)}")
        if not given and key in read and key not in (*NOT_NEEDED, *OF_IMAGES):
            raise UserError(f"dataset.{key} is not given, and dataset={config.name} needs it")


def check_text_model(config: ModelConfig) -> None:
    """Raise UserError where a network for text is given what it does not read, or a share that is none."""
    if config.stem != "auto":
        raise UserError(f"model.stem={config.stem} is of networks for images; {config.name} has none")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout} must be at least 0 and less than 1")


def check_text_optimizer(config: Config) -> None:
    """Raise UserError for the optimizer of images, with which Transformers learn nothing here."""
    if config.schedule.optimizer == "sgd":
        name = config.dataset.name
        usual = f"dataset={name} goes with schedule={COMPANIONS[name]['schedule']}"
        raise UserError(f"schedule.optimizer=sgd is for images; {usual}")
