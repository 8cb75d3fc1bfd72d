"""quantize_model: the walk that swaps layers, and the switches for all layers of a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from luqrun.attention import QuantMultiheadAttention
from luqrun.draws import tell_apart
from luqrun.errors import UserError
from luqrun.modules import MaskedReLU, QuantConv2d, QuantLayer, QuantLinear
from luqrun.recipes import Recipe

log = logging.getLogger(__name__)

# Exact types: a subclass has a forward of its own, which a swap would lose. The last one is attention's out_proj.
TWINS = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.MultiheadAttention: QuantMultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QuantLinear,
}
SHORTCUT = "*downsample.*"  # torchvision's name for a residual block's shortcut convolution


def quantize_model(model: nn.Module, recipe: Recipe, *, skip: Sequence[str] | None = None, seed: int = 0) -> nn.Module:
    """Swap the Conv2d, Linear and MultiheadAttention layers of `model` for ones that compute in `recipe`, in place.

    Parameters, hooks and state_dict keys stay (a hindsight range adds buffers). A ReLU then keeps one bit an element
    for its backward pass (modules.MaskedReLU), in any part of the model. skip: overrides recipe.skip; `()`
    quantizes every layer. seed: of the draws; parts of a model that are quantized on their own need seeds of their
    own, or they draw alike. Returns the model, or its replacement where the model itself is a
    layer. Raises UserError for a pattern that matches no layer. A subclass of these layers is left as it is, with a
    warning: it may compute something else.
    """
    if not isinstance(recipe, Recipe):
        raise UserError(f"quantize_model takes a recipe, such as luqrun.recipe('luq'), not {recipe!r}")
    found = [(name, module) for name, module in model.named_modules() if type(module) in TWINS]
    if not recipe.quantizes:
        return model
    left = _skipped([name for name, _ in found], recipe.skip if skip is None else skip)
    left |= _unreached(model, left)
    chosen = [(name, module) for name, module in found if name not in left]
    first_index = sum(1 for _ in quantized_layers(model))  # of an earlier call: no two layers share their draws
    if not chosen:
        why = "every layer is skipped, see skip=()" if found else "there is no Conv2d, Linear or attention left to swap"
        warnings.warn(f"recipe {recipe.name}: nothing was quantized, {why}", stacklevel=2)
    for name, module in model.named_modules():
        is_kin = isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        if is_kin and type(module) not in TWINS and not isinstance(module, QuantLayer):
            warnings.warn(f"{name} ({type(module).__name__}) is a subclass and was not quantized", stacklevel=2)
    swapped = {
        id(module): TWINS[type(module)].from_module(module, recipe, seed, index)
        for index, (_, module) in enumerate(chosen, start=first_index)
    }
    for module in model.modules():
        if swapped and type(module) is nn.ReLU:
            module.__class__ = MaskedReLU  # its output is not what the next layer keeps any more
    for parent in list(model.modules()) + list(swapped.values()):
        for name, child in parent._modules.items():
            if id(child) in swapped:
                parent._modules[name] = swapped[id(child)]
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fused evaluation path would read the weights past our layers
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # which only that path can take
    log.debug("quantized %d of %d layers", len(chosen), len(found))
    return swapped.get(id(model), model)


def _skipped(names: list[str], skip: Sequence[str]) -> set[str]:
    """The names that the entries of `skip` mean."""
    if isinstance(skip, str):
        raise UserError(f"skip={skip!r} must be a list, such as [first, last, shortcut]")
    left = set()
    for entry in skip:
        if entry in ("first", "last"):
            matched = names[:1] if entry == "first" else names[-1:]
        elif entry == "shortcut":
            matched = [name for name in names if fnmatchcase(name, SHORTCUT)]
        else:
            matched = [name for name in names if fnmatchcase(name, entry)]
            if not matched:
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                allowed = f"first, last, shortcut, or patterns of {shown}"
                raise UserError(f"skip: {entry!r} (quant.skip) matches no layer; allowed: {allowed}")
        left.update(matched)
    return left


def _unreached(model: nn.Module, left: set[str]) -> set[str]:
    """Names of the out_proj of attention that is not swapped: it would be read there, and never called."""
    return {
        f"{name}.out_proj".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and (name in left or type(module) not in TWINS)
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every quantized layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer))


def set_step(model: nn.Module, step: int) -> None:
    """Set the step that names the draws: with it, a resumed run needs nothing else."""
    tell_apart(model)
    for _, layer in quantized_layers(model):
        layer.set_step(step)


def set_finetune(model: nn.Module, on: bool) -> None:
    """FNT: train with INT4 weights and everything else in high precision."""
    for _, layer in quantized_layers(model):
        layer.finetune = on


def set_shared_ranges(model: nn.Module, on: bool) -> None:
    """Of several processes: activations and gradients get the range of all processes' parts of the batch."""
    for _, layer in quantized_layers(model):
        layer.shares_ranges = on


def remember_ranges(model: nn.Module) -> Callable[[], None]:
    """A function that puts the hindsight maxima back to what they are now: then a step can be repeated exactly."""
    layers = [layer for _, layer in quantized_layers(model)]
    maxima = [layer.get_buffer(f"{operand}_hindsight") for layer in layers for operand in layer.remembers]
    before = [maximum.clone() for maximum in maxima]

    def put_back() -> None:
        for maximum, value in zip(maxima, before, strict=True):
            maximum.copy_(value)

    return put_back
