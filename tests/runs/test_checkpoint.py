"""Checkpoints: a round trip, and a refusal that names the file for everything that does not fit."""

import errno
import hashlib
import os
import random

import pytest
import torch
from fuzzing import TIMES
from running import assert_same_tensors, tiny
from torch import nn

from luqrun import RESULTS
from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.tasks import build_task


def data(**changes):
    """The fingerprint of a data set."""
    return {"root": "/a", "classes": 47, "training_images": 256, "names_and_sizes": "0a", **changes}


def content(config, epoch=1, batch=0):
    """(model, optimizer, progress) after a step."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    progress = {"epoch": epoch, "batch": batch, "step": 1, "sums": [0.5, 1.0, 2.0], "evaluations": [{"val/top1": 3.0}]}
    return model.state_dict(), optimizer.state_dict(), progress


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.pt"


def test_round_trip_loads_with_weights_only(path):
    config = tiny()
    model, optimizer, progress = content(config)
    checkpoint.save(path, config, data(), model, optimizer, progress)
    loaded = checkpoint.load(path, config, data())
    assert_same_tensors(loaded["model"], dict(model))
    assert loaded["optimizer"]["state"][0]["momentum_buffer"].equal(optimizer["state"][0]["momentum_buffer"])
    assert loaded["progress"] == progress
    assert torch.load(path, weights_only=True).keys() == loaded.keys()


def test_what_does_not_change_the_result_may_differ(path):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    checkpoint.load(path, tiny("study=other", "dataset.workers=2", "tracking.log_every=1", "resume=never"), data())


def seal(path):
    """Put the checksum that belongs to it after a file, so that only its content can give it away."""
    stored = path.read_bytes()
    path.write_bytes(stored + b"\nsha256 " + hashlib.sha256(stored).hexdigest().encode())


def damaged(path, kind):
    good = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "one byte short":
        path.write_bytes(good[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint\n")
    elif kind == "weights alone":
        torch.save(nn.Linear(3, 2).state_dict(), path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "module":
        torch.save(nn.Linear(3, 2), path)
    elif kind == "torchscript":
        torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)), path)
    elif kind == "legacy":
        torch.save({"epoch": 1}, path, _use_new_zipfile_serialization=False)
    elif kind == "later version":
        torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)


KINDS = (
    "truncated",
    "one byte short",
    "empty",
    "text",
    "weights alone",
    "tensor",
    "module",
    "torchscript",
    "legacy",
    "later version",
)


@pytest.mark.filterwarnings("ignore")  # torchscript is deprecated
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_foreign_file_is_refused_by_name(path, kind, sealed):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    damaged(path, kind)
    if sealed and kind != "one byte short":  # of the old checksum: nothing is missing under a new one
        seal(path)
    with pytest.raises(UserError) as refusal:
        checkpoint.load(path, tiny(), data())
    text = str(refusal.value)
    assert str(path) in text
    assert "resume=" in text
    assert "\n" not in text


class Code:
    """Pickled, it makes the folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cannot_run_code(path, tmp_path, sealed, legacy):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    bad = torch.load(path, weights_only=True) | {"progress": Code(tmp_path / "made")}
    torch.save(bad, path, _use_new_zipfile_serialization=not legacy)
    if sealed:
        seal(path)
    with pytest.raises(UserError, match=r"last\.pt"):
        checkpoint.load(path, tiny(), data())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("missing", ["nothing.pt", "."])
def test_a_missing_file_is_refused(tmp_path, missing):
    with pytest.raises(UserError, match=r"(no such file|cannot be read).*resume="):
        checkpoint.load(tmp_path / missing, tiny(), data())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 10}, "10 classes instead of 47"),
        ({"training_images": 255}, "255 training images instead of 256"),
        ({"names_and_sizes": "0b"}, "other names and sizes"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(path, change, words):
    checkpoint.save(path, tiny(), data(**change), *content(tiny()))
    with pytest.raises(UserError, match=rf"last\.pt is of a run of other data: {words}"):
        checkpoint.load(path, tiny(), data())
    checkpoint.load(path, tiny(), data(**change, root="/elsewhere"))


def test_a_checkpoint_of_other_processes_is_taken_only_by_hand(path, monkeypatch):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"last\.pt is of a run by 1 process, this one has 2"):
        checkpoint.load(path, tiny(), data())
    checkpoint.load(path, tiny(), data(), any_processes=True)


@pytest.mark.parametrize("theirs", [RESULTS - 1, RESULTS + 1])
def test_a_checkpoint_of_other_numbers_is_refused(path, theirs):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    stored = torch.load(path, weights_only=True)
    stored["identity"]["results"] = theirs
    torch.save(stored, path)
    seal(path)
    with pytest.raises(UserError, match=rf"last\.pt is of a run of RESULTS {theirs} .*here it is {RESULTS}"):
        checkpoint.load(path, tiny(), data())


