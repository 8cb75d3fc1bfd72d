"""Question answering as a task: its loss, its predictions, its layers in 4 bits, and a run from end to end."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from questions import NORMANS, config, question, squad, write_squad
from running import assert_same_tensors, last, quiet_machine
from torch import nn

import luqrun
from luqrun import tasks
from luqrun.quant import quantizer
from luqrun.quant.convert import quantized_layers, set_step
from luqrun.runs.folder import RunFolder
from luqrun.tasks.question_answering.answers import Span, grade
from luqrun.tasks.question_answering.task import INPUTS, Found
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate

BLOCK = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BLOCK += ("intermediate.dense", "output.dense")


@pytest.fixture(scope="module")
def task():
    return tasks.build_task(config(None))


@pytest.fixture(scope="module")
def batch(task):
    return task.data.val.batch(np.array([0, 1, len(task.data.val) - 2, len(task.data.val) - 1]), None)  # of two lengths


class Fixed(nn.Module):
    """Returns the logits it was given, cut to the batch."""

    def __init__(self, starts, ends):
        super().__init__()
        self.logits = starts, ends

    def forward(self, input_ids, token_type_ids, attention_mask, return_dict):
        return self.logits


def test_the_loss_is_the_mean_of_the_cross_entropies_of_start_and_end(task, batch):
    starts, ends = torch.randn(2, *batch["input_ids"].shape, requires_grad=True)
    loss, sums = task.loss(Fixed(starts, ends), batch)
    expected, padding = [], batch["attention_mask"] == 0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for logits, name in ((starts, "start"), (ends, "stop")):
            expected.append(F.cross_entropy(logits[row, :length], batch[name][row]))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert loss.dtype == torch.float32
    assert (sums, task.weight(batch)) == ({}, 4)
    (gradient,) = torch.autograd.grad(loss, starts)
    assert padding.any()
    assert (gradient[padding] == 0).all()
    assert (gradient[~padding] != 0).all()
    found = task.predict(Fixed(starts.detach(), ends.detach()), batch)
    assert np.mean([each.loss for each in found]) == pytest.approx(loss.item(), rel=1e-6)


def test_a_network_that_knows_the_spans_is_judged_perfect(task):
    predictions = []
    for begin in range(0, len(task.data.val), 100):
        batch = task.data.val.batch(np.arange(begin, begin + 100), None)
        length = batch["input_ids"].shape[1]
        starts, ends = (F.one_hot(batch[name], length) * 50.0 for name in ("start", "stop"))
        predictions.append(task.predict(Fixed(starts, ends), batch))
    found = task.score(predictions)
    assert found == {"val/f1": 100.0, "val/em": 100.0, "val/loss": pytest.approx(0, abs=1e-6)}
    assert found.keys() == {metric.name for metric in task.metrics}
    assert task.metrics[0].name == "val/f1"


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A context of several windows, and one of a single window."""
    long = " ".join([NORMANS] * 6)
    content = squad((long, [question("long", "Who?", "Rollo")]), (NORMANS, [question("short", "Where?", "France")]))
    root = write_squad(tmp_path_factory.mktemp("squad") / "data", val=content)
    return tasks.build_task(config(root, "dataset.max_length=48", "dataset.stride=8"))


def test_the_best_answer_of_all_windows_of_a_question_counts(windowed):
    windows = windowed.data.val
    of_long = [index for index in range(len(windows)) if windows[index].question == 0]
    assert len(of_long) > 2
    spans = {index: Span(float(index), 10, 11) for index in of_long[:-1]}
    spans[of_long[-2]] = Span(99.0, 12, 14)
    predictions = [[Found(1.0, spans.get(index)) for index in range(len(windows))]]
    text = windows.text(of_long[-2], 12, 14)
    assert len(text) > 5
    assert windowed.answers(predictions, "val") == {"long": text, "short": ""}
    assert text in windows.of.contexts[0]
    assert windowed.score(predictions)["val/loss"] == 1.0
    files = windowed.files(predictions)
    assert files.keys() == {"dev.json"}
    assert json.loads(files["dev.json"]) == {"long": text, "short": ""}


def test_the_file_of_predictions_is_readable_beyond_ascii(windowed):
    windows = windowed.data.val
    start = windows.batch(np.array([len(windows) - 1]), None)["context"][0].int().argmax().item()
    spans = [None] * (len(windows) - 1) + [Span(1.0, start, start + 12)]
    text = windowed.files([[Found(0.0, span) for span in spans]])["dev.json"]
    assert "région" in text


