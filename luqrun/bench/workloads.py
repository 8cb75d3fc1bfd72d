"""Networks and batches whose training steps are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.config import ModelConfig
from luqrun.tasks.classification.networks import build_model


@dataclass(frozen=True)
class Workload:
    """A network for images and a batch of them."""

    model: str
    channels: int
    size: int
    batch: int
    classes: int

    @property
    def shape(self) -> str:
        """Of the batch, such as 32 x 3 x 32 x 32."""
        return f"{self.batch} x {self.channels} x {self.size} x {self.size}"

    def network(self) -> nn.Module:
        return build_model(ModelConfig(self.model), self.classes, self.channels, self.size)

    def example(self) -> None:
        """torch.fx shows which layers are first and last."""

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        images = torch.randn(self.batch, self.channels, self.size, self.size, device=device)
        labels = torch.randint(self.classes, (self.batch,), device=device)
        return images.contiguous(memory_format=torch.channels_last), labels

    def outputs(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return network(images)

    def loss(self, outputs: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), labels)


@dataclass(frozen=True)
class TextWorkload:
    """A network for text and a batch of random tokens: of sentences and their translations, or of windows."""

    model: str
    batch: int
    length: int
    vocabulary: int

    @property
    def shape(self) -> str:
        """Of the batch, such as 93 x 22."""
        return f"{self.batch} x {self.length}"


class Translation(TextWorkload):
    """A Transformer (luqrun.tasks.translation)."""

    def network(self) -> nn.Module:
        from luqrun.tasks.translation.networks import build_network

        return build_network(ModelConfig(self.model), self.vocabulary, self.length)

    def example(self) -> dict[str, Tensor]:
        ids = torch.full((1, 2), 3)
        return {"input_ids": ids, "decoder_input_ids": ids}

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        size = self.batch, self.length
        return tuple(torch.randint(3, self.vocabulary, size, device=device) for _ in ("source", "target"))

    def outputs(self, network: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        return network(input_ids=source, decoder_input_ids=target, use_cache=False).logits

    def loss(self, outputs: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), target.flatten(), label_smoothing=0.1)


# Of a small pre-trained BERT that is widely used, MiniLM-L6.
MINILM = {
    **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    **{"max_position_embeddings": 512, "initializer_range": 0.02, "dropout": 0.1},
}


class Questions(TextWorkload):
    """A BERT of MiniLM's sizes with a span head (luqrun.tasks.question_answering)."""

    def network(self) -> nn.Module:
        from luqrun.tasks.question_answering.networks import build_network

        return build_network(ModelConfig(self.model), MINILM, self.vocabulary)

    def example(self) -> dict[str, Tensor]:
        return {"input_ids": torch.full((1, 2), 3)}

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        ids = torch.randint(3, self.vocabulary, (self.batch, self.length), device=device)
        return ids, torch.randint(self.length, (2, self.batch), device=device)

    def outputs(self, network: nn.Module, ids: Tensor, ends: Tensor) -> Tensor:
        return torch.stack(network(input_ids=ids, return_dict=False))

    def loss(self, outputs: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), ends.flatten())


TEXT = {"transformer_tiny": Translation, "transformer_base": Translation, "minilm": Questions}
SMALL_TEXT = ("transformer_tiny", "minilm")  # for a CPU
