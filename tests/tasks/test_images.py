"""CIFAR in its own files, class folders with every kind of image file, and what is said when they are wrong."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.data import build_dataset
from luqrun.tasks.classification.images import CIFAR_STATISTICS, IMAGENET_STATISTICS
from luqrun.tasks.loader import eval_loader, train_loader

RNG = np.random.default_rng(5)
NO_KEYS = np.zeros(1, np.uint64)


def config(root, name="folder", **changes) -> DatasetConfig:
    values = {"root": None if root is None else str(root), "image_size": 32, "batch_size": 2, "augment": False}
    return DatasetConfig(name=name, **(values | changes))


def pixels(served: torch.Tensor, statistics) -> np.ndarray:
    """Undo the normalisation: uint8 (H, W, 3)."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in statistics)
    return ((served * std + mean) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


def save(file, size=(32, 32), mode="RGB", **options):
    """An image file with a smooth gradient (JPEG hardly changes it); returns the PIL image."""
    ramp = np.linspace(20, 220, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2)).convert(mode)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return image


@pytest.fixture
def folders(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(3):
                save(tmp_path / split / label / f"{number}.jpg", size=(32 + number, 40))
    return tmp_path


# CIFAR


def write_cifar(root, monkeypatch, kind):
    """The real layout with ten images a file; torchvision's checksums are set to these files' own."""
    fine = kind is CIFAR100
    label_key, names_key = ("fine_labels", "fine_label_names") if fine else ("labels", "label_names")
    folder = root / kind.base_folder
    folder.mkdir()
    written = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for attribute in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, attribute):
            data = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
            labels = RNG.integers(0, 10, 10).tolist()
            written[name] = data, labels
            sums.append(write(name, {"data": data, label_key: labels}))
        monkeypatch.setattr(kind, attribute, sums)
    _, meta_sum = write(kind.meta["filename"], {names_key: [f"class {i}" for i in range(100 if fine else 10)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta_sum})
    return written


@pytest.mark.parametrize(("name", "kind", "count"), [("cifar10", CIFAR10, 50), ("cifar100", CIFAR100, 10)])
def test_cifar_pixels_and_labels(tmp_path, monkeypatch, name, kind, count):
    written = write_cifar(tmp_path, monkeypatch, kind)
    data = build_dataset(config(tmp_path, name))
    assert (len(data.train), len(data.val), data.channels) == (count, 10, 3)
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    stored, labels = written[kind.train_list[0][0]]
    image, label = data.train[7]
    assert label == labels[7]
    np.testing.assert_array_equal(pixels(image, CIFAR_STATISTICS), stored[7].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("size", [16, 64, 72])
def test_cifar_in_other_sizes(tmp_path, monkeypatch, size):
    write_cifar(tmp_path, monkeypatch, CIFAR10)
    data = build_dataset(config(tmp_path, "cifar10", image_size=size, limit=20, augment=True))
    assert len(data.train) == 20
    assert data.train[0][0].shape == data.val[0][0].shape == (3, size, size)


def test_cifar_missing_or_damaged(tmp_path, monkeypatch):
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match=r"dataset\.root=.*CIFAR10.*cifar-10-batches-py.*data_batch_1"):
        build_dataset(config(tmp_path, "cifar10"))
    write_cifar(tmp_path, monkeypatch, CIFAR10)
    with open(tmp_path / CIFAR10.base_folder / "data_batch_3", "ab") as file:
        file.write(b"!")
    with pytest.raises(UserError, match="damaged"):
        build_dataset(config(tmp_path, "cifar10"))


# Class folders


def test_folder_pixels_labels_classes(tmp_path):
    for split in ("train", "val"):
        cat, dog = save(tmp_path / split / "cat/a.png"), save(tmp_path / split / "dog/a.png", size=(64, 64))
    data = build_dataset(config(tmp_path))
    assert data.classes == ("cat", "dog")
    assert [data.train[index][1] for index in (0, 1)] == [0, 1]
    for _ in range(2):  # the second time from memory
        np.testing.assert_array_equal(pixels(data.train[0][0], IMAGENET_STATISTICS), np.asarray(cat))
    shrunk = np.asarray(dog.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels(data.val[1][0], IMAGENET_STATISTICS), shrunk)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
@pytest.mark.parametrize("size", [32, 80])
def test_every_mode_becomes_rgb(folders, mode, size):
    suffix = "jpg" if mode == "CMYK" else "png"
    (folders / "val/cat/0.jpg").unlink()
    image = save(folders / f"val/cat/0.{suffix}", size=(96, 96), mode=mode)
    data = build_dataset(config(folders, image_size=size))
    served = pixels(data.val[0][0], IMAGENET_STATISTICS)
    assert served.shape == (size, size, 3)
    centre = np.asarray(image.convert("RGB"), float)[32:64, 32:64].mean()
    cut = size // 3
    assert served[cut : 2 * cut, cut : 2 * cut].mean() == pytest.approx(centre, abs=6)


def test_16_bit_grey_is_scaled_not_clipped(folders):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    (folders / "val/cat/0.jpg").unlink()
    Image.fromarray(ramp).save(folders / "val/cat/0.png")
    data = build_dataset(config(folders))
    served = pixels(data.val[0][0], IMAGENET_STATISTICS)
    np.testing.assert_array_equal(served, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))


