"""A second task for the tests: a class for each letter of a word. Words differ in length, so that a batch's weight is
the number of its letters; what an epoch is judged by is an error, and computed from all predictions in their order."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.config import Config
from luqrun.runs.metric import Metric
from luqrun.tasks.task import Task

LETTERS, CLASSES, LONGEST, PADDING = 12, 3, 9, -1


class Words:
    """Random words, int64 (n, LONGEST), and what their letters are: the class depends on the letter alone."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.letters = torch.from_numpy(rng.integers(LETTERS, size=(count, LONGEST)))
        lengths = torch.from_numpy(rng.integers(1, LONGEST + 1, size=(count, 1)))
        self.labels = torch.where(torch.arange(LONGEST) < lengths, self.letters % CLASSES, PADDING)

    def __len__(self) -> int:
        return len(self.letters)

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> dict[str, Tensor]:
        chosen = torch.from_numpy(indices)
        return {"letters": self.letters[chosen], "labels": self.labels[chosen]}


class Labelling(Task):
    metrics = (Metric("val/error", "error %", higher_is_better=False), Metric("val/loss", "loss", False))
    unit = "letters"
    equal_weights = False

    def __init__(self, config: Config):
        self.data = SimpleNamespace(
            train=Words(64, seed=0),
            val=Words(45, seed=1),
            test=Words(20, seed=2),
            fingerprint=fingerprint(config),
            sizes={"letters": LETTERS, "classes": CLASSES},
            describe=lambda: "64 training and 45 validation words",
        )

    def network(self) -> nn.Module:
        layers = [nn.Embedding(LETTERS, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, CLASSES)]
        return nn.Sequential(*layers)

    def weight(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != PADDING).sum())

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = network(batch["letters"]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=PADDING), {}

    def predict(self, network: nn.Module, batch: dict[str, Tensor]) -> list[tuple[list[int], float]]:
        """For each word its letters' classes, and its loss."""
        logits = network(batch["letters"]).float()
        losses = F.cross_entropy(logits.mT, batch["labels"], ignore_index=PADDING, reduction="none").sum(1)
        return list(zip(logits.argmax(2).tolist(), losses.tolist(), strict=True))

    def files(self, predictions: list, split: str = "val") -> dict[str, str]:
        found = [classes for batch in predictions for classes, _ in batch]
        return {f"{split}.txt": "".join(" ".join(map(str, classes)) + "\n" for classes in found)}

    def score(self, predictions: list, split: str = "val") -> dict[str, float]:
        found, losses = zip(*(word for batch in predictions for word in batch), strict=True)
        labels = getattr(self.data, split).labels  # whose order the predictions must have
        counted = labels != PADDING
        wrong = (torch.tensor(found) != labels)[counted]
        error = 100 * wrong.double().mean().item()
        return {f"{split}/error": error, f"{split}/loss": sum(losses) / int(counted.sum())}


build = Labelling


def fingerprint(config: Config) -> dict:
    return {"classes": CLASSES, "train": 64, "val": 45}


def validate(config: Config) -> None:
    """Everything is allowed."""