@pytest.mark.parametrize("version", [2, 3])
def test_a_checkpoint_of_an_earlier_luqrun_is_named_as_such(path, version):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    stored = torch.load(path, weights_only=True) | {"version": version, "num_images": [256, 94]}
    torch.save(stored, path)
    seal(path)
    with pytest.raises(UserError, match=rf"last\.pt is of an earlier luqrun \(version {version} of") as refusal:
        checkpoint.load(path, tiny(), data())
    assert not isinstance(refusal.value, checkpoint.Damaged)  # it is kept, and none before it takes its place


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed=0, this one has seed=1"),
        ("quant.gradient.samples=2", "quant.gradient.samples=1, this one has quant.gradient.samples=2"),
        ("quant=fp32", "quant.name=luq, this one has quant.name=fp32"),
        ("schedule.lr=0.2", "schedule.lr=0.1, this one has schedule.lr=0.2"),
        ("schedule.epochs=2", "schedule.epochs=1, this one has schedule.epochs=2"),
        ("model=resnext8", "model.name=resnet8, this one has model.name=resnext8"),
        ("precision=bf16", "precision=fp32, this one has precision=bf16"),
    ],
)
def test_another_run_is_refused_by_file_and_key(path, override, message):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    with pytest.raises(UserError) as refusal:
        checkpoint.load(path, tiny(override), data())
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("epoch", "batch", "accepted"),
    [(0, 4, True), (1, 0, True), (1, 4, False), (2, 0, False)],
    ids=["in 4-bit training", "at its end", "in the first fine-tune epoch", "after it"],
)
def test_only_a_fine_tune_that_has_not_begun_may_be_exchanged(path, epoch, batch, accepted):
    config = tiny("finetune=fnt2")
    checkpoint.save(path, config, data(), *content(config, epoch, batch))
    if accepted:
        checkpoint.load(path, tiny("finetune=fnt3"), data())
    else:
        with pytest.raises(UserError, match=r"finetune\."):
            checkpoint.load(path, tiny("finetune=fnt3"), data())
    more = "finetune.high_precision.fprop=[activation,weight]"
    if accepted:
        checkpoint.load(path, tiny("finetune=fnt2", more), data())
    else:
        with pytest.raises(UserError, match=r"no finetune\.high_precision\.fprop, this one has"):
            checkpoint.load(path, tiny("finetune=fnt2", more), data())


def test_a_full_disk_leaves_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, tiny(), data(), *content(tiny()))
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["last.pt", "previous.pt"]


def test_a_flipped_bit_is_noticed_wherever_it_is(path):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    good = path.read_bytes()
    positions = random.Random(0).sample(range(8 * len(good)), 40 * TIMES)
    for position in [*positions, 0, 8 * len(good) - 1]:
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(checkpoint.Damaged, match=r"last\.pt"):
            checkpoint.load(path, tiny(), data())
    path.write_bytes(good)
    checkpoint.load(path, tiny(), data())


def test_a_truncated_file_is_noticed_wherever_it_ends(path):
    checkpoint.save(path, tiny(), data(), *content(tiny()))
    good = path.read_bytes()
    sizes = random.Random(0).sample(range(len(good)), 30 * TIMES)
    for size in [*sizes, 0, 1, 71, 72, 73, len(good) - 72, len(good) - 64, len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(checkpoint.Damaged, match=r"last\.pt"):
            checkpoint.load(path, tiny(), data())


def test_the_one_before_is_kept(path, monkeypatch):
    for step in (1, 2, 3):
        model, optimizer, progress = content(tiny())
        checkpoint.save(path, tiny(), data(), model, optimizer, progress | {"step": step})
    found = [checkpoint.read(path.with_name(name))["progress"]["step"] for name in ("last.pt", "previous.pt")]
    assert found == [3, 2]

    def no_links(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.save(path, tiny(), data(), model, optimizer, progress | {"step": 4})
    found = [checkpoint.read(path.with_name(name))["progress"]["step"] for name in ("last.pt", "previous.pt")]
    assert found == [4, 3]
    assert sorted(os.listdir(path.parent)) == ["last.pt", "previous.pt"]


def test_the_sizes_of_a_network_are_beside_its_weights(tmp_path):
    """For who builds it without luqrun; also where the data follow from the settings (glyphs: 47 classes)."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, tiny(), data(), *content(tiny()), sizes={"num_classes": 47})
    assert checkpoint.read(path)["num_classes"] == 47
    assert build_task(tiny()).data.sizes == {"num_classes": 47}
