"""Resuming: an interrupted run, continued, is the run that was never interrupted, bit for bit."""

import errno
import shutil
from collections import Counter

import pytest
import torch
from running import assert_same_tensors, last, metrics, tiny, train

from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.metric import Metric
from luqrun.train import trainer
from luqrun.train.trainer import Trainer

WHOLE = ("finetune=fnt1", "tracking.histogram_every=5")


def interrupt(monkeypatch, owner, name, call):
    """Ctrl-C at the given call (from 1) of owner.name, once."""
    original, calls = getattr(owner, name), Counter()

    def interrupted(*arguments, **keywords):
        calls["so far"] += 1
        if calls["so far"] == call:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupted)


def assert_same_run(one, other):
    """Bit-identical weights, optimizer and evaluations; equal lines of metrics; a summary that says the same."""
    for part in ("model", "optimizer"):
        assert_same_tensors(last(one)[part], last(other)[part])
    progress, others = last(one)["progress"], last(other)["progress"]
    for evaluation in progress["evaluations"] + others["evaluations"]:
        del evaluation["mean_images_per_second"]
    for key in ("epoch", "batch", "step", "trained", "best", "evaluations"):
        assert progress[key] == others[key]
    assert metrics(one) == metrics(other)
    assert_same_tensors(
        torch.load(one.checkpoints / "best.pt", weights_only=True)["model"],
        torch.load(other.checkpoints / "best.pt", weights_only=True)["model"],
    )
    clock = ("train_seconds", "evaluation_seconds", "images_per_second", "peak_memory_bytes")
    assert {k: v for k, v in one.summary().items() if k not in clock} == {
        k: v for k, v in other.summary().items() if k not in clock
    }


@pytest.mark.parametrize(
    ("overrides", "owner", "name", "call"),
    [
        (WHOLE, Trainer, "train_step", 7),  # mid-epoch, two steps after a checkpoint
        (WHOLE, Trainer, "train_step", 15),  # mid-epoch in the fine-tune phase
        (WHOLE, trainer, "evaluate", 1),  # all steps of the epoch done
        (WHOLE, checkpoint, "save", 3),  # the epoch's metrics written, no checkpoint
        (WHOLE, checkpoint, "save", 4),  # best.pt written, last.pt not
        (WHOLE, Trainer, "summarize", 1),  # all done but the summary
        (("schedule.accumulate=2", "schedule.epochs=2"), Trainer, "train_step", 7),
        (("dataset.workers=1", "dataset.augment=true"), Trainer, "train_step", 7),
        (("quant=luq_hindsight", "model=mobilenet_tiny"), Trainer, "train_step", 7),  # with dropout
        (("quant=luq_smp2", "precision=bf16"), Trainer, "train_step", 7),
        (("quant=luq_hindsight", "finetune=forward_high1"), Trainer, "train_step", 14),  # mid-epoch in that phase
        (("finetune=qaf1",), Trainer, "train_step", 14),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_interrupted_and_resumed_is_bit_identical(tmp_path, monkeypatch, trained, overrides, owner, name, call):
    whole = trained(*overrides)
    interrupt(monkeypatch, owner, name, call)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", *overrides, "tracking.checkpoint_every=3")
    assert not (tmp_path / "run" / "summary.json").exists()
    _, resumed = train(tmp_path / "run", *overrides, "tracking.checkpoint_every=3")
    assert_same_run(resumed, whole)


def test_resuming_skips_what_is_done(tmp_path, monkeypatch):
    interrupt(monkeypatch, Trainer, "train_step", 8)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "tracking.checkpoint_every=3")
    steps = []
    monkeypatch.setattr(Trainer, "train_step", counting(Trainer.train_step, steps))
    train(tmp_path / "run", "tracking.checkpoint_every=3")
    assert steps == [6, 7]


def counting(train_step, steps):
    def counted(self, micro_batches):
        steps.append(self.progress["step"])
        return train_step(self, micro_batches)

    return counted


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path, trained):
    one, two, other = trained(), train(tmp_path / "2")[1], train(tmp_path / "3", "seed=1")[1]
    assert_same_run(one, two)
    assert metrics(one) != metrics(other)


def test_a_trained_run_can_be_fine_tuned_later(tmp_path, trained):
    whole, base = trained("finetune=fnt3"), trained()
    summary, tuned = train(tmp_path / "tuned", "finetune=fnt3", f"resume={base.checkpoints / 'last.pt'}")
    assert_same_tensors(last(tuned)["model"], last(whole)["model"])
    assert_same_tensors(last(tuned)["optimizer"], last(whole)["optimizer"])
    assert summary["finetune"] == whole.summary()["finetune"]
    assert summary["before_finetune"] == whole.summary()["before_finetune"]
    assert not base.run().get("reason")
    # The other run's checkpoint is not touched, and its lines are not copied.
    assert last(base)["progress"]["epoch"] == 1
    assert {line["phase"] for line in metrics(tuned)} == {"finetune"}


