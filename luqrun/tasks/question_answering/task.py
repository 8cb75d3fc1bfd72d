"""Question answering: the ends of a span are learnt with cross-entropy, and answers judged by SQuAD's F1."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.config import Config, ModelConfig
from luqrun.errors import UserError, check_at_most
from luqrun.internals.of_transformers import require_text
from luqrun.runs.folder import TOKENIZER
from luqrun.runs.metric import Metric
from luqrun.runs.weights import Weights, is_file, read_weights
from luqrun.tasks.outline import Outline
from luqrun.tasks.question_answering import GENERATED
from luqrun.tasks.question_answering.answers import Span, best_spans, grade
from luqrun.tasks.question_answering.data import (
    NETWORKS,
    VOCABULARY,
    build_dataset,
    fingerprint_dataset,
    validate_dataset,
    validate_model,
)
from luqrun.tasks.settings import check_text_optimizer
from luqrun.tasks.task import Task

Batch = dict[str, Tensor]
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def build(config: Config) -> QuestionAnswering:
    """The task of this run. Raises UserError naming the key, or the file, that is wrong."""
    validate(config)
    return QuestionAnswering(config)


def bare_network(config: Config, sizes: Mapping) -> tuple[nn.Module, dict[str, object]]:
    """As luqrun.tasks.bare_network."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    example = {"input_ids": ids, "token_type_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": False}
    return _drawn(config.model, sizes["vocab_size"]), example


def validate(config: Config) -> None:
    """Raise UserError naming the first key whose value is not allowed; no file is looked at."""
    require_text()
    validate_model(config.model, config.dataset.name)
    validate_dataset(config.dataset, config.model.weights)
    check_text_optimizer(config)
    if config.schedule.label_smoothing:
        what = f"schedule.label_smoothing={config.schedule.label_smoothing}"
        raise UserError(f"{what} is not read by dataset={config.dataset.name}")


def fingerprint(config: Config) -> dict:
    """As luqrun.tasks.fingerprint_data. Raises UserError as `build` does."""
    return fingerprint_dataset(config)


def outline(config: Config) -> Outline:
    """As luqrun.tasks.outline_task: windows of cost.length tokens, by default dataset.max_length. Of model.weights
    config.json alone is read."""
    from luqrun.tasks.question_answering.weights import sizes_folder

    dataset, length = config.dataset, config.cost.length or config.dataset.max_length
    check_at_most("cost.length", length, dataset.max_length)
    if config.model.weights is None and dataset.vocabulary is None and dataset.name == GENERATED:
        what = f"dataset={dataset.name} says only with its text how many subwords there are, and job=cost reads none"
        raise UserError(f"{what}; give dataset.vocabulary")
    if is_file(config.model.weights) and sizes_folder(config.model.weights) is None:
        what = f"model.weights={config.model.weights}: beside it is no config.json, which says the sizes to job=cost"
        raise UserError(f"{what}; leave it out, and give dataset.vocabulary")
    with torch.device("meta"):
        network = _drawn(config.model, dataset.vocabulary or VOCABULARY)
        ids = torch.zeros(dataset.batch_size, length, dtype=torch.long)
    # Without a mask: what it holds is looked into, which a meta tensor cannot be.
    inputs = {"input_ids": ids, "token_type_ids": ids, "return_dict": False}
    about = f"windows of {length} tokens"
    return Outline(network.train(), inputs, inputs, dataset.batch_size, "window", about)


def _drawn(model: ModelConfig, vocabulary_size: int) -> nn.Module:
    """The network with drawn weights."""
    from luqrun.tasks.question_answering.networks import build_network, sized_network
    from luqrun.tasks.question_answering.weights import sizes_folder

    if (sizes := sizes_folder(model.weights)) is not None:
        return sized_network(model, sizes)
    return build_network(model, NETWORKS[model.name], vocabulary_size)


class Found(NamedTuple):
    """Of a window: its loss, and the best answer in it."""

    loss: float
    span: Span | None


