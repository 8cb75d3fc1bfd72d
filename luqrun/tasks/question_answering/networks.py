"""BertForQuestionAnswering of transformers: a BERT, and a layer that says of each token how well an answer starts, and
ends, there. Its weights are drawn, or read from a folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from luqrun.config import ModelConfig
from luqrun.errors import UserError
from luqrun.internals.of_transformers import transformers
from luqrun.tasks.question_answering.weights import SIZES, WEIGHTS, read_settings, read_shapes

log = logging.getLogger(__name__)

HEAD = "qa_outputs."
NOT_NEEDED = ("bert.pooler.", "bert.cls.", "bert.embeddings.position_ids")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
# Names of parameters in weights that were converted from TensorFlow's.
EARLIER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def build_network(model: ModelConfig, sizes: dict, vocabulary_size: int) -> nn.Module:
    """The network of `model.name`, of `sizes` (data.SIZES), with drawn weights."""
    dropouts = dict.fromkeys(DROPOUTS, sizes["dropout"] if model.dropout is None else model.dropout)
    settings = {name: value for name, value in sizes.items() if name != "dropout"}
    network = _of(transformers().BertConfig(vocab_size=vocabulary_size, **settings, **dropouts))
    if model.weights is None:
        log.info("%s: the weights are random; model=bert model.weights=DIR starts from a pre-trained BERT", model.name)
    return network


def sized_network(model: ModelConfig, folder: Path) -> nn.Module:
    """The network that the config.json of a folder describes, with drawn weights."""
    return _of(_config(folder, read_settings(folder), model.dropout))


def span_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a BERT, by the names of BertForQuestionAnswering, without what that has no use for (pooler, heads)."""
    found = {_canonical(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if not name.startswith(NOT_NEEDED)}


def read_network(model: ModelConfig, folder: Path, whole: bool = False) -> nn.Module:
    """The network of a folder of weights, whose sizes and dropout are its own (but for model.dropout).

    Only the layer that marks answers is drawn where it is not there, unless the network must be `whole`. Raises
    UserError for a folder that does not fit.
    """
    found, shapes = read_settings(folder), read_shapes(folder)
    stored = {_canonical(name): name for name in shapes}
    _check_layers(folder, found["num_hidden_layers"], stored)
    config = _config(folder, found, model.dropout)
    with torch.device("meta"):
        wanted = _of(config).state_dict()
    names = {name: None if model.new_head and name.startswith(HEAD) else stored.get(name) for name in wanted}
    missing = [name for name, there in names.items() if there is None and (whole or not name.startswith(HEAD))]
    if missing:
        raise UserError(
            f"{folder / WEIGHTS} is not a BERT's: {len(missing)} tensors are not there, such as {missing[0]}"
        )
    for name, there in names.items():
        if there is not None and shapes[there] != tuple(wanted[name].shape):
            sizes = f"{list(shapes[there])}, and config.json says {list(wanted[name].shape)}"
            raise UserError(f"{folder / WEIGHTS} does not fit its config.json: {there} has the shape {sizes}")
    network = _of(config)
    with torch.no_grad():
        tensors = _read(folder / WEIGHTS, [there for there in names.values() if there is not None])
        for name, parameter in network.state_dict().items():
            if names[name] is not None:
                parameter.copy_(tensors[names[name]])
    left = len(shapes) - sum(there is not None for there in names.values())
    head = "the span head is random" if names[f"{HEAD}weight"] is None else "the span head is there, too"
    shown = f"{found['num_hidden_layers']} layers of {found['hidden_size']}"
    log.info("%s: weights of %s, %s; %s, %d tensors are not needed", model.name, folder, shown, head, left)
    return network


def _canonical(name: str) -> str:
    """The name that BertForQuestionAnswering gives a parameter that is stored under `name`."""
    for old, new in EARLIER.items():
        name = name.replace(old, new)
    return name if name.startswith(("bert.", HEAD)) else f"bert.{name}"


def _check_layers(folder: Path, layers: int, names) -> None:
    there = {int(found[1]) for name in names if (found := re.match(r"bert\.encoder\.layer\.(\d{1,6})\.", name))}
    if there and len(there) != layers:
        raise UserError(f"{folder / WEIGHTS} does not fit its config.json: it has {len(there)} layers, not {layers}")
    if not there:
        raise UserError(f"{folder / WEIGHTS} is not a BERT's: it has no encoder.layer")


def _config(folder: Path, found: dict, dropout: float | None):
    from transformers.activations import ACT2FN

    kept = {name: found[name] for name in SIZES}
    kept["hidden_act"] = found.get("hidden_act", "gelu")
    if not isinstance(kept["hidden_act"], str) or kept["hidden_act"] not in ACT2FN:
        raise UserError(f"{folder / 'config.json'}: hidden_act={kept['hidden_act']} is not known to transformers")
    for name, default in (("layer_norm_eps", 1e-12), ("initializer_range", 0.02), *((key, 0.1) for key in DROPOUTS)):
        value = found.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise UserError(f"{folder / 'config.json'}: {name}={value} must be at least 0 and less than 1")
        kept[name] = value if dropout is None or name not in DROPOUTS else dropout
    return transformers().BertConfig(**kept)


def _of(config) -> nn.Module:
    return transformers().BertForQuestionAnswering(config)


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
    return tensors
