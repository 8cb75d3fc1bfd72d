"""Walking through class folders: what is an image, what is left out and told, and links that lead in circles."""

import os

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.data import build_dataset
from luqrun.tasks.classification.folders import names_and_sizes, scan, told


def put(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), len(str(path))).save(path)


@pytest.fixture
def train(tmp_path):
    """Two classes of three images, some in folders below."""
    folder = tmp_path / "train"
    put(*(folder / name for name in ("a/0.png", "a/x/1.JPG", "a/x.y/2.png", "b/0.bmp", "b/1.png", "b/c/d/2.png")))
    return folder


def names(found) -> list[str]:
    return [os.path.relpath(path, found.folder) for path in found.paths]


def test_the_order_is_that_of_torchvision(train):
    found, theirs = scan(train), ImageFolder(train)
    assert found.classes == theirs.classes
    assert list(zip(found.paths, found.labels, strict=True)) == theirs.samples
    assert told(found.left_out) == ""


def test_hidden_folders_and_files_are_neither_classes_nor_images(train):
    before = names(scan(train))
    put(train / ".ipynb_checkpoints/0.png", train / "a/.cache/0.png", train / "b/x.png")
    (train / "b/x.png").rename(train / "b/._0.png")
    (train / ".DS_Store").write_text("")
    found = scan(train)
    assert (found.classes, names(found)) == (["a", "b"], before)
    assert told(found.left_out) == "4 hidden"


def test_files_that_are_left_out_are_counted_by_kind(train):
    for name in ("a/0.gif", "a/1.GIF", "b/2.gif", "b/notes.txt", "b/README", "stray.png", "b/x.heic", "b/y.avif"):
        (train / name).write_text("")
    assert told(scan(train).left_out).startswith("3 .gif, 1 ")
    assert sorted(scan(train).left_out.elements()) == [
        *(".avif", ".gif", ".gif", ".gif", ".heic", ".txt", "beside the class folders", "without a suffix")
    ]
    assert told(scan(train).left_out).endswith(" more")


@pytest.mark.parametrize("to", ["a", "a/x", "a/x/again"])
def test_links_in_a_circle_end_and_count_each_image_once(train, to):
    before = names(scan(train))
    (train / "a/x/again").symlink_to(train / to if to != "a/x/again" else "again")
    (train / "a/0again").symlink_to(train / "a")
    found = scan(train)
    assert names(found) == before
    assert sum(found.left_out.values()) == 2


@pytest.mark.parametrize("link", ["b/linked", "c", "a/up"])
def test_a_folder_of_two_classes_is_refused(train, link):
    (train / link).symlink_to(train if link == "a/up" else train / "a")
    with pytest.raises(UserError, match=r"dataset\.root: .* by a link.*two classes, a and [bc]"):
        scan(train)


def test_images_may_be_linked(train, tmp_path):
    put(tmp_path / "store/0.png", tmp_path / "store/1.png")
    (train / "c").symlink_to(tmp_path / "store")
    (train / "a/9.png").symlink_to(tmp_path / "store/0.png")
    found = scan(train)
    assert found.classes == ["a", "b", "c"]
    assert {"c/0.png", "c/1.png", "a/9.png"} <= set(names(found))


def test_a_folder_that_cannot_be_read_is_named(train, monkeypatch):
    def forbidden(path, walk=os.scandir):
        if str(path).endswith("x.y"):
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=r"a/x\.y cannot be read \(Permission denied\)"):
        scan(train)


def test_the_hash_follows_names_and_sizes_and_not_the_place(train, tmp_path):
    before = names_and_sizes(scan(train))
    train.rename(tmp_path / "moved")
    assert names_and_sizes(scan(tmp_path / "moved")) == before
    (tmp_path / "moved/b/1.png").rename(tmp_path / "moved/b/1_.png")
    renamed = names_and_sizes(scan(tmp_path / "moved"))
    Image.effect_noise((8, 9), 99).save(tmp_path / "moved/b/1_.png")
    changed = names_and_sizes(scan(tmp_path / "moved"))
    assert len({before, renamed, changed}) == 3
    for make in (os.mkfifo, lambda path: path.symlink_to("nowhere")):  # is not waited for; leads nowhere
        (tmp_path / "moved/b/1_.png").unlink()
        make(tmp_path / "moved/b/1_.png")
        assert names_and_sizes(scan(tmp_path / "moved")) not in (renamed, changed)


def test_what_was_found_is_told(train, tmp_path):
    for name in ("a/0.png", "b/0.png", "b/1.png"):
        put(tmp_path / "val" / name)
    (tmp_path / "val/a/0.gif").write_text("")
    config = DatasetConfig(name="folder", root=str(tmp_path), image_size=8, batch_size=2)
    assert build_dataset(config).describe() == "6 training and 3 validation images of 2 classes; left out: 1 .gif"
    config.limit = 4
    assert build_dataset(config).describe().startswith("4 of 6 training and 3 validation images")
    for path in (tmp_path / "train/a").rglob("*.*"):
        if path.is_file():
            path.rename(path.with_suffix(".gif"))
    with pytest.raises(UserError, match=r"no images in .*train/a \(left out of .*: 3 \.gif\)"):
        build_dataset(config)
