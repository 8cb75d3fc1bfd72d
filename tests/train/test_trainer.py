"""The loop: what it trains with, how it is evaluated, and how it ends. (Resuming: runs/test_start.py.)"""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from running import assert_same_tensors, build_trainer, last, metrics, quiet_machine, train
from torch import nn

from luqrun.errors import UserError
from luqrun.quant.convert import quantized_layers, set_finetune
from luqrun.quant.quantizer import Quantizer
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate
from luqrun.train.trainer import Trainer

ACCURACIES = {"val/top1", "val/top5", "val/loss"}


def test_summary_and_run_json_of_a_finished_run(tmp_path):
    summary, folder = train(tmp_path / "run", "finetune=fnt3")
    assert folder.summary() == summary
    assert summary.keys() >= ACCURACIES
    assert summary.keys() >= {"train_seconds", "images_per_second", "peak_memory_bytes"}
    epochs = metrics(folder, "epoch")
    assert [row["phase"] for row in epochs] == ["train", "finetune", "finetune", "finetune"]
    for name in ACCURACIES:
        assert summary["before_finetune"][name] == epochs[0][name]
        assert [row[name] for row in summary["finetune"]] == [row[name] for row in epochs[1:]]
        assert summary[name] == epochs[-1][name]
    assert summary["best_metric"] == max(row["val/top1"] for row in epochs)
    # All steps but the first, of 32 images: that one compiles.
    assert summary["images_per_second"] > (4 * 256 - 32) / summary["train_seconds"]
    assert summary["peak_memory_bytes"] > 2**24
    run = folder.run()
    assert (run["status"], run["device"]) == ("finished", "cpu")
    assert "numba" in run["kernel_backend"]


@pytest.mark.parametrize("quant", ["luq", "fp32"])
def test_divergence_is_a_result(tmp_path, monkeypatch, caplog, quant):
    # The fifth step, whose health is not due, sees an infinite weight; luq must not turn it into finite codes.
    original = Trainer.train_step

    def poisoned(self, micro_batches):
        if self.progress["step"] == 4:
            with torch.no_grad():
                next(self.model.layer1.parameters())[0, 0] = math.inf
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with caplog.at_level("WARNING"):
        summary, folder = train(tmp_path / "run", f"quant={quant}")
    assert summary == {"diverged": 4}
    assert folder.summary() is None
    run = folder.run()
    assert (run["status"], run["diverged_at_step"]) == ("diverged", 4)
    assert run["end"]
    assert "the loss is nan at step 4" in caplog.text
    logged = {record.getMessage().split(":")[0] for record in caplog.records}
    if quant == "luq":
        layers = ("layer1.0.conv1", "layer3.0.conv2")
        assert logged >= {f"{name}/{operand}" for name in layers for operand in ("weight", "activation", "gradient")}
        assert "relative_error" in caplog.text


def test_the_repeat_after_a_divergence_sees_the_ranges_that_the_step_saw(tmp_path, monkeypatch):
    # The first micro-batch is sound, and moves the maxima that the second, which is not, is quantized with.
    step, accumulate, seen = Trainer.train_step, Trainer.accumulate_gradients, []

    def poisoned(self, micro_batches):
        if self.progress["step"] == 2:
            (images, labels) = micro_batches[1]
            micro_batches = [micro_batches[0], (images * math.inf, labels)]
        return step(self, micro_batches)

    def watched(self, *arguments, **options):
        seen.append({name: each.clone() for name, each in self.model.named_buffers() if "hindsight" in name})
        return accumulate(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    monkeypatch.setattr(Trainer, "accumulate_gradients", watched)
    summary, _ = train(tmp_path / "run", "quant=luq_hindsight", "schedule.accumulate=2", "dataset.batch_size=16")
    assert summary == {"diverged": 2}
    assert seen[2]
    assert seen[2] == seen[3]
    assert seen[2] != seen[1]


@pytest.mark.parametrize("quant", ["luq", "fp32"])
def test_a_rate_far_too_high_diverges(tmp_path, quant):
    summary, folder = train(tmp_path / "run", f"quant={quant}", "schedule.lr=1e30")
    assert folder.run()["status"] == "diverged"
    assert 0 < summary["diverged"] < 8


def test_divergence_in_the_very_last_step_is_seen_in_the_evaluation(tmp_path, monkeypatch):
    original = Trainer.train_step

    def breaks(self, micro_batches):
        result = original(self, micro_batches)
        if self.progress["step"] == 7:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)
        return result

    monkeypatch.setattr(Trainer, "train_step", breaks)
    _, folder = train(tmp_path / "run")
    assert folder.run()["status"] == "diverged"
    assert folder.summary() is None
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)