def test_test_stands_in_for_val_only_in_folder(folders):
    (folders / "val").rename(folders / "test")
    assert len(build_dataset(config(folders)).val) == 6
    with pytest.raises(UserError, match=r"there is no folder .*val"):
        build_dataset(config(folders, "imagenet"))
    save(folders / "val/cat/0.png")
    save(folders / "val/dog/0.png")
    assert len(build_dataset(config(folders)).val) == 2


def test_large_evaluation_scales_the_shorter_side_and_cuts_the_centre(tmp_path):
    for split in ("train", "val"):
        image = save(tmp_path / split / "cat/a.png", size=(300, 200))
    data = build_dataset(config(tmp_path, image_size=112, batch_size=1))
    expected = image.resize((192, 128), Image.Resampling.BILINEAR).crop((40, 8, 152, 120))
    np.testing.assert_array_equal(pixels(data.val[0][0], IMAGENET_STATISTICS), np.asarray(expected))
    np.testing.assert_array_equal(data.train[0][0], data.val[0][0])  # dataset.augment=false


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet", "folder"])
def test_root_not_given_missing_or_empty(tmp_path, name):
    for root, problem in ((None, "not given"), (tmp_path / "none", "no such folder"), (tmp_path, "empty")):
        with pytest.raises(UserError, match=rf"dataset\.root.*{problem}.*expect.*ROOT/") as caught:
            build_dataset(config(root, name))
        assert "\n" not in str(caught.value)


def test_wrong_layouts(folders):
    def refused(problem):
        with pytest.raises(UserError, match=problem) as caught:
            build_dataset(config(folders))
        assert f"dataset.root={folders}" in str(caught.value)

    (folders / "val/bird").mkdir()
    refused("no images in .*val/bird")
    save(folders / "val/bird/0.png")
    refused("same classes, bird is in only one")
    (folders / "val").rename(folders / "aside")
    refused("no folder .*test")
    save(folders / "val/0.png")
    refused("no class folders in .*val")


def spoil(file):
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [32, 80])
def test_a_corrupt_image_is_named(folders, workers, size):
    spoil(folders / "val/dog/1.jpg")
    data = build_dataset(config(folders, image_size=size))
    with pytest.raises(UserError, match=r"cannot read the image .*val/dog/1\.jpg") as caught:
        list(eval_loader(data.val, config(folders, image_size=size, workers=workers)))
    assert "\n" not in str(caught.value)
    (folders / "val/dog/1.jpg").write_text("not an image")
    with pytest.raises(UserError, match=r"val/dog/1\.jpg"):
        list(eval_loader(data.val, config(folders, image_size=size, workers=workers)))


def test_small_images_are_read_once_by_workers_too(folders):
    settings = config(folders, workers=2)
    data = build_dataset(settings)
    first = [images for images, _ in train_loader(data, settings, seed=0, epoch=0)]
    for file in folders.glob("train/*/*.jpg"):
        file.unlink()
    again = [images for images, _ in train_loader(data, config(folders), seed=0, epoch=0)]
    assert torch.equal(torch.cat(first), torch.cat(again))


def test_too_many_small_images_are_not_kept(folders, monkeypatch):
    kept = build_dataset(config(folders))
    monkeypatch.setattr("luqrun.tasks.classification.images.KEEP_BYTES", 6 * 3 * 32 * 32 - 1)
    read = build_dataset(config(folders))
    assert kept.train.kept is not None
    assert read.train.kept is None
    for index in range(6):
        assert torch.equal(kept.train[index][0], read.train[index][0])


@pytest.mark.parametrize("size", [32, 80])
def test_a_pickled_copy_serves_the_same(folders, size):
    """What a loader worker gets where processes are spawned, not forked."""
    data = build_dataset(config(folders, image_size=size))
    data.train[4]  # one is kept already
    content = pickle.dumps(data)
    assert len(content) < 9000  # the kept pixels stay behind: 18 kB a split
    copy = pickle.loads(content)
    assert torch.equal(copy.train[4][0], data.train[4][0])
