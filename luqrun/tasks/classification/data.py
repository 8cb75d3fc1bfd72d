"""Image data sets by name.

    data = build_dataset(config)
    for images, labels in train_loader(data, config, seed=0, epoch=0): ...      # luqrun.tasks.loader

Nothing heavy is imported before a data set is built.
"""

from __future__ import annotations

from luqrun.config import DatasetConfig, GlyphsConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.tasks.classification.image_data import ImageData
from luqrun.tasks.settings import check_common, check_read

NAMES = ("glyphs", "cifar10", "cifar100", "imagenet", "folder")
MAX_IMAGE_SIZE = 4096
# Of the data sets that are always the same: classes and channels.
SHAPES = {"glyphs": (47, 1), "cifar10": (10, 3), "cifar100": (100, 3), "imagenet": (1000, 3)}


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
    check_common(config)
    if config.name == "glyphs":
        glyphs = config.glyphs or GlyphsConfig()
        check_at_least("dataset.glyphs.train_images", glyphs.train_images, 1)
        check_at_least("dataset.glyphs.val_images", glyphs.val_images, 1)
        if not 0 <= glyphs.noise < float("inf"):
            raise UserError(f"dataset.glyphs.noise={glyphs.noise} must be a finite number of at least 0")
    check_read(config, ("image_size", "augment", "glyphs" if config.name == "glyphs" else "root"))


def shape_without_data(config: DatasetConfig) -> tuple[int, int]:
    """(classes, channels) of a data set that is not read. Raises UserError for one whose classes its files tell."""
    if config.name not in SHAPES:
        what = f"dataset={config.name} says only with its files how many classes there are, and job=cost reads none"
        raise UserError(f"{what}; allowed: {', '.join(SHAPES)}")
    return SHAPES[config.name]


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