class QuestionAnswering(Task):
    """A batch is windows of questions (luqrun.tasks.question_answering.windows)."""

    metrics = (
        Metric("val/f1", "F1 %", higher_is_better=True),
        Metric("val/em", "EM %", higher_is_better=True),
        Metric("val/loss", "loss", higher_is_better=False),
    )
    unit = "windows"
    equal_weights = True  # an epoch's last, smaller batch is left out

    def __init__(self, config: Config):
        self.model, self.evaluates = config.model, config.job == "evaluate"
        self.data, self.tokenizer = build_dataset(config)

    def artifacts(self) -> dict[str, str]:
        """The tokenizer and, where they are not model.name's, the sizes: so that a checkpoint can be model.weights."""
        from luqrun.tasks.question_answering.weights import SETTINGS, sizes_folder

        sizes = sizes_folder(self.model.weights)
        own = {} if sizes is None else {SETTINGS: (sizes / SETTINGS).read_text()}
        return {TOKENIZER: self.tokenizer.to_str(pretty=True), **own}

    def network(self) -> nn.Module:
        from luqrun.tasks.question_answering.networks import read_network
        from luqrun.tasks.question_answering.weights import weights_folder

        if self.model.weights is not None and not is_file(self.model.weights):
            return read_network(self.model, weights_folder(self.model.weights), whole=self.evaluates)
        return _drawn(self.model, self.data.vocabulary_size)

    def weights(self) -> Weights | None:
        from luqrun.tasks.question_answering.networks import span_tensors

        if not is_file(self.model.weights):
            return None  # of a folder, `network` has read them
        found = read_weights(self.model.weights)
        return dataclasses.replace(found, tensors=span_tensors(found.tensors))

    def head(self, network: nn.Module) -> str:
        return "qa_outputs"

    def example(self) -> dict[str, object]:
        """The first validation window."""
        batch = self.data.val.batch(np.array([0]), None)
        return {**{name: batch[name] for name in INPUTS}, "return_dict": False}

    def weight(self, batch: Batch) -> int:
        return len(batch["start"])

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(*self._logits(network, batch), batch).mean(), {}

    def predict(self, network: nn.Module, batch: Batch) -> list[Found]:
        """For each window its loss and best answer."""
        starts, ends = self._logits(network, batch)
        losses = self._losses(starts, ends, batch).tolist()
        return [Found(*each) for each in zip(losses, best_spans(starts, ends, batch["context"]), strict=True)]

    def score(self, predictions: list[list[Found]], split: str = "val") -> dict[str, float]:
        windows = getattr(self.data, split)
        losses = [found.loss for batch in predictions for found in batch]
        assert len(losses) == len(windows)
        answers = {question.id: [answer.text for answer in question.answers] for question in windows.of.questions}
        grades = grade(self.answers(predictions, split), answers)
        metrics = {**grades, "loss": math.fsum(losses) / len(losses)}
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def files(self, predictions: list[list[Found]], split: str = "val") -> dict[str, str]:
        """dev.json: text by question id, which SQuAD's own script reads."""
        name = "dev" if split == "val" else split
        return {f"{name}.json": json.dumps(self.answers(predictions, split), ensure_ascii=False, indent=1) + "\n"}

    def answers(self, predictions: list[list[Found]], split: str) -> dict[str, str]:
        """The best answer to each question in any of its windows, by question id; "" where no window has one."""
        windows = getattr(self.data, split)
        best: dict[int, tuple[float, int]] = {}
        spans = [found.span for batch in predictions for found in batch]
        for index, (span, question) in enumerate(zip(spans, windows.table[:, 0].tolist(), strict=True)):
            if span is not None and (question not in best or span.score > best[question][0]):
                best[question] = span.score, index
        return {
            question.id: windows.text(best[number][1], *spans[best[number][1]][1:]) if number in best else ""
            for number, question in enumerate(windows.of.questions)
        }

    @staticmethod
    def _logits(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the start and of the end, float32 (n, length), -inf at padding."""
        logits = network(**{name: batch[name] for name in INPUTS}, return_dict=False)
        padding = batch["attention_mask"] == 0
        starts, ends = (each.float().masked_fill(padding, -torch.inf) for each in logits)
        return starts, ends

    @staticmethod
    def _losses(starts: Tensor, ends: Tensor, batch: Batch) -> Tensor:
        """Of each window the mean of the cross-entropies of start and end, float32 (n,)."""
        each = (
            F.cross_entropy(logits, batch[name], reduction="none")
            for logits, name in ((starts, "start"), (ends, "stop"))
        )
        return sum(each) / 2
