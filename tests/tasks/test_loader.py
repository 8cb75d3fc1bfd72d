"""Order and augmentation: pure functions of (seed, epoch, index), whoever serves them."""

import multiprocessing
import os
import shutil
import signal
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.runtime.seeds import mix
from luqrun.tasks import loader
from luqrun.tasks.classification.data import build_dataset
from luqrun.tasks.classification.image_data import ImageData
from luqrun.tasks.classification.pixels import MemoryImages
from luqrun.tasks.examples import Collated
from luqrun.tasks.loader import batches_per_epoch, eval_loader, explain_dead_worker, in_order, train_loader

COUNT = 21


class Noisy(TensorDataset):
    """Anyone's data set, whose augmentation draws from torch's generator."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for split in ("train", "val"):
        for number in range(COUNT):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def settings(**changes) -> DatasetConfig:
    return DatasetConfig(**({"name": "folder", "image_size": 16, "batch_size": 4} | changes))


def build(kind, root) -> ImageData:
    """memory: no file; small and large: files; own: a plain torch data set."""
    if kind in ("small", "large"):
        return build_dataset(settings(root=str(root), image_size={"small": 16, "large": 72}[kind]))
    images = np.random.default_rng(4).integers(0, 256, (COUNT, 3, 16, 16), dtype=np.uint8)
    labels = torch.arange(COUNT)
    if kind == "own":
        own = Collated(Noisy(torch.from_numpy(images) / 255, labels))
        return ImageData(own, own, ("a",), 3, 16)
    mean, std = (0.5,) * 3, (0.25,) * 3
    train, val = MemoryImages(images, labels, mean, std, augment=True), MemoryImages(images, labels, mean, std)
    return ImageData(train, val, ("a",), 3, 16)


def served(loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = list(loader)
    assert len(batches) == len(loader)
    for images, labels in batches:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert len(images) == len(labels)
        assert images.is_contiguous()
    return batches


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("kind", ["memory", "small", "large", "own"])
def test_workers_and_entry_point_change_nothing(kind, root):
    data = build(kind, root)
    whole = served(train_loader(data, settings(), seed=7, epoch=2))
    assert len(whole) == batches_per_epoch(data, settings()) == COUNT // 4
    assert same(whole, served(train_loader(data, settings(workers=2), seed=7, epoch=2)))
    assert same(whole[3:], served(train_loader(data, settings(), seed=7, epoch=2, first_batch=3)))
    assert served(train_loader(data, settings(), seed=7, epoch=2, first_batch=5)) == []


@pytest.mark.parametrize("kind", ["memory", "small", "large", "own"])
def test_ranks_part_each_batch(kind, root):
    data = build(kind, root)
    whole = served(train_loader(data, settings(), seed=7, epoch=2))
    ranks = [served(train_loader(data, settings(), seed=7, epoch=2, rank=rank, world_size=2)) for rank in (0, 1)]
    for (images, labels), *parts in zip(whole, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part[0], images[rank::2])
            assert torch.equal(part[1], labels[rank::2])


@pytest.mark.parametrize("kind", ["memory", "small", "large", "own"])
def test_epoch_and_seed_change_order_and_augmentation(kind, root):
    data = build(kind, root)

    def by_index(seed, epoch):
        # With batches of one image the labels of "memory" and "own" tell the order.
        return served(train_loader(data, settings(batch_size=1), seed=seed, epoch=epoch))

    base = by_index(7, 2)
    for other in (by_index(7, 3), by_index(8, 2)):
        assert not same(base, other)
        if kind in ("memory", "own"):
            assert sorted(int(label) for _, label in other) == list(range(COUNT))
            assert [int(label) for _, label in base] != [int(label) for _, label in other]
            first = {int(label): image for image, label in base}
            assert sum(not torch.equal(first[int(label)], image) for image, label in other) > COUNT // 2


@pytest.mark.parametrize("kind", ["memory", "small", "large", "own"])
@pytest.mark.parametrize("workers", [0, 1])
def test_torch_generator_stays_as_it_was(kind, workers, root):
    data = build(kind, root)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(train_loader(data, settings(workers=workers), seed=7, epoch=0))
    list(eval_loader(data.val, settings(workers=workers)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_serves_each_image_once(world_size, root):
    data = build("memory", root)
    parts = [served(eval_loader(data.val, settings(), rank, world_size)) for rank in range(world_size)]
    labels = [label for part in parts for _, batch in part for label in batch.tolist()]
    assert sorted(labels) == list(range(COUNT))
    whole = served(eval_loader(data.val, settings()))
    for rank, part in enumerate(parts):  # the same batches, whatever the number of ranks
        assert same(part, whole[rank::world_size])
    assert in_order([[batch.tolist() for _, batch in part] for part in parts]) == [b.tolist() for _, b in whole]
    if world_size == 1:
        assert labels == list(range(COUNT))
        assert same(parts[0], served(eval_loader(data.val, settings(workers=2))))


def test_a_worker_that_is_killed_is_one_line_with_advice(root):
    config, others = settings(workers=2, batch_size=1), set(multiprocessing.active_children())
    with closing(iter(train_loader(build("large", root), config, 0, 0))) as batches:
        next(batches)
        workers = list(set(multiprocessing.active_children()) - others)

        def kill_and_go_on():  # the error may come from the moment of the kill on
            workers[0].kill()
            list(batches)

        with pytest.raises(RuntimeError) as caught:
            kill_and_go_on()
    advice = explain_dead_worker(caught.value, config)
    assert all(word in advice for word in ("worker", "memory", "dataset.workers=2", "batch_size=1", "checkpoint"))
    assert "\n" not in advice
    assert explain_dead_worker(caught.value, settings()) == ""
    assert [worker.is_alive() for worker in workers] == [False, False]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ... shared memory.",
            "/dev/shm",
        ),
        ("unable to write to file </torch_7_8_9>: No space left on device (28)", "/dev/shm"),
        ("unable to mmap 1024 bytes from file </torch_7_8_9>: Cannot allocate memory (12)", "/dev/shm"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "was killed by signal: Killed, as"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "worker exited unexpectedly"),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
        ("out of resource: shared memory", ""),
    ],
)
def test_what_workers_lack_is_told(text, word):
    advice = explain_dead_worker(RuntimeError(text), settings(workers=3))
    assert word in advice
    assert bool(advice) == bool(word)
    assert "dataset.workers=3" in advice or not word
    assert "smaller dataset.batch_size=" in advice or not word
    advice = explain_dead_worker(RuntimeError(text), settings(workers=3, batch_tokens=900))
    assert "smaller dataset.batch_tokens=900" in advice or not word


def test_a_worker_that_is_blocked_in_a_read_ends_with_its_loader(root, tmp_path):
    shutil.copytree(root, tmp_path / "images")
    (tmp_path / "images/train/class0/0.png").unlink()
    os.mkfifo(tmp_path / "images/train/class0/0.png")
    config = settings(root=str(tmp_path / "images"), image_size=72, workers=2, batch_size=1)
    with closing(iter(train_loader(build_dataset(config), config, 0, 0))) as batches:
        next(batches), next(batches)  # one of each worker: both have started
        workers = multiprocessing.active_children()
        os.kill(workers[0].pid, signal.SIGTERM)  # from a terminal or a cluster: not heeded
        next(batches)
    assert [worker.is_alive() for worker in workers] == [False, False]


def test_workers_end_in_whatever_line_torch_tells_that_one_was_killed(root):
    """Torch tells it by an error out of a signal's handler: once, while the loader ends its workers too."""
    config, data, line, raised = settings(workers=2, batch_size=1), build("large", root), 0, True
    while raised:
        others, raised, left, told = set(multiprocessing.active_children()), False, line, []
        batches = iter(train_loader(data, config, 0, 0))
        next(batches)
        workers = set(multiprocessing.active_children()) - others

        def tell(frame, event, value):
            nonlocal left, raised
            if frame.f_code.co_filename != loader.__file__:
                return None
            left -= event == "line"
            if left < 0 and not raised:
                raised = True
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            return tell

        sys.settrace(tell)
        try:
            batches.close()
        except RuntimeError as error:
            told.append(error)  # with all that it holds: else its end would end the workers
        finally:
            sys.settrace(None)
        assert [worker.is_alive() for worker in workers] == [False, False], f"line {line}"
        line += 1
    assert line > 5


