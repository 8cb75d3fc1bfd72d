"""Image classification: cross-entropy, judged by the share of images whose class is the first, or among five."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.config import COMPANIONS, Config
from luqrun.errors import UserError, check_choice
from luqrun.runs.metric import Metric
from luqrun.runs.weights import Weights, find_file, fingerprint_weights, read_weights
from luqrun.tasks.classification.data import (
    build_dataset,
    fingerprint_dataset,
    shape_without_data,
    validate_dataset,
)
from luqrun.tasks.classification.names import torchvision_names
from luqrun.tasks.classification.networks import MODELS, STEMS, build_model
from luqrun.tasks.outline import Outline
from luqrun.tasks.task import Task


def build(config: Config) -> Classification:
    """The task of this run. Raises UserError naming the key, or the file, that is wrong."""
    return Classification(config)


def bare_network(config: Config, sizes: Mapping) -> tuple[nn.Module, None]:
    """As luqrun.tasks.bare_network: glyphs are grey, all other images have colours."""
    channels = 1 if config.dataset.name == "glyphs" else 3
    return build_model(config.model, sizes["num_classes"], channels, config.dataset.image_size), None


def validate(config: Config) -> None:
    """Raise UserError naming the first key under `model` or `dataset` that is not allowed; no file is looked at."""
    model = config.model
    if model.name not in MODELS:
        what = f"model.name={model.name} does not classify images, as dataset={config.dataset.name} asks"
        of_text = [name for name, usual in COMPANIONS.items() if usual["model"] == model.name]
        instead = f"; it goes with dataset={' or '.join(of_text)}" if of_text else ""
        raise UserError(f"{what}; allowed: {', '.join(MODELS)}{instead}")
    check_choice("model.stem", model.stem, STEMS)
    if model.dropout is not None:
        raise UserError(f"model.dropout={model.dropout} is read by networks for text alone")
    validate_dataset(config.dataset)


def fingerprint(config: Config) -> dict:
    """As luqrun.tasks.fingerprint_data. Raises UserError as `build` does."""
    found, weights = fingerprint_dataset(config.dataset), config.model.weights
    return found if weights is None else {**found, "weights": fingerprint_weights(weights)}


class Predicted(NamedTuple):
    """Of a batch: the sum of its losses, how many images have their class first and among the first five, and for each
    image its class and the first one."""

    loss: float
    first: float
    first_five: float
    classes: list[int]
    found: list[int]


def outline(config: Config) -> Outline:
    """As luqrun.tasks.outline_task."""
    if config.model.weights is not None:
        find_file(config.model.weights)  # its shapes are the network's, or a training would refuse it
    classes, channels = shape_without_data(config.dataset)
    dataset = config.dataset
    shape = dataset.batch_size, channels, dataset.image_size, dataset.image_size
    with torch.device("meta"):
        network = build_model(config.model, classes, channels, dataset.image_size).train()
        images = torch.empty(shape)
    about = f"images of {' x '.join(map(str, shape[1:]))}, {classes:,} classes"
    # torchvision calls the images x; nn.Sequential, of the small networks, calls them input.
    name = next(iter(inspect.signature(network.forward).parameters))
    return Outline(network, {name: images}, None, dataset.batch_size, "image", about)


class Classification(Task):
    """A batch is images, float32 (n, C, H, W), and their classes, int64 (n,)."""

    metrics = (
        Metric("val/top1", "top-1 %", higher_is_better=True),
        Metric("val/top5", "top-5 %", higher_is_better=True),
        Metric("val/loss", "loss", higher_is_better=False),
    )
    unit = "images"
    equal_weights = True  # an epoch's last, smaller batch is left out

    def __init__(self, config: Config):
        self.model, self.label_smoothing = config.model, config.schedule.label_smoothing
        self.data = build_dataset(config.dataset)
        if config.model.weights is not None:
            self.data = dataclasses.replace(self.data, fingerprint=fingerprint(config))

    def network(self) -> nn.Module:
        data = self.data
        return build_model(self.model, len(data.classes), data.channels, data.image_size)

    def weights(self) -> Weights | None:
        if self.model.weights is None:
            return None
        found = read_weights(self.model.weights)
        return dataclasses.replace(found, tensors=torchvision_names(found.tensors))

    def head(self, network: nn.Module) -> str:
        return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]

    def weight(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[1])

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits = network(_channels_last(images))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, {"top1": 100.0 * (logits.detach().argmax(1) == labels).sum().double()}

    def predict(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Predicted:
        images, labels = batch
        logits = network(_channels_last(images)).float()
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()]).tolist()
        return Predicted(*sums, labels.tolist(), best[:, 0].tolist())

    def score(self, predictions: list[Predicted], split: str = "val") -> dict[str, float]:
        loss, top1, top5 = (math.fsum(each[number] for each in predictions) for number in range(3))
        images = sum(len(each.classes) for each in predictions)
        means = {"loss": loss / images, "top1": 100 * (top1 / images), "top5": 100 * (top5 / images)}
        return {f"{split}/{name}": mean for name, mean in means.items()}

    def files(self, predictions: list[Predicted], split: str = "val") -> dict[str, str]:
        """val.csv: a line an image, in the order of the data: its class and the one that was found."""
        text, names = io.StringIO(), [each.encode(errors="backslashreplace").decode() for each in self.data.classes]
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(("class", "predicted"))
        for each in predictions:
            lines.writerows((names[own], names[found]) for own, found in zip(each.classes, each.found, strict=True))
        return {f"{split}.csv": text.getvalue()}


def _channels_last(images: Tensor) -> Tensor:
    """It halves the convolutions' backward pass on the CPU, and is what tensor cores want."""
    return images.to(memory_format=torch.channels_last)