def quantized(task, recipe="luq"):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return luqrun.quantize_model(task.network(), luqrun.recipe(recipe), example=task.example())


def test_projections_and_feed_forward_layers_are_quantized_and_nothing_else(task, batch):
    model = quantized(task)
    expected = [f"bert.encoder.layer.{block}.{name}" for block in range(2) for name in BLOCK]
    assert [name for name, _ in quantized_layers(model)] == expected
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert left == ["qa_outputs"]
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of layers that did not compute
        loss, _ = task.loss(model, batch)
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("by_operators")
def test_queries_keys_and_values_quantize_their_input_once(task, batch, monkeypatch):
    model, seen, run = quantized(task), [], quantizer.Quantizer.run

    def counted(self, x, *rest):
        seen.append(tuple(x.shape))
        return run(self, x, *rest)

    monkeypatch.setattr(quantizer.Quantizer, "run", counted)
    model.train()
    set_step(model, 0)
    task.loss(model, batch)
    rows = batch["input_ids"].numel()
    wide, narrow = (sum(np.prod(shape) == rows * width for shape in seen) for width in (512, 128))
    assert (narrow, wide) == (2 * 3, 2 * 1)  # q, k and v together; what attention returns; both feed-forward layers


def test_padding_of_a_batch_does_not_change_what_a_window_says(task):
    torch.manual_seed(0)
    model = task.network().eval()
    lengths = [len(task.data.val._tokens(task.data.val[index])) for index in range(30)]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    assert lengths[short] < lengths[long]
    (alone,) = task.predict(model, task.data.val.batch(np.array([short]), None))
    padded, _ = task.predict(model, task.data.val.batch(np.array([short, long]), None))
    assert padded.loss == pytest.approx(alone.loss, rel=1e-5)
    assert padded.span[1:] == alone.span[1:]


def test_a_run_keeps_its_tokenizer_and_predictions_that_give_its_score(tmp_path):
    found = config(None, "quant=luq", "finetune=fnt1", "dataset.batch_size=16", "tracking.log_every=1")
    folder = RunFolder(tmp_path)
    with quiet_machine():
        summary = trainer.run(found, folder)
    task = tasks.build_task(found)
    assert (tmp_path / "tokenizer.json").read_text() == task.tokenizer.to_str(pretty=True)
    kept = json.loads((tmp_path / "predictions" / "dev.json").read_text())
    questions = task.data.val.of.questions
    assert list(kept) == [each.id for each in questions]
    again = grade(kept, {each.id: [answer.text for answer in each.answers] for each in questions})
    assert again == {"f1": summary["val/f1"], "em": summary["val/em"]}
    assert summary["windows_per_second"] > 0
    assert [row["epoch"] for row in summary["finetune"]] == [2]
    assert last(folder)["vocab_size"] == task.data.sizes["vocab_size"]


def test_it_learns(tmp_path):
    found = config(None, "quant=fp32", "dataset.batch_size=16", "schedule.epochs=6", "schedule.lr=0.003")
    with quiet_machine():
        run = trainer.Trainer(found, RunFolder(tmp_path), torch.device("cpu"))
        before = evaluate(run)
        for epoch in range(6):
            run.train_epoch(epoch)
        after = evaluate(run)
        run.tracker.close()
    assert after["val/loss"] < 0.8 * before["val/loss"]
    assert after["val/f1"] > before["val/f1"] + 5


def test_interrupted_and_resumed_it_is_bit_identical(tmp_path):
    options = "quant=luq", "model.dropout=0.1", "dataset.batch_size=16", "tracking.checkpoint_every=2"
    found = config(None, *options)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    with quiet_machine():
        trainer.run(found, RunFolder(tmp_path / "whole"))
        run = trainer.Trainer(found, RunFolder(tmp_path / "parts"), torch.device("cpu"))
        run.requests.check = lambda: None
        run.steps_per_epoch, whole = 2, run.steps_per_epoch
        run.learning_rate = lambda step: trainer.rate_of_step(found.schedule, found.finetune, step, whole)
        run.train_epoch(0)
        run.save_checkpoint()
        run.tracker.close()
        trainer.run(found, RunFolder(tmp_path / "parts"))
    one, other = (last(RunFolder(tmp_path / name)) for name in ("whole", "parts"))
    assert_same_tensors(one["model"], other["model"])
    texts = {(tmp_path / name / "predictions" / "dev.json").read_text() for name in ("whole", "parts")}
    assert len(texts) == 1


def test_the_example_is_what_the_network_takes(task):
    assert task.example().keys() == {*INPUTS, "return_dict"}
