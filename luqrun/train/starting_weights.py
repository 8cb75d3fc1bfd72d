"""model.weights into a network: every tensor in its place, or one line that says which do not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from luqrun.errors import UserError
from luqrun.runs.weights import KEY, Weights

log = logging.getLogger(__name__)

# A range from earlier steps begins anew where there is none, and other recipes have no use for it; nor has an earlier
# torch counted the batches that batch norm has seen.
OPTIONAL = ("_hindsight", "num_batches_tracked")
NAMED = 3  # parameters that an error names


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights, head: str, new_head: bool) -> None:
    """Copy the tensors into the parameters and buffers of the same names, quantized or not, of any floating dtype.

    head: the name of the layer of the classes; with new_head it stays as it was drawn, whatever the file has. Raises
    UserError naming the file: for names that are missing or not expected, and shapes that differ.
    """
    state = model.state_dict()
    own = f"{head}." if new_head else None
    stored = {name: tensor for name, tensor in weights.tensors.items() if own is None or not name.startswith(own)}
    wanted = {name: tensor for name, tensor in state.items() if own is None or not name.startswith(own)}
    missing, unexpected = _differences(wanted, stored)
    if missing or unexpected:
        parts = [_named("missing", missing)] if missing else []
        parts += [_named("not expected", unexpected)] if unexpected else []
        if not unexpected and all(name.startswith(f"{head}.") for name in missing):
            raise UserError(f"{_called(weights)} has no {head}: {parts[0]}; model.new_head=true draws it")
        raise UserError(f"{_called(weights)} is of another network: {'; '.join(parts)}; {_advice(weights)}")
    for name, tensor in wanted.items():
        if name in stored and stored[name].shape != tensor.shape:
            raise UserError(_misshapen(weights, name, tensor, head))
        if name in stored and tensor.is_floating_point() and not stored[name].is_floating_point():
            raise UserError(f"{weights.path}: {name} holds {stored[name].dtype}, not floating-point numbers")
    for name, tensor in wanted.items():
        if name in stored:
            tensor.copy_(stored[name])
    drawn = f"; {head} is new" if new_head else ""
    log.info("%s: %d tensors of %s%s", KEY, len(wanted.keys() & stored.keys()), _called(weights), drawn)


def _differences(wanted: Mapping[str, Tensor], stored: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names that the file lacks, and those that the network has not."""
    there = {wanted[name].data_ptr() for name in wanted.keys() & set(stored)}  # one table may have several names
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in stored and tensor.data_ptr() not in there and not name.endswith(OPTIONAL)
    ]
    return missing, [name for name in stored if name not in wanted and not name.endswith(OPTIONAL)]


def _named(how: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if names[NAMED:] else ""
    return f"{how} {', '.join(names[:NAMED])}{more}"


def _called(weights: Weights) -> str:
    return f"{weights.path}" + (f" (of a run with {weights.origin})" if weights.origin else "")


def _advice(weights: Weights) -> str:
    if weights.origin:
        return "model and dataset are to be as in that run"
    return "model.name, model.stem and the names of torchvision, timm or luqrun must fit"


def _misshapen(weights: Weights, name: str, tensor: Tensor, head: str) -> str:
    theirs, ours = list(weights.tensors[name].shape), list(tensor.shape)
    text = f"{_called(weights)}: {name} has the shape {theirs}, and the network here has {ours}"
    if name.startswith(f"{head}.") and theirs[1:] == ours[1:] and theirs:
        return f"{text}: {theirs[0]} classes instead of {ours[0]}; model.new_head=true draws a new {head}"
    return f"{text}; it follows from model.* (model.stem=full is torchvision's own) and from the data of dataset.*"
