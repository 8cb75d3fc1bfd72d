"""Image data sets by name.

    data = build_dataset(config)
    for images, labels in train_loader(data, config, seed=0, epoch=0): ...      # luqrun.tasks.loader

Nothing heavy is imported before a data set is built.
"""

from __future__ import annotations

from luqrun.config import DatasetConfig, GlyphsConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.tasks.classification.image_data import ImageData

NAMES = ("glyphs", "cifar10", "cifar100", "imagenet", "folder")
MAX_IMAGE_SIZE = 4096
MAX_WORKERS = 256  # each is a process
OF_TEXT = ("source", "target", "vocabulary", "max_length", "stride", "batch_tokens", "examples")


def fingerprint_dataset(config: DatasetConfig) -> dict:
    """The fingerprint of what build_dataset would read; {} for images that are drawn. Raises UserError as it does."""
    check_choice("dataset.name", config.name, NAMES)
    if config.name == "glyphs":
        return {}
    from luqrun.tasks.classification.images import fingerprint_images

    return fingerprint_images(config)


def validate_dataset(config: DatasetConfig) -> None:
    """Raise UserError naming the first key under `dataset` whose value is not allowed; no file is looked at."""
    check_choice("dataset.name", config.name, NAMES)
    check_at_least("dataset.image_size", config.image_size, 8)
    check_at_most("dataset.image_size", config.image_size, MAX_IMAGE_SIZE)
    check_at_least("dataset.batch_size", config.batch_size, 1)
    check_at_least("dataset.workers", config.workers, 0)
    check_at_most("dataset.workers", config.workers, MAX_WORKERS)
    if config.limit is not None:
        check_at_least("dataset.limit", config.limit, 1)
    if config.name == "glyphs":
        glyphs = config.glyphs or GlyphsConfig()
        check_at_least("dataset.glyphs.train_images", glyphs.train_images, 1)
        check_at_least("dataset.glyphs.val_images", glyphs.val_images, 1)
        if not 0 <= glyphs.noise < float("inf"):
            raise UserError(f"dataset.glyphs.noise={glyphs.noise} must be a finite number of at least 0")
    _refuse_unread(config)


def _refuse_unread(config: DatasetConfig) -> None:
    """Raise UserError for a setting that this data set does not read."""
    others = ", ".join(name for name in NAMES if name != "glyphs")
    if config.name == "glyphs" and config.root is not None:
        raise UserError(
            f"dataset.root={config.root} is not read by dataset=glyphs, whose images are drawn; allowed with {others}"
        )
    if config.name != "glyphs" and config.glyphs is not None:
        raise UserError(f"dataset.glyphs is read by dataset=glyphs alone, not by dataset={config.name}")
    for key in OF_TEXT:
        if getattr(config, key) is not None:
            raise UserError(f"dataset.{key}={getattr(config, key)} is read by data sets of text, not by {config.name}")


def build_dataset(config: DatasetConfig) -> ImageData:
    """The data set that `config` names: the same images, and the same subset of `dataset.limit`, in every run.

    Raises UserError naming the key, or the file, that is wrong.
    """
    validate_dataset(config)
    if config.name == "glyphs":
        from luqrun.tasks.classification.glyphs import build_glyphs as build
    else:
        from luqrun.tasks.classification.images import build_images as build
    data = build(config)
    from luqrun.tasks.loader import batches_per_epoch

    batches_per_epoch(data, config)  # a batch that is too large fails here, before a model is built
    return data
