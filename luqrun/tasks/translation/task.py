"""Translation: cross-entropy of the next subword, judged by BLEU of beam search on plain text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.config import Config
from luqrun.errors import UserError, check_at_most
from luqrun.internals.of_torch import innermost
from luqrun.internals.of_transformers import require_text, sacrebleu
from luqrun.runs.folder import TOKENIZER
from luqrun.runs.metric import Metric
from luqrun.runs.weights import OF_TEXT, Weights, beside, find_file, fingerprint_weights, read_weights
from luqrun.tasks.outline import Outline
from luqrun.tasks.settings import check_text_model, check_text_optimizer
from luqrun.tasks.task import Task
from luqrun.tasks.translation.data import build_dataset, fingerprint_dataset, validate_dataset
from luqrun.tasks.translation.networks import SIZES, build_network
from luqrun.tasks.translation.subwords import END, PADDING, Subwords

USUAL_LENGTH = 32  # subwords of a sentence in an outline: our choice, the data would tell
BEAMS, LENGTH_PENALTY = 5, 0.6  # as is usual of Transformers on WMT14, with a beam of 4 or 5
Batch = dict[str, Tensor]


def build(config: Config) -> Translation:
    """The task of this run. Raises UserError naming the key, or the file, that is wrong."""
    return Translation(config)


def bare_network(config: Config, sizes: Mapping) -> tuple[nn.Module, Batch]:
    """As luqrun.tasks.bare_network."""
    return build_network(config.model, sizes["vocabulary"], config.dataset.max_length), _example()


def _example() -> Batch:
    ids = torch.full((1, 2), END)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}


def validate(config: Config) -> None:
    """Raise UserError naming the first key under `model` or `dataset` that is not allowed; no file is looked at."""
    require_text()
    if config.model.name not in SIZES:
        asked = f"dataset={config.dataset.name} asks; allowed: {', '.join(SIZES)}"
        raise UserError(f"model.name={config.model.name} does not translate, as {asked}")
    check_text_model(config.model)
    if config.model.new_head:
        raise UserError("model.new_head=true: a network for translation has no head, but one table for all subwords")
    validate_dataset(config.dataset)
    check_text_optimizer(config)


def fingerprint(config: Config) -> dict:
    """As luqrun.tasks.fingerprint_data. Raises UserError as `build` does."""
    found, weights = fingerprint_dataset(config.dataset), config.model.weights
    return found if weights is None else {**found, "weights": fingerprint_weights(weights, OF_TEXT)}


def outline(config: Config) -> Outline:
    """As luqrun.tasks.outline_task: pairs of sentences of cost.length subwords on either side, as many as
    dataset.batch_tokens allows. The vocabulary is what dataset.vocabulary says, which a small text does not fill."""
    if config.model.weights is not None:
        what = f"model.weights={config.model.weights} is not read by job=cost, nor the tokenizer beside it"
        raise UserError(f"{what}; leave it out, and give dataset.vocabulary")
    dataset, length = config.dataset, config.cost.length or USUAL_LENGTH
    check_at_most("cost.length", length, dataset.max_length)
    pairs = dataset.batch_tokens // length
    with torch.device("meta"):
        network = build_network(config.model, dataset.vocabulary, dataset.max_length).train()
        ids, seen = torch.zeros(pairs, length, dtype=torch.long), torch.zeros(pairs, 1, length, length)
    # A mask of four dimensions is taken as it is: others are looked into, which meta tensors cannot be.
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": seen, "use_cache": False}
    about = f"sentences of {length} subwords on either side, {dataset.vocabulary:,} subwords"
    return Outline(network, inputs, inputs, pairs, "pair of sentences", about)


class Translation(Task):
    """A batch is a dict of int64 subwords, padded: `source` (n, S) and `target` (n, T), each sentence with its END."""

    metrics = (Metric("val/bleu", "BLEU", higher_is_better=True), Metric("val/loss", "loss", higher_is_better=False))
    unit = "tokens"
    equal_weights = False

    def __init__(self, config: Config):
        self.model, self.max_length = config.model, config.dataset.max_length
        self.label_smoothing = config.schedule.label_smoothing
        self.bleu = sacrebleu().metrics.BLEU()
        self.data = build_dataset(config.dataset, self._subwords())
        if config.model.weights is not None:
            self.data = dataclasses.replace(self.data, fingerprint=fingerprint(config))
        self.bleu.corpus_score(["one"], [["one"]])  # it knows its signature after the first score
        decoding = f"{BEAMS} beams, length penalty {LENGTH_PENALTY}"
        self.notes = MappingProxyType({"bleu_signature": str(self.bleu.get_signature()), "decoding": decoding})

    def _subwords(self) -> Subwords | None:
        """Those of the run, or the folder, that model.weights is of; None: they are learnt from the training text."""
        if self.model.weights is None:
            return None
        path = beside(find_file(self.model.weights)) / TOKENIZER
        return Subwords.read(path) if path.is_file() else None

    def weights(self) -> Weights | None:
        return None if self.model.weights is None else read_weights(self.model.weights)

    def head(self, network: nn.Module) -> str:
        return ""

    def network(self) -> nn.Module:
        return build_network(self.model, len(self.data.subwords), self.max_length)

    def example(self) -> Batch:
        return _example()

    def artifacts(self) -> dict[str, str]:
        return {TOKENIZER: self.data.subwords.json}

    def weight(self, batch: Batch) -> int:
        return int((batch["target"] != PADDING).sum())

    def _logits(self, network: nn.Module, batch: Batch) -> Tensor:
        """float32 (n, T, subwords), of each subword of the target from those before it."""
        source, target = batch["source"], batch["target"]
        before = F.pad(target[:, :-1], (1, 0), value=PADDING)
        found = network(
            input_ids=source, attention_mask=(source != PADDING).long(), decoder_input_ids=before, use_cache=False
        )
        return found.logits.float()

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, target = self._logits(network, batch).flatten(0, 1), batch["target"].flatten()
        return F.cross_entropy(logits, target, ignore_index=PADDING, label_smoothing=self.label_smoothing), {}

    def predict(self, network: nn.Module, batch: Batch) -> tuple[list[list[int]], float, int]:
        """The translations as subwords; the sum of losses, without smoothing, and its subwords.

        All of it as the model is, not compiled: the search could not be, and the loss takes little time beside it.
        """
        model = innermost(network)
        logits, target = self._logits(model, batch).flatten(0, 1), batch["target"].flatten()
        loss = F.cross_entropy(logits, target, ignore_index=PADDING, reduction="sum").item()
        source = batch["source"]
        found = model.generate(
            input_ids=source,
            attention_mask=(source != PADDING).long(),
            num_beams=BEAMS,
            length_penalty=LENGTH_PENALTY,
            do_sample=False,
            max_length=min(2 * source.shape[1] + 10, 2 * self.max_length),
        )
        return found[:, 1:].tolist(), loss, self.weight(batch)

    def _translations(self, predictions: list, split: str) -> list[str]:
        """In the order of the file."""
        ids = [line for lines, _, _ in predictions for line in lines]
        found = [""] * len(ids)
        for place, text in zip(self.data.order[split], self.data.subwords.decode(ids), strict=True):
            found[place] = text
        return found

    def score(self, predictions: list, split: str = "val") -> dict[str, float]:
        found, references = self._translations(predictions, split), self.data.references[split]
        loss = math.fsum(sums for _, sums, _ in predictions) / sum(weight for _, _, weight in predictions)
        return {f"{split}/bleu": self.bleu.corpus_score(found, [references]).score, f"{split}/loss": loss}

    def files(self, predictions: list, split: str = "val") -> dict[str, str]:
        return {f"{split}.hyp.txt": "".join(f"{line}\n" for line in self._translations(predictions, split))}
