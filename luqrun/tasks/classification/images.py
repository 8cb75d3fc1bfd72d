"""Real images: CIFAR as its authors pack it, ImageNet and anyone's class folders as image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.folders import Split, describe_left_out, names_and_sizes, scan
from luqrun.tasks.classification.image_data import ImageData
from luqrun.tasks.classification.pixels import Images, KeptImages, MemoryImages, TransformedImages
from luqrun.tasks.fingerprint import hash_of, sizes, whole_root
from luqrun.tasks.subset import subset

# Mean and standard deviation of the training pixels. Class folders get ImageNet's, whatever is in them.
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SMALL = 64  # up to this image_size: shifts and mirror images; above: random resized crops
KEEP_BYTES = 1 << 30  # decoded small images of one split are kept in memory if they take no more

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
LAYOUTS = {
    "cifar10": "ROOT/cifar-10-batches-py with data_batch_1 to data_batch_5, test_batch and batches.meta",
    "cifar100": "ROOT/cifar-100-python with train, test and meta",
    "imagenet": "ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG",
    "folder": "ROOT/train/CLASS/* and ROOT/val/CLASS/* (or test), images as " + " ".join(IMG_EXTENSIONS),
}


def build_images(config: DatasetConfig) -> ImageData:
    """cifar10, cifar100, imagenet or folder: RGB images (3, image_size, image_size), whatever the files hold.

    Augmentation (`dataset.augment`): up to image_size 64, zero padding by an eighth, random crop and mirror image;
    above, RandomResizedCrop and mirror image. Evaluation: up to 64 the images are only brought to size; above, the
    shorter side becomes image_size * 256 / 224 and the centre is cut out.

    Raises UserError naming dataset.root, what is wrong there and the layout that is expected.
    """
    root = _root(config)
    if config.name.startswith("cifar"):
        return _cifar(config, root)
    return _folders(config, root)


def _root(config: DatasetConfig) -> Path:
    if config.root is None:
        raise UserError(f"dataset.root is not given; dataset={config.name} expects {LAYOUTS[config.name]}")
    root = Path(os.path.expanduser(config.root))
    if not os.path.isdir(root):
        raise _wrong(config, "there is no such folder")
    if not any(root.iterdir()):
        raise _wrong(config, "the folder is empty")
    return root


def _wrong(config: DatasetConfig, problem: str) -> UserError:
    return UserError(f"dataset.root={config.root}: {problem}; expected {LAYOUTS[config.name]}")


def fingerprint_images(config: DatasetConfig) -> dict:
    """The fingerprint (luqrun.tasks.fingerprint_data) of what build_images would read, with the same errors."""
    root = _root(config)
    if config.name.startswith("cifar"):
        return _cifar_fingerprint(config, root)
    return _folders_fingerprint(config, *_splits(config, root))


def _cifar_fingerprint(config: DatasetConfig, root: Path) -> dict:
    kind = CIFAR[config.name]
    files = [name for name, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    paths = [str(root / kind.base_folder / name) for name in files]
    if not all(map(os.path.isfile, paths)):
        raise _not_cifar(config)
    return {"root": whole_root(config), "names_and_sizes": hash_of([*map(str.encode, files), sizes(paths)])}


def _not_cifar(config: DatasetConfig) -> UserError:
    return _wrong(config, f"the files of {CIFAR[config.name].__name__} are not there, or damaged")


def _cifar(config: DatasetConfig, root: Path) -> ImageData:
    kind = CIFAR[config.name]
    try:
        train, val = kind(root, train=True, download=False), kind(root, train=False, download=False)
    except RuntimeError:  # what torchvision raises for a missing file and for a wrong checksum
        raise _not_cifar(config) from None
    chosen = subset(len(train), config.limit, "images")
    return ImageData(
        train=_arrays(train.data[chosen], np.array(train.targets)[chosen], config, config.augment),
        val=_arrays(val.data, np.array(val.targets), config, False),
        classes=tuple(train.classes),
        channels=3,
        image_size=config.image_size,
        fingerprint=_cifar_fingerprint(config, root),
        of=len(train),
    )


def _arrays(pixels: np.ndarray, labels: np.ndarray, config: DatasetConfig, augment: bool) -> Images:
    if pixels.shape[1:3] == (config.image_size, config.image_size):
        return MemoryImages(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels, *CIFAR_STATISTICS, augment)
    return _served(partial(_from_array, pixels), labels, config.image_size, CIFAR_STATISTICS, augment)


def _splits(config: DatasetConfig, root: Path) -> tuple[Split, Split]:
    """(training, validation): of the same classes, which all have images."""
    evaluation = "test" if config.name == "folder" and not (root / "val").is_dir() else "val"
    train, val = _scan(config, root / "train"), _scan(config, root / evaluation)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise _wrong(config, f"train and {evaluation} must hold the same classes, {_some(differing)} is in only one")
    return train, val


def _folders_fingerprint(config: DatasetConfig, train: Split, val: Split) -> dict:
    return {
        "root": whole_root(config),
        "classes": len(train.classes),
        "training_images": len(train.paths),
        "validation_images": len(val.paths),
        "names_and_sizes": names_and_sizes(train, val),
    }


def _folders(config: DatasetConfig, root: Path) -> ImageData:
    train, val = _splits(config, root)
    chosen = subset(len(train.paths), config.limit, "images")
    return ImageData(
        train=_files(train, chosen, config.image_size, config.augment),
        val=_files(val, range(len(val.paths)), config.image_size, False),
        classes=tuple(train.classes),
        channels=3,
        image_size=config.image_size,
        fingerprint=_folders_fingerprint(config, train, val),
        of=len(train.paths),
        left_out=describe_left_out(train.left_out + val.left_out),
    )


def _scan(config: DatasetConfig, folder: Path) -> Split:
    if not folder.is_dir():
        raise _wrong(config, f"there is no folder {folder}")
    found = scan(folder)
    if not found.classes:
        raise _wrong(config, f"there are no class folders in {folder}")
    filled = set(found.labels)
    empty = [str(folder / name) for label, name in enumerate(found.classes) if label not in filled]
    if empty:
        there = f" (left out of {folder}: {describe_left_out(found.left_out)})" if found.left_out else ""
        raise _wrong(config, f"there are no images in {_some(empty)}{there}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(split: Split, chosen: Iterable[int], size: int, augment: bool) -> Images:
    # One array, not a million strings: reading those would copy their pages into every worker.
    paths = np.array([os.fsencode(split.paths[index]) for index in chosen])
    labels = np.array([split.labels[index] for index in chosen])
    return _served(partial(_from_file, paths), labels, size, IMAGENET_STATISTICS, augment)


def _served(read: Callable[[int], Image.Image], labels, size: int, statistics, augment: bool) -> Images:
    if size <= SMALL:
        fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
        return KeptImages(partial(_small, read, fit, size), (3, size, size), labels, *statistics, augment, KEEP_BYTES)
    if augment:
        cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        cut = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    return TransformedImages(read, transforms.Compose(cut), labels, *statistics, augment)


def _small(read: Callable[[int], Image.Image], fit: Callable, size: int, index: int) -> np.ndarray:
    image = read(index)
    if image.size != (size, size):
        image = fit(image)
    return np.asarray(image).transpose(2, 0, 1)


def _from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _from_file(paths: np.ndarray, index: int) -> Image.Image:
    path = os.fsdecode(paths[index])
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            return _rgb(image)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        problem = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(f"dataset.root: cannot read the image {path} ({problem})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    # Pillow would clip 16-bit grey to 255, where its 16-bit colour is scaled: scale both.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