def used_quantizers(monkeypatch):
    """Counts (training pass or evaluation, fine-tune phase, quantizer) of every quantization."""
    used, run = Counter(), Quantizer.run
    state = {}
    original_step, original_evaluate = Trainer.accumulate_gradients, trainer.evaluate

    def during(name, method):
        def wrapped(self, *arguments):
            state["now"] = name, self.phase(self.progress["epoch"])
            return method(self, *arguments)

        return wrapped

    def spy(self, *arguments, **keywords):
        if state:  # not before the first step, where what it takes is compiled
            used[(*state["now"], self.format, self.range)] += 1
        return run(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "accumulate_gradients", during("train", original_step))
    monkeypatch.setattr(trainer, "evaluate", during("evaluate", original_evaluate))
    monkeypatch.setattr(Quantizer, "run", spy)
    return used


@pytest.mark.usefixtures("by_operators")
def test_fine_tune_quantizes_weights_only_and_is_evaluated_with_both(tmp_path, monkeypatch):
    used = used_quantizers(monkeypatch)
    # Three quantizers that can be told apart.
    train(tmp_path / "run", "finetune=fnt2", "quant.weight.range=absmax", "quant.activation.range=sawb")
    weight, activation, gradient = ("int4", "absmax"), ("int4", "sawb"), ("e3m0", "absmax")
    layers, steps, val_batches = 6, 8, 3
    assert used == {
        ("train", "train", *weight): layers * steps,
        ("train", "train", *activation): layers * steps,
        ("train", "train", *gradient): layers * steps,
        ("train", "finetune", *weight): layers * 2 * steps,
        ("evaluate", "train", *weight): layers,  # once, in whatever many batches
        ("evaluate", "train", *activation): layers * val_batches,
        ("evaluate", "finetune", *weight): layers * 2,
        ("evaluate", "finetune", *activation): layers * 2 * val_batches,
    }


@pytest.mark.parametrize(("phase", "trained"), [("forward_high", "wag"), ("qaf", "wa")])
def test_the_other_phases_are_trained_as_they_say_and_evaluated_with_both(tmp_path, monkeypatch, phase, trained):
    used = used_quantizers(monkeypatch)
    train(tmp_path / "run", f"finetune={phase}2", "quant.weight.range=absmax", "quant.activation.range=sawb")
    names, layers, steps = {"w": ("int4", "absmax"), "a": ("int4", "sawb"), "g": ("e3m0", "absmax")}, 6, 8
    found = {key[2:]: count for key, count in used.items() if key[:2] == ("train", "finetune")}
    assert found == {names[letter]: layers * 2 * steps for letter in trained}
    found = {key[2:] for key in used if key[:2] == ("evaluate", "finetune")}
    assert found == {names["w"], names["a"]}


def test_the_log_says_what_the_fine_tune_has_in_high_precision(tmp_path, caplog):
    def said(*overrides):
        caplog.clear()
        with quiet_machine(tmp_path / "cache"), caplog.at_level("INFO"):
            build_trainer(tmp_path / "run", *overrides)
        return [(record.levelname, text) for record in caplog.records if "fine" in (text := record.getMessage())]

    own = ("finetune=fnt1", "finetune.high_precision.fprop=[]", "finetune.high_precision.dgrad=[]")
    for overrides, parts in (
        (
            ["finetune=fnt1"],
            "fnt1: high precision in fprop (activation), dgrad (gradient), wgrad (gradient, activation)",
        ),
        (["finetune=qaf2"], "qaf2: high precision in dgrad (gradient, weight), wgrad (gradient, activation)"),
        (own, "fnt1: high precision in wgrad (gradient, activation)"),
    ):
        assert said(*overrides) == [("INFO", f"fine-tune {parts}; evaluated with the recipe's weights and activations")]
    assert said("finetune=longer2") == [("INFO", "fine-tune longer2: everything stays as quant=luq has it")]
    assert said() == said("finetune=fnt1", "quant=fp32") == []
    ((level, text),) = said("finetune=forward_high1", "quant=backward_only")
    assert level == "WARNING"
    assert "finetune=forward_high1 changes nothing of quant=backward_only" in text


def test_the_rate_of_the_fine_tune_phase_is_a_triangle(tmp_path):
    _, folder = train(tmp_path / "run", "finetune=fnt2", "tracking.log_every=1", "finetune.lr_base=0.01", "quant=fp32")
    rates = {phase: [] for phase in ("train", "finetune")}
    for line in metrics(folder, "step"):
        rates[line["phase"]].append(line["lr"])
    start, base, steps = rates["train"][-1], 0.01, 16
    assert max(rates["train"]) == pytest.approx(0.1, rel=0.1)
    expected = [start + (base - start) * (1 - abs(step / (steps / 2) - 1)) for step in range(steps)]
    assert rates["finetune"] == pytest.approx(expected)


def test_the_rate_that_is_logged_is_the_rate_that_is_used(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: used.append(self.param_groups[0]["lr"]))
    _, folder = train(tmp_path / "run", "finetune=fnt1", "tracking.log_every=1", "quant=fp32")
    assert [line["lr"] for line in metrics(folder, "step")] == used
    assert [line["step"] for line in metrics(folder, "step")] == list(range(1, 17))


