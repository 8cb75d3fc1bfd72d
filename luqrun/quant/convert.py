"""quantize_model: the walk that swaps layers, and the switches for all layers of a model."""

from __future__ import annotations

import logging
import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from luqrun.errors import UserError
from luqrun.internals.of_torch import forget_compiled_call
from luqrun.quant.attention import QuantMultiheadAttention
from luqrun.quant.coverage import (
    CoverageCheck,
    Unquantized,
    is_lazy,
    shown_names,
    unquantized_layers,
    warn_of_unquantized,
)
from luqrun.quant.dataflow import EMBEDDINGS, Ends, find_ends
from luqrun.quant.draws import rename_copies
from luqrun.quant.finetune import Phase, phase_operands
from luqrun.quant.layers import QuantConv2d, QuantLayer, QuantLinear
from luqrun.quant.norm import FusedBatchNorm2d
from luqrun.quant.recipe import Recipe
from luqrun.quant.relu import MaskedReLU, MaskedReLU6

log = logging.getLogger(__name__)

# Exact types: a subclass has a forward of its own, which a swap would lose. The last one is attention's out_proj.
TWINS = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.MultiheadAttention: QuantMultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QuantLinear,
}
# What stands between layers, and what takes its place: a ReLU keeps a bit an element, for its output is not what the
# next layer keeps any more; a batch norm's backward pass is one with that of the ReLU.
NEIGHBOURS = {nn.ReLU: MaskedReLU, nn.ReLU6: MaskedReLU6, nn.BatchNorm2d: FusedBatchNorm2d}
LAST_SHARE = re.compile(r"last (\d{1,2})%")
NO_QUANTIZERS = "the recipe has no quantizers"
SHORTCUT = "*downsample.*"  # torchvision's name for a residual block's shortcut convolution


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    *,
    skip: Iterable[str] | None = None,
    seed: int = 0,
    example=None,
    fuse: bool = True,
) -> nn.Module:
    """Make the Conv2d, Linear and MultiheadAttention layers of `model` compute in `recipe`, in place.

    Parameters, hooks and state_dict keys stay (a hindsight range adds buffers), and so do the layer objects, whoever
    holds them. A ReLU or ReLU6 then keeps one bit an element for its backward pass (luqrun.quant.relu), in any part of
    the model, and shares that pass with a BatchNorm2d before it (luqrun.quant.norm). seed: of the draws; parts of a
    model that are quantized on their own need seeds of their own, or they draw alike. Returns the model, or its
    replacement where the model itself is a layer.

    skip: layers to leave, instead of recipe.skip; `()` quantizes every layer. `first` are the layers that the input
    reaches through no other layer, `last` those whose output reaches the model's through no other: several where a
    network branches, as with an auxiliary head. An embedding is a layer here, though none that is quantized: of a
    network for text it is the first one. torch.fx traces the forward for it (and the modules' attributes are
    restored), or an evaluation forward without gradients shows it, of `example`: the input, a tensor, a tuple of
    arguments or a dict of keywords. A model that cannot be traced has those it registers first and last. The log says
    which. `last 15%` is that share of the layers that other entries leave, the last in the order of registration.

    fuse: whether BatchNorm2d, ReLU and ReLU6 around these layers become ours, which need fewer passes over memory (on
    the CPU) and less of it, and give torch's numbers but for the order of some sums; else they stay torch's own.

    Warns of layers that stay in high precision (other kinds, subclasses, patched ones) and, after the first training
    forward, of those that are shown as quantized and did not compute. Raises UserError for a pattern that matches no
    layer, and for what is not a model that can be changed.
    """
    _check(model, recipe, skip, seed)
    if not recipe.quantizes:
        return model
    found = {name: module for name, module in model.named_modules() if type(module) in TWINS}
    others = unquantized_layers(model, TWINS)
    left = _skipped(model, found, others, recipe.skip if skip is None else skip, example)
    others = {name: other for name, other in others.items() if name not in left}
    _refuse_lazy(others)
    patched = _patched(found, left)
    left |= patched
    left |= _unreached(model, left)
    chosen = {name: module for name, module in found.items() if name not in left}
    first_index = sum(1 for _ in quantized_layers(model))  # of an earlier call: no two layers share their draws
    if patched:
        text = f"the forward of {shown_names(list(patched))} is patched, on the layer itself: left in high precision"
        warnings.warn(text, stacklevel=2)
    elif not chosen:
        why = "there is no Conv2d, Linear or attention left to swap"
        why = "its layers are quantized already" if first_index else why
        why = "every layer is skipped, see skip=()" if found else why
        warnings.warn(f"recipe {recipe.name}: nothing was quantized, {why}", stacklevel=2)
    warn_of_unquantized(model, others)
    log.debug("quantizing %d of %d layers", len(chosen), len(found))
    twins = {
        name: TWINS[type(module)].from_module(module, recipe, seed, index)
        for index, (name, module) in enumerate(chosen.items(), start=first_index)
    }
    if not twins:
        return model
    for name, module in chosen.items():
        if module is not model:  # which may be kept to compare with
            module.__class__, module.__dict__ = type(twins[name]), vars(twins[name])
    _adapt_neighbours(model, fuse)
    if model not in chosen.values():
        CoverageCheck(model, list(chosen.items()))
        return model
    if forget_compiled_call(twins[""]):
        text = "the layer was compiled before it was quantized: compile what quantize_model returns"
        warnings.warn(text, stacklevel=2)
    return twins[""]


