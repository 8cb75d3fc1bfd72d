"""The generated glyphs: the same bytes everywhere, and a cache that cannot spoil them."""

import hashlib
import logging

import numpy as np
import pytest

import luqrun.tasks.classification.glyphs as module
from luqrun.config import DatasetConfig, GlyphsConfig
from luqrun.tasks.classification.data import build_dataset

CONFIG = DatasetConfig(
    name="glyphs", image_size=20, batch_size=4, augment=False, glyphs=GlyphsConfig(train_images=700, val_images=100)
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "luqrun"


def test_shape_classes_and_normalisation(cache):
    data = build_dataset(CONFIG)
    assert (len(data.classes), data.channels, data.image_size) == (47, 1, 20)
    assert len(set(data.classes)) == 47
    assert set(data.train.labels.tolist()) == set(range(47))
    images, labels = data.train.batch(np.arange(700), np.zeros(700, np.uint64))
    assert images.shape == (700, 1, 20, 20)
    assert labels[:3].tolist() == [0, 1, 2]
    assert abs(images.mean().item()) < 0.1
    assert abs(images.std().item() - 1) < 0.1


def test_splits_differ_and_no_image_comes_twice():
    train, _ = module.draw(94, 12, 0.1, 0)
    val, _ = module.draw(94, 12, 0.1, 1)
    assert len({image.tobytes() for image in np.concatenate([train, val])}) == 188


def test_noise_has_the_asked_standard_deviation():
    noisy, _ = module.draw(300, 20, 0.05, 0)
    clean, _ = module.draw(300, 20, 0.0, 0)
    middle = (noisy > 60) & (noisy < 195)  # where neither black nor white cuts the noise off
    difference = (noisy.astype(float) - clean)[middle] / 255
    # 3e4 pixels and more: the estimate's own deviation is below half a per cent.
    assert difference.std() == pytest.approx(0.05, rel=0.04)


def test_the_glyph_in_the_middle_is_the_labelled_one():
    """Averaged images of a class look like its template: most of the 47 find their own, by chance one would."""
    images, labels = module.draw(47 * 40, 20, 0.12, 0)
    means = np.stack([images[labels == label, 0].mean(0) for label in range(47)])
    means = (means - means.mean(0)).reshape(47, -1)
    templates = module._templates(40).reshape(47, 20, 2, 20, 2).mean((2, 4))
    templates = (templates - templates.mean(0)).reshape(47, -1)
    scores = (means @ templates.T) / np.linalg.norm(templates, axis=1)
    assert (scores.argmax(1) == np.arange(47)).sum() > 47 // 2


def test_cache_hit_equals_fresh_drawing(cache, monkeypatch):
    fresh = build_dataset(CONFIG)
    assert len(list(cache.iterdir())) == 1  # no temporary file stays
    monkeypatch.setattr(module, "draw", None)
    hit = build_dataset(CONFIG)
    for split in ("train", "val"):
        np.testing.assert_array_equal(getattr(hit, split).images, getattr(fresh, split).images)
        np.testing.assert_array_equal(getattr(hit, split).labels, getattr(fresh, split).labels)


def test_other_parameters_have_another_file(cache):
    build_dataset(CONFIG)
    for change in ({"noise": 0.2}, {"train_images": 600}, {"val_images": 90}):
        sizes = {"train_images": 700, "val_images": 100} | change
        build_dataset(DatasetConfig(name="glyphs", image_size=20, batch_size=4, glyphs=GlyphsConfig(**sizes)))
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_cache_is_drawn_again(cache, damage, caplog):
    fresh = build_dataset(CONFIG)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.write_bytes({"truncated": content[:middle], "flipped": flipped, "empty": b"", "text": b"none"}[damage])
    again = build_dataset(CONFIG)
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(again.train.images, fresh.train.images)
    assert hashlib.sha256(file.read_bytes()[:middle]).digest() == hashlib.sha256(content[:middle]).digest()


def test_an_unwritable_cache_costs_one_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(build_dataset(CONFIG).train) == 700
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