@pytest.mark.parametrize("kept", ["of the run", "of another run", "of a later epoch", None])
def test_the_best_of_epochs_that_another_run_trained(tmp_path, trained, monkeypatch, caplog, kept):
    shutil.copytree(trained("quant=fp32").checkpoints, tmp_path / "given")
    other = trained("quant=fp32", "seed=5")
    monkeypatch.setattr(Metric, "improves", lambda metric, value, best: best is None)  # the first epoch is the best
    last_one, best = tmp_path / "given" / "last.pt", tmp_path / "given" / "best.pt"
    before = torch.load(best, weights_only=True)
    if kept == "of another run":
        shutil.copy(other.checkpoints / "best.pt", best)
    elif kept == "of a later epoch":
        progress = {**before["progress"], "best": before["progress"]["best"] + 1}
        checkpoint.save(best, tiny("quant=fp32"), {}, before["model"], before["optimizer"], progress)
    elif kept is None:
        best.unlink()
    _, folder = train(tmp_path / "run", "quant=fp32", "finetune=fnt1", f"resume={last_one}")
    if kept == "of the run":
        found = checkpoint.read(folder.checkpoints / "best.pt")
        assert_same_tensors(found["model"], before["model"])
        assert found["num_classes"] == before["num_classes"]
        assert found["identity"] == checkpoint.read(folder.checkpoints / "last.pt")["identity"]
    else:
        assert not (folder.checkpoints / "best.pt").exists()
        why = "no such file" if kept is None else "is not of these epochs"
        value = before["progress"]["best"]
        assert f"{why}: there is no best.pt before an epoch is better than {value:g}" in caplog.text


def test_resume_from_a_path_refuses_another_run(tmp_path, trained):
    path = trained().checkpoints / "last.pt"
    for override, key in (("schedule.lr=0.2", "schedule.lr"), ("quant=fp32", "quant"), ("seed=1", "seed")):
        with pytest.raises(UserError) as refusal:
            train(tmp_path / f"other-{key}", override, f"resume={path}")
        assert str(path) in str(refusal.value)
        assert key in str(refusal.value)
        assert not (tmp_path / f"other-{key}" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        train(tmp_path / "other", f"resume={tmp_path / 'nowhere.pt'}")


def test_resume_never_keeps_what_is_there(tmp_path, monkeypatch):
    train(tmp_path / "new", "resume=never")  # nothing there: a run like any other
    interrupt(monkeypatch, Trainer, "train_step", 8)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "tracking.checkpoint_every=3")
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"resume=never, but .*checkpoints exists"):
        train(tmp_path / "run", "resume=never")
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before


def test_a_run_without_checkpoint_starts_over_with_fresh_metrics(tmp_path, monkeypatch):
    interrupt(monkeypatch, Trainer, "train_step", 6)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    _, run = train(tmp_path / "run")
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 8, 8]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, trained):
    overrides = ("finetune=fnt1", "tracking.checkpoint_every=5")
    whole = trained(*WHOLE)
    save, calls = checkpoint.write_atomically, Counter()

    def fills(path, data):
        calls["so far"] += 1
        if calls["so far"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", fills)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "run", *overrides)
    assert (tmp_path / "run" / "summary.json").exists() is False
    assert last(trainer.RunFolder(tmp_path / "run"))["progress"]["step"] == 8
    _, resumed = train(tmp_path / "run", *overrides)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("call", [3, 4])
def test_the_best_checkpoint_survives_an_interruption_beside_it(tmp_path, monkeypatch, call):
    accuracies = (10.0, 30.0, 20.0)
    monkeypatch.setattr(
        trainer,
        "evaluate",
        lambda run: {"val/loss": 1.0, "val/top1": accuracies[run.progress["epoch"]], "val/top5": 50.0},
    )
    interrupt(monkeypatch, checkpoint, "save", call)  # the second epoch writes best.pt and last.pt
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "finetune=fnt2", "quant=fp32")
    _, folder = train(tmp_path / "run", "finetune=fnt2", "quant=fp32")
    assert torch.load(folder.checkpoints / "best.pt", weights_only=True)["progress"]["epoch"] == 2


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of WHOLE, interrupted in its fine-tune, with several checkpoints behind it."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Trainer, "train_step", 12)
        with pytest.raises(KeyboardInterrupt):
            train(path, *WHOLE, "tracking.checkpoint_every=3")
    return path


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "gone", "a folder"])
def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(tmp_path, caplog, interrupted, trained, harm):
    path = shutil.copytree(interrupted, tmp_path / "run") / "checkpoints" / "last.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    content = {"truncated": good[:middle], "flipped": good[:middle] + b"?" + good[middle + 1 :], "empty": b""}
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "gone":
        path.write_bytes(content[harm])
    _, resumed = train(tmp_path / "run", *WHOLE, "tracking.checkpoint_every=3")
    assert "Going on from the one before" in caplog.text
    assert (path.with_name("damaged.pt")).exists() == (harm != "gone")
    assert_same_run(resumed, trained(*WHOLE))


def test_two_damaged_checkpoints_are_refused(tmp_path, monkeypatch):
    interrupt(monkeypatch, Trainer, "train_step", 8)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "tracking.checkpoint_every=2")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"no checkpoint")
    message = (
        r"last\.pt is truncated or not .* and .*previous\.pt is truncated or not .*; delete .*checkpoints to start"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run")