def high_precision_layers(model: nn.Module, recipe: Recipe, *, example=None) -> dict[str, str]:
    """By name, the layers that quantize_model would leave in high precision, and why: the entry of skip that means them
    (first, last, shortcut, last 15%, a pattern), or else in words. The model stays as it is.

    A recipe without quantizers leaves all. Raises UserError as quantize_model does.
    """
    _check(model, recipe, None, 0)
    found = {name: module for name, module in model.named_modules() if type(module) in TWINS}
    others = unquantized_layers(model, TWINS)
    if not recipe.quantizes:
        return dict.fromkeys((*found, *others), NO_QUANTIZERS)
    left = _skipped(model, found, others, recipe.skip, example)
    _refuse_lazy({name: other for name, other in others.items() if name not in left})
    left |= _patched(found, left)
    left |= _unreached(model, left)
    kinds = {name: f"luqrun does not quantize layers of the kind {other.kind}" for name, other in others.items()}
    return kinds | left


def _adapt_neighbours(model: nn.Module, fuse: bool) -> None:
    """Adapt what stands around quantized layers. fuse: see quantize_model."""
    for module in model.modules():
        if fuse and type(module) in NEIGHBOURS and "forward" not in vars(module):
            module.__class__ = NEIGHBOURS[type(module)]
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused evaluation path would read the weights past our layers
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only that path can take


def _check(model: nn.Module, recipe: Recipe, skip: Iterable[str] | None, seed: int) -> None:
    """Raise UserError where an argument of quantize_model is not what it can be."""
    if not isinstance(recipe, Recipe):
        raise UserError(f"quantize_model takes a recipe, such as luqrun.recipe('luq'), not {recipe!r}")
    if isinstance(model, type):
        raise UserError(f"quantize_model takes a model, not its class: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        hint = ": nn.Sequential(*layers) makes one of them" if isinstance(model, list | tuple) else ""
        raise UserError(f"quantize_model takes a torch.nn.Module, not {type(model).__name__}{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("quantize_model cannot change a ScriptModule: quantize the model before torch.jit compiles it")
    if not isinstance(seed, numbers.Integral):
        raise UserError(f"seed={seed!r} must be an integer")
    if skip is None:
        return
    if isinstance(skip, str) or not isinstance(skip, list | tuple | set | frozenset):
        raise UserError(f"skip={skip!r} must be a list, such as [first, last, shortcut]")
    for entry in skip:
        if not isinstance(entry, str):
            shown = entry.__name__ if isinstance(entry, type) else repr(entry)[:80]
            raise UserError(
                f"skip: {shown} is not a string; allowed: first, last, shortcut, or patterns of layers' names"
            )


def _skipped(
    model: nn.Module, found: dict[str, nn.Module], others: dict[str, Unquantized], skip: Sequence[str], example
) -> dict[str, str]:
    """The names that the entries of `skip` mean, and the first entry that means each; a pattern may name one of
    `others`, which is then not told."""
    left, names, ends = {}, list(found), None
    for entry in sorted(skip, key=lambda entry: bool(LAST_SHARE.fullmatch(entry))):  # a share is of what others leave
        if entry in ("first", "last"):
            ends = ends or _ends(model, found, others, example)
            matched = ends.first if entry == "first" else ends.last
            log.info("skip: %s is %s (%s)", entry, ", ".join(matched) or "no layer", ends.how)
        elif entry == "shortcut":
            matched = [name for name in names if fnmatchcase(name, SHORTCUT)]
        elif share := LAST_SHARE.fullmatch(entry):
            others_leave = [name for name in names if name not in left]
            matched = others_leave[len(others_leave) - round(len(others_leave) * int(share[1]) / 100) :]
            log.info("skip: %s is %s", entry, ", ".join(matched) or "no layer")
        else:
            matched = [name for name in (*names, *others) if fnmatchcase(name, entry)]
            if not matched:
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                allowed = f"first, last, shortcut, last N%, or patterns of {shown}"
                raise UserError(f"skip: {entry!r} (quant.skip) matches no layer; allowed: {allowed}")
        left = dict.fromkeys(matched, entry) | left
    return left


def _refuse_lazy(others: dict[str, Unquantized]) -> None:
    for name, other in others.items():
        if any(map(is_lazy, other.module.parameters(recurse=False))):
            raise UserError(f"{name} ({other.kind}) has no shape yet: call the model once, then quantize_model")


def _patched(found: dict[str, nn.Module], left: dict[str, str]) -> dict[str, str]:
    """Layers whose forward is not their class's, which a swap would lose."""
    names = [name for name, module in found.items() if "forward" in vars(module) and name not in left]
    return dict.fromkeys(names, "its forward is patched")


def _ends(model: nn.Module, found: dict[str, nn.Module], others: dict[str, Unquantized], example) -> Ends:
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, EMBEDDINGS)}
    unquantized = {name: other.module for name, other in others.items()}
    layers = {**found, **unquantized, **dict(quantized_layers(model)), **embeddings}
    registered = {name: layers[name] for name, _ in model.named_modules() if name in layers}
    return find_ends(model, registered, list(found), example)