@pytest.mark.parametrize("finetune", [False, True])
def test_evaluation_counts_every_image_of_an_incomplete_batch(tmp_path, finetune):
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "dataset.batch_size=32")
        set_finetune(run.model, finetune)
        found = evaluate(run)
        assert not run.model.training
        images, labels = run.data.val.batch(torch.arange(94).numpy(), None)
        logits = []
        with torch.no_grad():
            for part in images.split(32):  # an activation's scale is that of its batch
                logits.append(run.model(part))
    logits = torch.cat(logits)
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["val/top1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert found["val/top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())


def test_evaluation_changes_nothing(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "quant=luq_hindsight")
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        state = torch.get_rng_state()
        assert evaluate(run) == evaluate(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_tensors(dict(run.model.state_dict()), before)


@pytest.mark.parametrize("finetune", ["none", "fnt1"])
def test_bf16_runs(tmp_path, finetune):
    summary, folder = train(tmp_path / "bf16", "precision=bf16", f"finetune={finetune}")
    plain, _ = train(tmp_path / "fp32", f"finetune={finetune}")
    assert summary["val/loss"] != plain["val/loss"]
    # ln 47 is what guessing costs; the two stay near each other on a run this short
    assert summary["before_finetune"]["val/loss"] == pytest.approx(plain["before_finetune"]["val/loss"], rel=0.1)
    assert {value.dtype for value in last(folder)["model"].values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_make_the_big_batch(tmp_path, clip):
    # vit_tiny: no batch norm, which would see other batches. Sums in another order differ by float32 rounding.
    common = ("model=vit_tiny", "quant=fp32", "schedule=adamw_cosine", "schedule.warmup_epochs=0", "schedule.epochs=1")
    clip = f"schedule.clip_grad_norm={'null' if clip is None else clip}"
    _, big = train(tmp_path / "big", *common, clip, "dataset.batch_size=64")
    _, small = train(tmp_path / "small", *common, clip, "dataset.batch_size=16", "schedule.accumulate=4")
    assert last(big)["progress"]["step"] == last(small)["progress"]["step"] == 4
    assert last(big)["progress"]["trained"] == last(small)["progress"]["trained"] == 256
    ours, theirs = last(small)["model"], last(big)["model"]
    for name, value in theirs.items():
        # AdamW's first steps move every weight by about lr = 5e-4 whatever its gradient: 2 % of that
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_clipped_by_its_norm(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "schedule.clip_grad_norm=0.01", "quant=fp32")
        free = build_trainer(tmp_path / "free", "quant=fp32")
        images, labels = run.data.train.batch(torch.arange(32).numpy(), None)
        run.train_step([(images, labels)])
        free.train_step([(images, labels)])
    norms = [nn.utils.get_total_norm([p.grad for p in one.model.parameters()]).item() for one in (run, free)]
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


def test_an_epoch_shorter_than_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"schedule\.accumulate=9 is too large; it must be at most the 8 batches"):
        train(tmp_path / "run", "schedule.accumulate=9")


def test_batches_that_fill_no_step_are_left_out(tmp_path):
    _, folder = train(tmp_path / "run", "schedule.accumulate=3", "quant=fp32", "finetune=fnt1")
    progress = last(folder)["progress"]
    assert (progress["step"], progress["trained"]) == (4, 2 * 6 * 32)


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device=cuda, but torch finds no GPU; allowed here: auto, cpu"):
        train(tmp_path / "run", "device=cuda")
    with quiet_machine(tmp_path / "cache"):
        assert train(tmp_path / "auto", "device=auto", "quant=fp32")[1].run()["device"] == "cpu"


def accuracies(monkeypatch, *values):
    """Let the epochs' evaluations give these."""
    left = iter(values)
    monkeypatch.setattr(trainer, "evaluate", lambda run: {"val/loss": 1.0, "val/top1": next(left), "val/top5": 50.0})


def test_the_best_checkpoint_is_the_best_epoch(tmp_path, monkeypatch):
    accuracies(monkeypatch, 10.0, 30.0, 20.0, 30.0)
    summary, folder = train(tmp_path / "run", "finetune=fnt3", "quant=fp32")
    best = torch.load(folder.checkpoints / "best.pt", weights_only=True)
    assert best["progress"]["epoch"] == 2
    assert (summary["best_metric"], summary["val/top1"]) == (30.0, 30.0)


def test_training_learns(tmp_path):
    _, folder = train(
        tmp_path / "run", "dataset.glyphs.train_images=470", "dataset.glyphs.noise=0", "schedule.epochs=6"
    )
    losses = [row["train/loss"] for row in metrics(folder, "epoch")]
    assert losses[-1] < losses[0] - 0.3


def test_health_is_recorded_when_due_and_off_otherwise(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "tracking.health_every=2", "tracking.histogram_every=0")
        images, labels = run.data.train.batch(torch.arange(32).numpy(), None)
        shown = []
        run.tracker.health = lambda step, model, histograms: shown.append((step, histograms))
        for step in range(4):
            run.progress["step"] = step
            run.train_step([(images, labels)])
            assert all(layer.health is None for _, layer in quantized_layers(run.model))
    assert shown == [(1, False), (3, False)]
