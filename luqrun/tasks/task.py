"""What a network learns: the seam between the loop of luqrun.train, which knows no data, and the tasks, which do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from luqrun.runs.metric import Metric
from luqrun.runs.weights import Weights

Batch = Any  # a tensor, or a tuple, list or dict of batches; on the CPU as served, on the run's device as trained on


class Examples(Protocol):
    """A set of examples."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> Batch:
        """The examples `indices`, int64 (n,), collated. What is random in one of them follows from its key, uint64."""


class Batched(Examples, Protocol):
    """A training set that says itself which examples share a batch, such as sentences of about one length."""

    num_batches: int

    def batches(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The batches of an epoch, `num_batches` of them whatever is drawn: int64 indices, of all processes."""


class Data(Protocol):
    """A training and a validation set, and a test set where there is one: a run is judged by it once, at its end.

    fingerprint: what tells these data from others, as plain JSON; run.json and checkpoints record it. The same as
    luqrun.tasks.fingerprint_data finds without reading them.
    """

    train: Examples | Batched
    val: Examples
    test: Examples | None

    @property
    def fingerprint(self) -> dict[str, object]: ...

    @property
    def sizes(self) -> dict[str, int]:
        """Of the network, such as num_classes; checkpoints hold them, for who builds it without luqrun."""

    def describe(self) -> str:
        """Such as "10,000 training and 4,000 validation images of 94 classes"."""


class Task(Protocol):
    """What the loop asks of a task; one is made for each run, from its config (luqrun.tasks.build_task).

    metrics: what `score` returns of the validation set; the first one decides which epoch is the best, and val/loss is
    among them. unit: what a batch's weight counts, in the plural: images, tokens. equal_weights: whether all training
    batches weigh the same, so that no process has to ask the others. notes: what else summary.json says, such as the
    version of a score.
    """

    metrics: Sequence[Metric]
    unit: str
    equal_weights: bool
    data: Data
    notes: Mapping[str, str] = MappingProxyType({})

    def network(self) -> nn.Module:
        """A new network, its weights drawn from torch's generator. Raises UserError for a model that does not fit."""

    def weights(self) -> Weights | None:
        """What model.weights holds, by the network's own names; None where `network` has drawn, or read, all of it.
        Raises UserError naming the file."""
        return None

    def head(self, network: nn.Module) -> str:
        """The name of the layer that model.new_head draws anew."""
        raise NotImplementedError

    def artifacts(self) -> dict[str, str]:
        """Files of the run folder by name, which are written at a run's start, such as a trained tokenizer."""
        return {}

    def example(self) -> object | None:
        """An input that shows which layers are first and last (luqrun.quantize_model); None: torch.fx finds them."""
        return None

    def weight(self, batch: Batch) -> int:
        """How many examples, or tokens, the loss of this training batch is the mean of; at least 1."""

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A training batch's mean loss, and sums over the same examples or tokens of what else is shown of training.

        The loss is float32 (), to be differentiated, the sums are float64 () under the key of a metric. A mean and its
        weight, not a sum: the gradient of equal batches is then bit for bit that of the mean. The network is called
        once, under the run's autocast.
        """

    def predict(self, network: nn.Module, batch: Batch) -> object:
        """What `score` needs of a batch of evaluation: sums, or predictions. Small and picklable: it is sent around."""

    def score(self, predictions: list, split: str = "val") -> dict[str, float]:
        """The metrics by name, such as val/loss, from what `predict` returned for the batches of all processes, in the
        data's order. split: val or test."""

    def files(self, predictions: list, split: str = "val") -> dict[str, str]:
        """The predictions as text files by name, in the form that other scorers read; the run folder keeps them."""
        return {}
