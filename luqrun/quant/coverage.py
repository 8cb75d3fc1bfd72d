"""What of a model does not compute in 4 bits though one might think so, told by name.

At conversion: layers of kinds that luqrun does not quantize. After the first training forward: layers that are shown as
quantized and did not compute, since other code reads their weights (F.linear(x, layer.weight)) or nothing uses them.
"""

from __future__ import annotations

import itertools
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from luqrun.internals.of_torch import tree_leaves
from luqrun.quant.kernels.philox import MICRO_STEP
from luqrun.quant.layers import QuantLayer

KINDS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
LOOKED_UP_OR_ADDED = ("bias", "embed", "token", "pos", "table")  # in the name of a parameter that no GEMM takes
SHOWN = 3


class Unquantized(NamedTuple):
    """A layer that multiplies by weights of its own and is of a kind that luqrun does not quantize."""

    module: nn.Module
    kind: str


def unquantized_layers(model: nn.Module, known: Iterable[type]) -> dict[str, Unquantized]:
    """By name, the layers with matrices for parameters whose type is not one of `known`, nor a quantized one."""
    known, others = tuple(known), {}
    for name, module in model.named_modules():
        passed = isinstance(module, QuantLayer | ParametrizationList)  # the latter belongs to the layer around it
        if type(module) in known or passed or _looks_up_or_scales(module):
            continue
        if isinstance(module, KINDS) or any(_multiplies(*each) for each in module.named_parameters(recurse=False)):
            kind = type(module)
            is_namesake = kind.__name__ in {each.__name__ for each in KINDS}
            others[name] = Unquantized(module, f"{kind.__module__}.{kind.__name__}" if is_namesake else kind.__name__)
    return others


def _looks_up_or_scales(module: nn.Module) -> bool:
    """Whether it is an embedding or a normalisation, of torch or of another library."""
    kind = type(module).__name__.lower()
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or "embedding" in kind or "norm" in kind


def _multiplies(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix that some GEMM may take: not a bias, a scale or an embedding."""
    if any(word in name.lower() for word in LOOKED_UP_OR_ADDED):
        return False
    return is_lazy(parameter) or sum(size > 1 for size in parameter.shape) >= 2


def is_lazy(parameter: nn.Parameter) -> bool:
    """Whether it has no shape yet."""
    return isinstance(parameter, UninitializedTensorMixin)


def warn_of_unquantized(model: nn.Module, others: dict[str, Unquantized]) -> None:
    """Warn, in one line, which layers stay in high precision, and which share of the model's weights they hold."""
    if not others:
        return
    weights = {
        id(each): each
        for other in others.values()
        for each in other.module.parameters(recurse=isinstance(other.module, KINDS))
    }
    sizes = [sum(each.numel() for each in part if not is_lazy(each)) for part in (weights.values(), model.parameters())]
    percent = 100 * sizes[0] / max(sizes[1], 1)
    names: dict[str, list[str]] = {}
    for name, other in others.items():
        names.setdefault(other.kind, []).append(name or "the model")
    kinds = ", ".join(
        f"{each[0]} ({kind})" + (f" and {len(each) - 1} more" if each[1:] else "") for kind, each in names.items()
    )
    layers = "1 layer stays" if len(others) == 1 else f"{len(others)} layers stay"
    share = f"{percent:.{0 if percent >= 10 else 2}f} % of the weights"
    related = any(isinstance(other.module, KINDS) for other in others.values())
    why = " (a subclass of a layer may compute something else)" if related else ""
    warnings.warn(
        f"{layers} in high precision, {share}: {kinds}. luqrun does not quantize these kinds{why}; "
        "names in skip silence this",
        stacklevel=3,
    )


def shown_names(names: Sequence[str]) -> str:
    """The names; of more than a few, patterns that hold them all, which skip takes too."""
    if len(names) <= SHOWN:
        return ", ".join(name or "the model" for name in names)
    patterns = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{pattern} ({count} layers)" if count > 1 else pattern for pattern, count in patterns.items())


class CoverageCheck:
    """Tells, once, which of the layers that a call of quantize_model swapped did not compute in the first training.

    A hook of the model looks after its first forward with gradients. Where it does not (a part of the model is called
    alone, or a compiler took the hook along), the gradients of the layers' weights do as they arrive. Nothing of it
    runs afterwards. A copy of the model has a watch of its own.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, QuantLayer]]):
        self.layers = list(layers)
        self.handle = model.register_forward_hook(self)
        self._listen()

    def __call__(self, module: nn.Module, args, output) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not self.layers:  # told elsewhere, where taking the hook away would have made a compiler start anew
            self.handle.remove()
            return
        leaves = tree_leaves(output)
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        traced = any(isinstance(each, fx.Proxy) for each in leaves)
        if not traced and (not tensors or any(each.requires_grad for each in tensors)):
            self.tell()
            self.handle.remove()

    def arrived(self, number: int) -> None:
        """The gradient of the weight of layer `number` is here: it has computed, or else it is time to tell."""
        if number in self.arrivals:
            for handle in self.arrivals.pop(number):
                handle.remove()
            if not self.arrivals or not computed(self.layers[number][1]):
                self.tell()

    def tell(self) -> None:
        """Warn of the layers that have not computed, and stop watching."""
        for handle in itertools.chain.from_iterable(self.arrivals.values()):
            handle.remove()
        silent = [name for name, layer in self.layers if not computed(layer)]
        total, self.arrivals, self.layers = len(self.layers), {}, []
        if silent:
            whose = "1 layer is" if len(silent) == 1 else f"{len(silent)} of {total} layers are"
            warnings.warn(
                f"{whose} shown as quantized and did not compute in the first training forward: {shown_names(silent)}. "
                "Either nothing used them, or other code reads their weights, in high precision",
                stacklevel=2,
            )

    def _listen(self) -> None:
        self.arrivals: dict[int, list[RemovableHandle]] = {}
        for number, (_, layer) in enumerate(self.layers):
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(_GradientHook(self, number))
                    self.arrivals.setdefault(number, []).append(handle)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "arrivals"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._listen()


class _GradientHook:
    """Passes on to a watch that the gradient of a layer's weight has arrived."""

    def __init__(self, watch: CoverageCheck, number: int):
        self.watch, self.number = weakref.ref(watch), number

    def __call__(self, parameter: Tensor) -> None:
        watch = self.watch()
        if watch is not None and not torch.compiler.is_compiling():  # as compiled autograd does
            watch.arrived(self.number)


def computed(layer: QuantLayer) -> bool:
    """Whether a layer has computed: eager code notes it; compiled code, which may not, moves its draws."""
    return layer.computed[0] or layer.streams.is_meta or bool(layer.streams[:, MICRO_STEP].any())