def _unreached(model: nn.Module, left: dict[str, str]) -> dict[str, str]:
    """The out_proj of attention that is not swapped: it would be read there, and never called."""
    return {
        f"{name}.out_proj".lstrip("."): left.get(f"{name}.out_proj".lstrip("."), "its attention is not quantized")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and (name in left or type(module) not in TWINS)
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every quantized layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer))


def _layers(model: nn.Module) -> list[QuantLayer]:
    """The quantized layers in the model's order, for what is done at each step: to name each module takes longer."""
    found, ahead, seen = [], [model], set()
    while ahead:
        module = ahead.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, QuantLayer):
            found.append(module)
        ahead.extend(reversed(module._modules.values()))
    return found


def set_step(model: nn.Module, step: int) -> None:
    """Set the step that names the draws: with it, a resumed run needs nothing else."""
    set_step_of(_layers(model), step)


def set_step_of(layers: Sequence[QuantLayer], step: int) -> None:
    """`set_step` of all the quantized layers of a model."""
    rename_copies(layers)
    for layer in layers:
        layer.set_step(step)


def set_finetune(model: nn.Module, phase: bool | str | Mapping[str, Sequence[str]]) -> None:
    """Begin the last phase of a training, with operands of GEMMs in high precision; False: back to the recipe.

    phase: `fnt` or True, the paper's (weights stay quantized, activations and gradients do not); `forward_high` (fprop
    in high precision); `qaf` (dgrad and wgrad in high precision); or the operands by GEMM, such as
    {"fprop": ["activation"]}. An evaluation has the recipe's own weights and activations all the same. Hindsight ranges
    go on being learnt where evaluation needs them, not of gradients that are not quantized. Raises UserError.
    """
    operands, layers = phase_operands(phase), _layers(model)
    recipes = {id(layer.recipe): layer.recipe for layer in layers}
    # Layers of one recipe share one object, as they share the recipe.
    phases = {key: None if operands is None else Phase.of(recipe, operands) for key, recipe in recipes.items()}
    for layer in layers:
        layer.finetune = phases[id(layer.recipe)]


@contextmanager
def unchanged_weights(model: nn.Module) -> Iterator[None]:
    """In here the weights do not change, as in an evaluation or between the micro-batches of a step: a quantized layer
    quantizes its own once, where that gives the same codes each time, and holds them (1.5 bytes a weight of 4 bits)."""
    layers = _layers(model)
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def set_shared_ranges(model: nn.Module, on: bool) -> None:
    """Of several processes: activations and gradients get the range of all processes' parts of the batch. Raises
    UserError for range=signed_max, of which processes share nothing."""
    for layer in _layers(model):
        for operand in ("activation", "gradient") if on else ():
            if any(each.range == "signed_max" for each in layer.recipe.quantizers(operand)):
                raise UserError(
                    f"quant.{operand}.range=signed_max cannot be that of all processes; allowed with it: "
                    "distributed.range=rank"
                )
        layer.shares_ranges = on


def remember_ranges(layers: Sequence[QuantLayer]) -> Callable[[], None]:
    """A function that puts the layers' hindsight maxima back to what they are now: then a step can be repeated
    exactly."""
    maxima = [layer.get_buffer(f"{operand}_hindsight") for layer in layers for operand in layer.remembers]
    before = [maximum.clone() for maximum in maxima]

    def put_back() -> None:
        for maximum, value in zip(maxima, before, strict=True):
            maximum.copy_(value)

    return put_back