def test_small_augmentation_is_pad_crop_and_mirror():
    """Every shift of the 5 x 5 and both mirrorings occur, each about equally often."""
    size, pad, count = 16, 2, 5000
    image = np.random.default_rng(0).integers(1, 256, (1, 3, size, size), dtype=np.uint8)
    dataset = MemoryImages(image, [0], (0.0,) * 3, (1.0,) * 3, augment=True)
    out = dataset.pixels(np.zeros(count, np.int64), mix(1, 2, 3, np.arange(count)))
    padded = np.pad(image[0], ((0, 0), (pad, pad), (pad, pad)))
    known = {}
    for row in range(5):
        for column in range(5):
            crop = padded[:, row : row + size, column : column + size]
            known[crop.tobytes()], known[crop[:, :, ::-1].tobytes()] = (row, column, 0), (row, column, 1)
    counts = np.zeros((5, 5, 2))
    for pixels in out:
        counts[known[pixels.tobytes()]] += 1  # a KeyError: not a crop of the padded image
    # 50 cells, 100 expected in each: chi-square with 49 degrees of freedom exceeds 98.2 once in 20,000 seeds.
    assert ((counts - 100) ** 2 / 100).sum() < 98.2


def test_order_is_not_the_files_order(root):
    data = build("memory", root)
    labels = [int(label) for _, batch in train_loader(data, settings(), seed=0, epoch=0) for label in batch]
    assert labels != sorted(labels)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"batch_size": 0}, 1, "dataset.batch_size=0"),
        ({"batch_size": 22}, 1, "dataset.batch_size=22 is more than the 21"),
        ({"batch_size": 5}, 2, "dataset.batch_size=5 must be a multiple of the 2"),
        ({"workers": -1}, 1, "dataset.workers=-1"),
    ],
)
def test_wrong_settings(changes, ranks, message, root):
    with pytest.raises(UserError, match=message):
        train_loader(build("memory", root), settings(**changes), 0, 0, world_size=ranks)


def test_wrong_settings_of_evaluation(root):
    with pytest.raises(UserError, match=r"dataset\.batch_size=5 must be a multiple"):
        eval_loader(build("memory", root), settings(batch_size=5), world_size=2)
